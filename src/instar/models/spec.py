"""What a Transformer is, as pure data: no arrays, no code paths, hashable.

A `ModelSpec` says which layers a model has and how each is made. The one `Transformer` of
`instar.models.transformer` turns any of them into parameters and a forward pass; the names that
people know (GPT-3, LLaMA) are functions in `instar.families` that return a spec.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from instar.errors import UserError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclass(frozen=True)
class Norm:
    """LayerNorm (Ba et al. 2016, eq. 4) or RMSNorm (Zhang & Sennrich 2019, eq. 4)."""

    kind: Literal["layer", "rms"]
    epsilon: float = 1e-5
    bias: bool = False


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, 2306.15595, eq. 4)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow rotations slowed further, fast ones kept (Llama 3.1's model code; no paper states it).

    A wavelength above `positions / low` is stretched by `factor`, one below `positions / high` is
    kept, and in between the frequency is interpolated. `positions` are those of the first training.
    """

    factor: float
    low: float
    high: float
    positions: int


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, eq. 34) on the first `fraction` of each head.

    `half` rotates element i with i + n/2 (GPT-NeoX, LLaMA); `interleaved` rotates 2i with 2i + 1
    (GPT-J, the paper). `scaling` stretches them to longer texts.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    style: Literal["half", "interleaved"] = "half"
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclass(frozen=True)
class Attention:
    """Multi-head attention; fewer `kv_heads` than `heads` is grouped-query attention.

    `window` w makes key j visible to query i iff 0 <= i - j < w. `alibi` adds Press et al.'s
    linear biases. `scale` multiplies the logits and is 1/sqrt(head_dim) where None.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False
    rotary: Rotary | None = None
    qk_norm: Norm | None = None
    window: int | None = None
    alibi: bool = False
    scale: float | None = None
    softcap: float | None = None

    def check(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1:
            raise UserError("heads, kv_heads and head_dim must each be at least 1")
        if self.heads % self.kv_heads:
            raise UserError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.rotary is not None:
            rotated = self.rotary.fraction * self.head_dim
            if rotated != int(rotated) or int(rotated) % 2 or not 0 < rotated <= self.head_dim:
                raise UserError(
                    f"rotary positions need an even number of rotated elements in each head, and "
                    f"head_dim {self.head_dim} x fraction {self.rotary.fraction} gives {rotated:g}"
                )
        if self.window is not None and self.window < 1:
            raise UserError(f"window must be at least 1, not {self.window}")


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
    by their sum. `choice_bias` adds to the scores, for the choice alone, a number for each expert
    that no gradient moves (Wang et al. 2024, 2408.15664, eq. 3).
    """

    expert: Mlp
    count: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    choice_bias: bool = False

    def check(self) -> None:
        self.expert.check()
        if self.expert.bias:
            raise UserError("experts are matrices without biases: leave expert.bias out")
        if not 1 <= self.top_k <= self.count:
            raise UserError(
                f"top_k ({self.top_k}) must be at least 1 and at most the count of experts "
                f"({self.count})"
            )


@dataclass(frozen=True)
class Layer:
    """One residual layer: a mixer over positions and an MLP over features, and how they are wired.

    `pre_norm`: x += mixer(norm(x)), then x += mlp(norm(x)), where the MLP may be one of experts.
    Other mixers, MLPs and arrangements extend these three fields.
    """

    mixer: Attention
    mlp: Mlp | Experts
    norm: Norm
    arrangement: Literal["pre_norm"] = "pre_norm"


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only Transformer.

    `layers` is a program: groups of (repeat, period), where a period is a tuple of layers. A plain
    GPT of n layers is `((n, (layer,)),)`; alternating kinds are one period of two. Each group is
    stored with its parameters stacked on a leading axis of length `repeat`, and is scanned.

    `output` is what a hidden state is turned into: `logits` of the next token, or one `scalar`, the
    score of a reward model or the value of a critic (`tied` is then without effect).
    """

    vocab_size: int
    width: int
    max_positions: int
    layers: tuple[tuple[int, tuple[Layer, ...]], ...]
    final_norm: Norm | None
    learned_positions: bool = False
    tied: bool = False
    output: Literal["logits", "scalar"] = "logits"

    @property
    def depth(self) -> int:
        """The number of layers."""
        return sum(repeat * len(period) for repeat, period in self.layers)

    def each_layer(self) -> tuple[Layer, ...]:
        """The layers in the order in which they run, `depth` of them."""
        return tuple(layer for repeat, period in self.layers for layer in period * repeat)

    def check(self) -> None:
        """Raises UserError where the sizes contradict each other."""
        if min(self.vocab_size, self.width, self.max_positions) < 1:
            raise UserError("vocab_size, width and max_positions must each be at least 1")
        if not self.layers or not all(period for _, period in self.layers):
            raise UserError("a model, and each of its groups, needs at least one layer")
        if min(repeat for repeat, _ in self.layers) < 1:
            raise UserError("each group of layers must be repeated at least 1 time")
        for layer in set(self.each_layer()):
            layer.mixer.check()
            layer.mlp.check()

    def replace(self, **changes: object) -> "ModelSpec":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
