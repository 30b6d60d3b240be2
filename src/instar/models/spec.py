"""What a Transformer is, as pure data: no arrays, no code paths, hashable.

A `ModelSpec` says which layers a model has and how each is made. The one `Transformer` of
`instar.models.transformer` turns any of them into parameters and a forward pass; the names that
people know (GPT-3, LLaMA) are functions in `instar.families` that return a spec.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from instar.errors import UserError
from instar.models.rotary import HeadKind, Rotary, Yarn

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclass(frozen=True)
class Norm:
    """LayerNorm (Ba et al. 2016, eq. 4) or RMSNorm (Zhang & Sennrich 2019, eq. 4).

    What multiplies is `offset` plus a parameter; with an offset of 1 that begins at 0 (Gemma).
    """

    kind: Literal["layer", "rms"]
    epsilon: float = 1e-5
    bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Attention:
    """Multi-head attention; fewer `kv_heads` than `heads` is grouped-query attention.

    `window` w makes key j visible to query i iff 0 <= i - j < w. `alibi` adds Press et al.'s
    linear biases; where `alibi_rounded`, in the form of Falcon RW (see `attention.alibi`). `scale`
    multiplies the logits and is 1/sqrt(head_dim) where None. `qk_norm` norms queries and keys
    before they turn: each head's by itself, or the heads of a token as one vector.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False
    rotary: Rotary | None = None
    qk_norm: Norm | None = None
    qk_norm_over: Literal["head", "all"] = "head"
    window: int | None = None
    alibi: bool = False
    alibi_rounded: bool = False
    scale: float | None = None
    softcap: float | None = None

    @property
    def turning(self) -> HeadKind | None:
        """What of a head turns."""
        return None if self.rotary is None else (self.rotary, self.head_dim)

    def cached(self, parts: int = 1) -> tuple[tuple[int, int], ...]:
        """The heads and the size of each array that a cache keeps of a token: keys and values.

        `parts` is how many devices share the heads, each of which has one at least.
        """
        return ((max(self.kv_heads, parts), self.head_dim),) * 2

    def check(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1:
            raise UserError("heads, kv_heads and head_dim must each be at least 1")
        if self.heads % self.kv_heads:
            raise UserError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.rotary is not None:
            self.rotary.check_heads(self.head_dim)
        if self.alibi_rounded and not self.alibi:
            raise UserError("alibi_rounded says how alibi is computed: set both or neither")
        if self.window is not None and self.window < 1:
            raise UserError(f"window must be at least 1, not {self.window}")


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-AI 2024, 2412.19437, eq. 1 to 11).

    The keys and values of all heads are made from one vector of `rank` elements, the latent of a
    token; beside it lies one key of `rotary_dim` elements, which alone turns and which all heads
    share. A head compares `head_dim` elements of its own with those of its key, and its last
    `rotary_dim`, which turn too, with the shared key; its values have `value_dim`. With a
    `query_rank` queries are made from a latent as well. Both latents are normed by `norm`. `bias`
    is that of the matrices to latents and to the output. A cache keeps the latent and the shared
    key, whatever the number of heads.
    """

    heads: int
    head_dim: int
    rotary_dim: int
    value_dim: int
    rank: int
    query_rank: int | None
    rotary: Rotary
    norm: Norm
    bias: bool = False

    window: ClassVar[None] = None  # all keys are visible

    @property
    def query_dim(self) -> int:
        """The size of a query, and of what it is compared with."""
        return self.head_dim + self.rotary_dim

    @property
    def cached_dim(self) -> int:
        """The size of what a cache keeps of a token."""
        return self.rank + self.rotary_dim

    @property
    def scale(self) -> float:
        """What multiplies the logits: both of their sides grow where texts are stretched."""
        scaling = self.rotary.scaling
        growth = scaling.growth(scaling.mscale_all_dim) if isinstance(scaling, Yarn) else 1.0
        return self.query_dim**-0.5 * growth**2

    @property
    def turning(self) -> HeadKind:
        """What of a head turns."""
        return self.rotary, self.rotary_dim

    def cached(self, parts: int = 1) -> tuple[tuple[int, int], ...]:
        """The heads and the size of each array that a cache keeps of a token, on each device."""
        return ((1, self.cached_dim),)

    def check(self) -> None:
        sizes = ("heads", "head_dim", "rotary_dim", "value_dim", "rank", "query_rank")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        self.rotary.check_heads(self.rotary_dim)


@dataclass(frozen=True)
class Mlp:
    """Two matrices around an activation, or three where `gated` (Shazeer 2020, eq. 5 and 6)."""

    width: int
    activation: Activation
    gated: bool = False
    bias: bool = False

    def check(self) -> None:
        if self.width < 1:
            raise UserError(f"mlp width must be at least 1, not {self.width}")


@dataclass(frozen=True)
class Experts:
    """`count` MLPs, of which a router chooses `top_k` for each token (Shazeer et al. 2017, eq. 1).

    The router is a matrix without bias whose logits become scores by `score`: a softmax over all
    experts (Jiang et al. 2024, 2401.04088, section 2.1) or a sigmoid of each (DeepSeek-AI 2024,
    2412.19437, eq. 15). The chosen experts are weighted by their scores, which `normalise` divides
    by their sum, and then multiplied by `scale`. `choice_bias` adds to the scores, for the choice
    alone, a number for each expert that no gradient moves (Wang et al. 2024, 2408.15664, eq. 3).

    Experts are of `groups` of neighbours, of which a token chooses in `top_groups` alone: in those
    whose best two scores have the largest sums (2412.19437, section 2.1.2). A `shared` MLP reads
    every token besides (Dai et al. 2024, 2401.06066, eq. 9).
    """

    expert: Mlp
    count: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    choice_bias: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    shared: Mlp | None = None

    def check(self) -> None:
        self.expert.check()
        if self.shared is not None:
            self.shared.check()
        if self.expert.bias:
            raise UserError("experts are matrices without biases: leave expert.bias out")
        if not 1 <= self.top_k <= self.count:
            raise UserError(
                f"top_k ({self.top_k}) must be at least 1 and at most the count of experts "
                f"({self.count})"
            )
        if not 1 <= self.top_groups <= self.groups:
            raise UserError(
                f"top_groups ({self.top_groups}) must be at least 1 and at most the groups of "
                f"experts ({self.groups})"
            )
        if self.groups == 1:
            return
        size, rest = divmod(self.count, self.groups)
        if rest or size < 2:
            raise UserError(
                f"{self.count} experts do not make {self.groups} groups of the same size, two or "
                "more each"
            )
        if self.top_k > self.top_groups * size:
            raise UserError(
                f"top_k ({self.top_k}) exceeds the {self.top_groups * size} experts of "
                f"{self.top_groups} groups"
            )


# The norms that a layer of each arrangement has, by the place where they are: before a branch, at
# its end (`out`), and after it was added to the residual stream (`sum`).
ARRANGEMENTS: dict[str, tuple[str, ...]] = {
    "pre_norm": ("mixer_norm", "mlp_norm"),
    "post_norm": ("mixer_sum_norm", "mlp_sum_norm"),
    "output_norm": ("mixer_out_norm", "mlp_out_norm"),
    "sandwich": ("mixer_norm", "mixer_out_norm", "mlp_norm", "mlp_out_norm"),
    "parallel": ("mixer_norm", "mlp_norm"),
    "shared": ("mixer_norm",),
    "normed": ("mixer_norm", "mlp_norm"),
}


@dataclass(frozen=True)
class Layer:
    """One residual layer: a mixer m over positions and an MLP f over features, and their wiring.

    With x the residual stream, and norms n, n', o and o', which have a place of their own each:

    - `pre_norm`: x += m(n(x)), then x += f(n'(x)) (Radford et al. 2019, section 2.3).
    - `post_norm`: x = n(x + m(x)), then x = n'(x + f(x)) (Vaswani et al. 2017, section 3.1).
    - `output_norm`: x += o(m(x)), then x += o'(f(x)) (OLMo 2, 2501.00656, section 2.1).
    - `sandwich`: x += o(m(n(x))), then x += o'(f(n'(x))) (Gemma 2, 2408.00118, section 2).
    - `parallel`: x += m(n(x)) + f(n'(x)) (GPT-NeoX, 2204.06745, section 2.1).
    - `shared`: x += m(n(x)) + f(n(x)) (GPT-J).
    - `normed`: h = n(x), x = c h + m(h), then h = n'(x), x = c h + f(h), where c is
      `residual_scale` (ChatGLM-6B, after DeepNorm, Wang et al. 2022).
    """

    mixer: Attention | Latent
    mlp: Mlp | Experts
    norm: Norm
    arrangement: Literal[
        "pre_norm", "post_norm", "output_norm", "sandwich", "parallel", "shared", "normed"
    ] = "pre_norm"
    residual_scale: float = 1.0

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of its norms."""
        return ARRANGEMENTS[self.arrangement]


@dataclass(frozen=True)
class Prefix:
    """What begins a text and is visible to all of it (GLM, Du et al. 2022, section 2.1 to 2.3).

    The prefix of a text are the tokens before the first `start_id` in it, or all where there is
    none. A token has two positions: its `place`, from 0 on in the prefix, and behind it that of the
    first of the text's `mask_ids`, which the tokens behind are put for; and its `block`, 0 in the
    prefix and 1, 2, ... behind. A token sees those of no later block.
    """

    start_id: int
    mask_ids: tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only Transformer.

    `layers` is a program: groups of (repeat, period), where a period is a tuple of layers. A plain
    GPT of n layers is `((n, (layer,)),)`; alternating kinds are one period of two. Each group is
    stored with its parameters stacked on a leading axis of length `repeat`, and is scanned.

    `output` is what a hidden state is turned into: `logits` of the next token, or one `scalar`, the
    score of a reward model or the value of a critic (what is said of the head is then without
    effect).

    Attributes:
      learned_positions: a table of embeddings of positions is added; position p is its row
        p + `position_offset`, and it has as many rows more.
      embedding_width: of the tables of tokens and of a tied head, where it is not `width`:
        matrices without bias lie between the two (OPT-350M).
      embedding_scale: multiplies the embeddings of tokens. embedding_norm: follows it.
      prefix: what is visible to all of a text; None: a token sees those before it alone.
      tied: the head is the table of tokens. head_bias: it has a bias. head_normed: its rows are
        divided by their norms (Baichuan 2, 2309.10305, section 2.4).
      logit_softcap: c makes of the logits c * tanh(logits / c) (Gemma 2, 2408.00118, section 2).
    """

    vocab_size: int
    width: int
    max_positions: int
    layers: tuple[tuple[int, tuple[Layer, ...]], ...]
    final_norm: Norm | None
    learned_positions: bool = False
    position_offset: int = 0
    embedding_width: int | None = None
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    prefix: Prefix | None = None
    tied: bool = False
    head_bias: bool = False
    head_normed: bool = False
    logit_softcap: float | None = None
    output: Literal["logits", "scalar"] = "logits"

    @property
    def table_width(self) -> int:
        """The width of the tables of tokens, and of what the head reads."""
        return self.embedding_width or self.width

    @property
    def depth(self) -> int:
        """The number of layers."""
        return sum(repeat * len(period) for repeat, period in self.layers)

    def each_layer(self) -> tuple[Layer, ...]:
        """The layers in the order in which they run, `depth` of them."""
        return tuple(layer for repeat, period in self.layers for layer in period * repeat)

    def map_layers(self, change: Callable[[Layer], Layer]) -> "ModelSpec":
        """A copy with every layer changed."""
        layers = tuple((repeat, tuple(map(change, period))) for repeat, period in self.layers)
        return dataclasses.replace(self, layers=layers)

    def check(self) -> None:
        """Raises UserError where the sizes contradict each other."""
        if min(self.vocab_size, self.width, self.max_positions) < 1:
            raise UserError("vocab_size, width and max_positions must each be at least 1")
        if not self.layers or not all(period for _, period in self.layers):
            raise UserError("a model, and each of its groups, needs at least one layer")
        if min(repeat for repeat, _ in self.layers) < 1:
            raise UserError("each group of layers must be repeated at least 1 time")
        if self.tied and self.head_bias:
            raise UserError("a head that is the table of tokens has no bias: untie it")
        for layer in set(self.each_layer()):
            layer.mixer.check()
            layer.mlp.check()

    def replace(self, **changes: object) -> "ModelSpec":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def in_groups(layers: Sequence[Layer]) -> tuple[tuple[int, tuple[Layer, ...]], ...]:
    """Layers as groups of `ModelSpec`: by the shortest period that they repeat, and its rest."""
    size = next(
        n
        for n in range(1, len(layers) + 1)
        if all(layer == layers[i % n] for i, layer in enumerate(layers))
    )
    whole, rest = divmod(len(layers), size)
    groups = ((whole, tuple(layers[:size])), (1, tuple(layers[len(layers) - rest :])))
    return tuple((repeat, period) for repeat, period in groups if period)
