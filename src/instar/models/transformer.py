"""The one Transformer: a `ModelSpec` turned into parameters and a pure forward pass."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from instar.models import spec as specs
from instar.models.attention import Attend, attend
from instar.models.cache import Keys, KVCache, LayerCache, extend_layer
from instar.models.experts import Dispatch, Experts, Statistics, dispatch_here
from instar.models.layers import Mlp, Norm, Projection
from instar.models.mixers import Attention, Latent
from instar.models.parameters import Initialization, normal, param
from instar.models.rotary import HeadKind, Turns, turns_of

Remat = Literal["none", "full", "dots", "attention"]
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
Routing = dict[str, dict]  # what routers did, under the names of their layers' parameters

# The residual stream is split along the sequence by the devices that share heads and MLPs, which
# gather it before either (sequence parallelism; Korthikanti et al. 2022, section 4.2.2).
RESIDUAL = ("batch", "residual", None)
WHOLE = ("batch", "sequence", None)

# What the backward pass may keep; everything else of a layer is computed again.
REMAT_POLICIES: dict[str, Callable | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model runs, apart from what it is: none of it changes the function that is computed.

    `dtype` is that of activations and matrix products. `unroll` is how many iterations of a scan
    over layers are laid out at once (0: all). `constrain` pins an activation, named by its logical
    axes, to the mesh, and `parts` says into how many the mesh splits a logical axis. `attend`
    computes attention where there is no cache, and `dispatch` brings tokens to their experts and
    back.
    """

    dtype: jnp.dtype = jnp.float32
    remat: Remat = "none"
    unroll: int = 1
    constrain: Constrain = lambda x, axes: x
    parts: Callable[[str], int] = lambda axis: 1
    attend: Attend = attend
    dispatch: Dispatch = dispatch_here

    def summed(self, x: jax.Array) -> jax.Array:
        """What devices that share heads or MLPs have each a part of, as the residual stream lies.

        Where rows are split already, the compiler would gather them before it splits them further:
        it is told of the state between.
        """
        x = self.constrain(x, WHOLE) if self.parts("sequence") > 1 else x
        return self.constrain(x, RESIDUAL)

    def vocabulary(self, table: jax.Array) -> jax.Array:
        """A table [vocab, embed] for use: in the compute dtype, and whole along `embed`.

        A look-up in a table that is split along `embed` would leave activations split along it too,
        and the compiler would replicate them on every device to get from there to rows.

        A vocabulary that the mesh does not split evenly gets rows of zeros at its end. At rest such
        a table is split along `embed` by the mesh axes of both, so that one exchange between the
        devices that share the vocabulary brings each of them its rows.
        """
        table = table.astype(self.dtype)
        missing = -len(table) % self.parts("vocab")
        if missing:
            along_embed = (None, "vocab")
            table = jnp.pad(self.constrain(table, along_embed), ((0, missing), (0, 0)))
            table = self.constrain(table, along_embed)
        return self.constrain(table, ("vocab", None))

    def spread(self, weights: jax.Array, axis: int) -> jax.Array:
        """Weights with kv_heads at `axis`, each repeated until all devices that share have one.

        Those that are repeated are split along `embed` at rest, and gathered first.
        """
        copies = self.parts("kv_heads") // weights.shape[axis]
        if copies <= 1:
            return weights
        names = [None] * weights.ndim
        weights = jnp.repeat(self.constrain(weights, tuple(names)), copies, axis)
        names[axis] = "kv_heads"
        return self.constrain(weights, tuple(names))


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    `positions` say what a token may see; of a model with a prefix they are blocks, and `places` are
    beside them.
    """

    positions: jax.Array
    segment_ids: jax.Array
    execution: Execution
    cache: KVCache | None = None
    slots: jax.Array | None = None
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    places: jax.Array | None = None
    turns: dict[HeadKind, Turns] = dataclasses.field(default_factory=dict)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout (Srivastava et al. 2014), by a rate to within 2^-17; the identity at 0.

    Two elements share a draw of 32 bits: with one each, the draws of a small model on a CPU took a
    sixth of its step.
    """
    if rate == 0.0:
        return x
    drawn = jax.random.bits(key, (*x.shape[:-1], math.ceil(x.shape[-1] / 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(drawn, jnp.uint16).reshape(*x.shape[:-1], -1)
    keep = halves[..., : x.shape[-1]] >= round(rate * 2**16)
    return jnp.where(keep, x / (1.0 - rate), 0)


class Block(nnx.Module):
    """One layer: attention and MLP on the residual stream."""

    def __init__(
        self,
        layer: specs.Layer,
        width: int,
        *,
        initialization: Initialization,
        residual_scale: jax.Array,
        rngs: nnx.Rngs,
    ):
        options = {
            "initialization": initialization,
            "residual_scale": residual_scale,
            "rngs": rngs,
        }
        self.arrangement, self.residual_scale = layer.arrangement, layer.residual_scale
        for name in layer.norms:
            setattr(self, name, Norm(layer.norm, ("norm", width)))
        kind = Latent if isinstance(layer.mixer, specs.Latent) else Attention
        self.mixer = kind(layer.mixer, width, **options)
        kind = Experts if isinstance(layer.mlp, specs.Experts) else Mlp
        self.mlp = kind(layer.mlp, width, **options)

    def mix(
        self, x: jax.Array, context: Context, cache: LayerCache | None, index: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention over this layer's tokens, or over the cache once they are written to it.

        The cache is that of all repetitions of this layer, of which this is number `index`.
        """
        mixer, execution = self.mixer, context.execution
        turns = context.turns.get(mixer.spec.turning)
        q, kept = mixer.project(x, turns, execution.spread)
        q = execution.constrain(q, ("batch", "sequence", "heads", None))
        kv_axes = ("batch", "sequence", "kv_heads", None)
        kept = tuple(execution.constrain(each, kv_axes) for each in kept)
        keys = Keys(kept, context.positions, context.segment_ids)
        mix, compute = mixer.mix, execution.attend
        if cache is not None:
            mix, compute = mixer.recall, attend
            keys, cache = extend_layer(context.cache, cache, index, context.slots, keys)
        places = {
            "positions": context.positions,
            "kv_positions": keys.positions,
            "segment_ids": context.segment_ids,
            "kv_segment_ids": keys.segment_ids,
            # Block 0, which all see by its number too; but kernels that know rows alone must know.
            "prefix_length": None if context.places is None else jnp.ones(len(x), jnp.int32),
        }
        kept = tuple(each.astype(q.dtype) for each in keys.kept)
        return mix(q, kept, functools.partial(compute, **places)), cache

    def normed(self, name: str, x: jax.Array) -> jax.Array:
        """x after the norm of that name, where the arrangement has it."""
        norm: Norm | None = getattr(self, name, None)
        return x if norm is None else norm(x)

    def feed(self, x: jax.Array, context: Context) -> tuple[jax.Array, Statistics | None]:
        """The MLP; with what its router did where it is one of experts."""
        if isinstance(self.mlp, Experts):
            return self.mlp(x, context.segment_ids > 0, context.execution.dispatch)
        return self.mlp(x), None

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        cache: LayerCache | None,
        index: jax.Array | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None, Statistics | None]:
        keys = (None, None) if key is None else jax.random.split(key)
        constrain, summed = context.execution.constrain, context.execution.summed
        read = self.normed("mixer_norm", x)
        mixed, cache = self.mix(constrain(read, WHOLE), context, cache, index)
        mixed = self.normed("mixer_out_norm", summed(mixed))
        mixed = dropout(mixed, context.dropout, keys[0])
        if self.arrangement in ("parallel", "shared"):
            read = read if self.arrangement == "shared" else self.normed("mlp_norm", x)
            x += mixed
        else:
            x = self.normed("mixer_sum_norm", self.kept(x, read) + mixed)
            read = self.normed("mlp_norm", x)
        fed, statistics = self.feed(constrain(read, WHOLE), context)
        fed = self.normed("mlp_out_norm", summed(fed))
        fed = dropout(fed, context.dropout, keys[1])
        x = self.normed("mlp_sum_norm", self.kept(x, read) + fed)
        return constrain(x, RESIDUAL), cache, statistics

    def kept(self, x: jax.Array, read: jax.Array) -> jax.Array:
        """That to which a branch that read `read` is added."""
        return self.residual_scale * read if self.arrangement == "normed" else x


class Period(nnx.Module):
    """The layers of one period; where stacked, each parameter has a leading axis of `repeat`."""

    def __init__(self, layers: tuple[specs.Layer, ...], *, first: jax.Array, **options: object):
        self.size = len(layers)
        initialization, depth = options["initialization"], options.pop("depth")
        for i, layer in enumerate(layers):
            scale = initialization.residual_scale(depth, first + i)
            setattr(self, f"layer_{i}", Block(layer, residual_scale=scale, **options))

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        caches: tuple[LayerCache, ...] | None,
        index: jax.Array | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, tuple[LayerCache, ...] | None, Routing]:
        keys = [None] * self.size if key is None else jax.random.split(key, self.size)
        written, routing = [], {}
        for i in range(self.size):
            block: Block = getattr(self, f"layer_{i}")
            cache = None if caches is None else caches[i]
            x, cache, statistics = block(x, context, cache, index, keys[i])
            written.append(cache)
            if statistics is not None:
                routing[f"layer_{i}"] = statistics
        return x, None if caches is None else tuple(written), routing


def stack(
    repeat: int, period: tuple[specs.Layer, ...], first: int, rngs: nnx.Rngs, **options: object
) -> Period:
    """`repeat` periods in one module, with their parameters stacked on a leading axis."""

    @nnx.split_rngs(splits=repeat)
    @nnx.vmap(in_axes=(0, 0), out_axes=0)
    def make(rngs: nnx.Rngs, first: jax.Array) -> Period:
        return Period(period, first=first, rngs=rngs, **options)

    return make(rngs, first + len(period) * jnp.arange(repeat, dtype=jnp.float32))


def scan_layers(
    stacked: Period,
    x: jax.Array,
    context: Context,
    caches: tuple[LayerCache, ...] | None,
    key: jax.Array | None,
    repeat: int,
) -> tuple[jax.Array, tuple[LayerCache, ...] | None, Routing]:
    """Runs the stacked periods one after the other, as one loop in the compiled program.

    The loop carries the whole cache, of which each period changes its part in place: as an input
    and an output of each period, all of it would be copied at every token.
    """
    graphdef, params = nnx.split(stacked)

    def body(carry: tuple, per_layer: tuple) -> tuple:
        x, caches = carry
        params, index, key = per_layer
        x, caches, routing = nnx.merge(graphdef, params)(x, context, caches, index, key)
        return (x, caches), routing

    remat = context.execution.remat
    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    keys = None if key is None else jax.random.split(key, repeat)
    indices = None if caches is None else jnp.arange(repeat)
    unroll = min(context.execution.unroll or repeat, repeat)
    carry, routing = jax.lax.scan(body, (x, caches), (params, indices, keys), unroll=unroll)
    return *carry, routing


class Transformer(nnx.Module):
    """Embeddings, groups of layers, a final norm, and the head of the spec's `output`."""

    def __init__(self, spec: specs.ModelSpec, initialization: Initialization, rngs: nnx.Rngs):
        self.spec = spec
        std = initialization.base_std
        options = {"initialization": initialization, "rngs": rngs}
        stream, narrow = (("embed", spec.width),), (("narrow", spec.embedding_width),)
        table = normal(rngs.params(), (spec.vocab_size, spec.table_width), std)
        self.embedding = param(table, ("vocab", "embed"))
        if spec.embedding_width is not None:
            self.widen = Projection(narrow, stream, bias=False, **options)
            self.narrow = Projection(stream, narrow, bias=False, **options)
        if spec.embedding_norm is not None:
            self.embedding_norm = Norm(spec.embedding_norm, ("norm", spec.width))
        if spec.learned_positions:
            rows = spec.max_positions + spec.position_offset
            table = normal(rngs.params(), (rows, spec.width), std)
            self.position_embedding = param(table, ("positions", "embed"))
        first = 0
        for i, (repeat, period) in enumerate(spec.layers):
            group = stack(
                repeat,
                period,
                first,
                rngs,
                depth=spec.depth,
                width=spec.width,
                initialization=initialization,
            )
            setattr(self, f"group_{i}", group)
            first += repeat * len(period)
        if spec.final_norm is not None:
            self.final_norm = Norm(spec.final_norm, ("norm", spec.width))
        inputs = (("embed", spec.table_width),)
        if spec.output == "scalar":
            # Stiennon et al. (2020, appendix B) draw it so that scores begin with unit variance.
            drawn = Initialization(std=(spec.table_width + 1) ** -0.5)
            self.score_head = Projection(
                inputs, (("score", 1),), bias=True, initialization=drawn, rngs=rngs
            )
        elif not spec.tied:
            outputs = (("vocab", spec.vocab_size),)
            self.head = Projection(inputs, outputs, bias=spec.head_bias, **options)

    def embed(self, tokens: jax.Array, positions: jax.Array, execution: Execution) -> jax.Array:
        """int [B, S] -> [B, S, embed]."""
        x = execution.vocabulary(self.embedding[...])[tokens]
        if self.spec.embedding_scale != 1.0:
            x *= jnp.asarray(self.spec.embedding_scale, x.dtype)
        if self.spec.embedding_width is not None:
            x = self.widen(x)
        if self.spec.learned_positions:
            table = self.position_embedding[...].astype(execution.dtype)
            rows = positions + self.spec.position_offset
            x += execution.constrain(table, ("positions", None))[rows]
        if self.spec.embedding_norm is not None:
            x = self.embedding_norm(x)
        return execution.constrain(x, RESIDUAL)

    def turns(self, context: Context) -> dict[HeadKind, Turns]:
        """The rotations of every kind of head that the layers have, once for all layers."""
        turning = [layer.mixer.turning for layer in self.spec.each_layer()]
        kinds = dict.fromkeys(kind for kind in turning if kind is not None)
        positions = {1: context.positions}
        if context.places is not None:
            positions = {1: context.places}
            positions[2] = jnp.stack([context.places, context.positions], axis=-1)
        dtype = context.execution.dtype
        return {
            (rotary, size): turns_of(positions[rotary.planes], rotary, size, dtype)
            for rotary, size in kinds
        }

    def __call__(
        self, tokens: jax.Array, context: Context, key: jax.Array | None
    ) -> tuple[jax.Array, KVCache | None, Routing]:
        keys = [None] * (len(self.spec.layers) + 1)
        if key is not None:
            keys = jax.random.split(key, len(keys))
        places = context.positions if context.places is None else context.places
        x = self.embed(tokens, places, context.execution)
        x = dropout(x, context.embedding_dropout, keys[-1])
        context = dataclasses.replace(context, turns=self.turns(context))
        cache, written, routing = context.cache, [], {}
        for i, (repeat, _) in enumerate(self.spec.layers):
            caches = None if cache is None else cache.layers[i]
            group = getattr(self, f"group_{i}")
            x, caches, routed = scan_layers(group, x, context, caches, keys[i], repeat)
            written.append(caches)
            if routed:
                routing[f"group_{i}"] = routed
        if self.spec.final_norm is not None:
            x = self.final_norm(x)
        if self.spec.embedding_width is not None:
            x = self.narrow(x)
        x = context.execution.constrain(x, WHOLE)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=tuple(written))
        return x, cache, routing
