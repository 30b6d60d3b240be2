"""Layers of experts: which of them reads which token, and their products, with no token dropped.

Tokens are sorted by expert, so that each expert multiplies one group of rows, of whatever size.
A `Dispatch` says where that happens: `dispatch_here` on one device, `instar.sharding.experts` on a
mesh.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from instar.models import spec as specs
from instar.models.layers import ACTIVATIONS, Mlp, Projection
from instar.models.matmul import matmul
from instar.models.parameters import Initialization, normal, param

Kernels = dict[str, jax.Array]
# What a router did with the tokens of a batch, summed over those that are real: `load` [experts],
# how many chose each expert; `probability` [experts], the sum of their normalised scores;
# `log_z_squared`, that of squared log normalisers of the logits; `tokens`, how many there are.
Statistics = dict[str, jax.Array]
# (x [B, S, embed], chosen int [B, S, top_k], weights [B, S, top_k], kernels, spec) -> [B, S, embed]
Dispatch = Callable[[jax.Array, jax.Array, jax.Array, Kernels, specs.Experts], jax.Array]
# (rows [N, embed], sizes int [experts]) -> [N, embed]; see `expert_mlp`
Compute = Callable[[jax.Array, jax.Array], jax.Array]
Product = Callable[[jax.Array, jax.Array], jax.Array]

# Added to a sum of scores before it divides them: sigmoids may all be 0 (DeepSeek-V3's code).
LEAST_SUM = 1e-20


# --- The choice ---------------------------------------------------------------------------------


def route(
    logits: jax.Array, bias: jax.Array | None, spec: specs.Experts, real: jax.Array
) -> tuple[jax.Array, jax.Array, Statistics]:
    """The experts of each token, in at least float32.

    Args:
      logits: [B, S, experts]. bias: [experts], added for the choice alone, or None.
      real: bool [B, S]; the rest goes to no expert and counts nowhere.

    Returns:
      chosen: int32 [B, S, top_k], `spec.count` where a token is not real.
      weights: [B, S, top_k], of the outputs of the chosen.
      statistics: see `Statistics`.
    """
    scores = jax.nn.softmax(logits) if spec.score == "softmax" else jax.nn.sigmoid(logits)
    preferred = jax.lax.stop_gradient(scores)
    preferred = preferred if bias is None else preferred + bias
    chosen = best_of(in_best_groups(preferred, spec), spec.top_k)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if spec.normalise:
        weights /= weights.sum(-1, keepdims=True) + LEAST_SUM
    weights *= spec.scale
    chosen = jnp.where(real[..., None], chosen, spec.count)
    shares = scores if spec.score == "softmax" else scores / scores.sum(-1, keepdims=True)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    statistics = {
        "load": jax.nn.one_hot(chosen, spec.count, dtype=logits.dtype).sum((0, 1, 2)),
        "probability": jnp.where(real[..., None], shares, 0).sum((0, 1)),
        "log_z_squared": jnp.where(real, jnp.square(log_z), 0).sum(),
        "tokens": real.sum(dtype=logits.dtype),
    }
    return chosen, weights, statistics


def in_best_groups(scores: jax.Array, spec: specs.Experts) -> jax.Array:
    """The scores [..., experts], -inf in all but the groups with the best two (`spec.Experts`)."""
    if spec.groups == 1:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], spec.groups, -1)
    best_two = jnp.take_along_axis(grouped, best_of(grouped, 2), axis=-1)
    best = best_of(best_two.sum(-1), spec.top_groups)
    inside = jax.nn.one_hot(best, spec.groups, dtype=bool).any(-2)
    return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(scores.shape)


def best_of(scores: jax.Array, count: int) -> jax.Array:
    """The indices of the `count` largest scores [..., experts], from the largest on: int32.

    `jax.lax.top_k` says the same, but for it XLA gathers the scores of a batch from all devices.
    """
    chosen = []
    for _ in range(count):
        chosen.append(jnp.argmax(scores, axis=-1).astype(jnp.int32))
        taken = jax.nn.one_hot(chosen[-1], scores.shape[-1], dtype=bool)
        scores = jnp.where(taken, -jnp.inf, scores)
    return jnp.stack(chosen, axis=-1)


# --- The products -------------------------------------------------------------------------------


def expert_mlp(
    rows: jax.Array, sizes: jax.Array, kernels: Kernels, activation: str, platform: str
) -> jax.Array:
    """Each row through the MLP of its expert: the first `sizes[0]` rows by expert 0, and so on.

    XLA's CPU backend makes of `ragged_dot` a product of every expert with every row. There rows are
    laid into blocks of one expert instead; both forms give the same numbers.

    Args:
      rows: [N, embed]. sizes: int [experts]; where they sum to less than N, the last rows are of no
        expert, and become 0.
      kernels: `up` [experts, embed, mlp], `down` [experts, mlp, embed], and `gate`, like `up`,
        where the MLPs are gated.
      platform: "cpu", "gpu" or "tpu".

    Returns:
      [N, embed] in the type of `rows`.
    """
    through = functools.partial(_mlp, kernels=kernels, activation=activation)
    return (by_blocks if platform == "cpu" else by_ragged_dot)(rows, sizes, through)


def _mlp(rows: jax.Array, product: Product, *, kernels: Kernels, activation: str) -> jax.Array:
    act, up = ACTIVATIONS[activation], product(rows, kernels["up"])
    hidden = act(product(rows, kernels["gate"])) * up if "gate" in kernels else act(up)
    return product(hidden, kernels["down"])


def by_ragged_dot(
    rows: jax.Array, sizes: jax.Array, through: Callable[[jax.Array, Product], jax.Array]
) -> jax.Array:
    """Products by `jax.lax.ragged_dot`, which promises nothing of the rows outside the groups."""
    inside = (jnp.arange(len(rows)) < sizes.sum())[:, None]
    result = through(jnp.where(inside, rows, 0), lambda x, y: jax.lax.ragged_dot(x, y, sizes))
    return jnp.where(inside, result, 0)


def by_blocks(
    rows: jax.Array, sizes: jax.Array, through: Callable[[jax.Array, Product], jax.Array]
) -> jax.Array:
    """Batched products of blocks of rows, each with a copy of the matrix of the block's expert.

    A block has N / experts rows, rounded up: no more than twice as many rows are multiplied, and
    matrices copied, as there are, however uneven the groups, and never more matrices than rows.
    """
    count, experts = len(rows), len(sizes)
    block = -(-count // experts)
    groups = min(count, experts)
    blocks = (count - groups) // block + groups  # the most that `groups` groups can fill

    # Where each group starts among the rows and among the blocks, and whose each block is.
    sizes = sizes.astype(jnp.int32)
    filled = -(-sizes // block)
    first_row, first_block = _before(sizes), _before(filled)
    owner = jnp.minimum(group_of(filled, blocks), experts - 1)
    inner = (jnp.arange(blocks) - first_block[owner])[:, None] * block + jnp.arange(block)
    inside = inner < sizes[owner][:, None]
    source = jnp.where(inside, first_row[owner][:, None] + inner, count)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return matmul(x, y[owner])

    # The copies of the matrices are made again in the backward pass.
    product = jax.checkpoint(product, prevent_cse=False)
    laid = rows.at[source].get(mode="fill", fill_value=0)
    result = through(laid, product).reshape(blocks * block, -1)
    group = jnp.minimum(group_of(sizes, count), experts - 1)
    inner = jnp.arange(count) - first_row[group]
    target = jnp.where(inner < sizes[group], first_block[group] * block + inner, blocks * block)
    return result.at[target].get(mode="fill", fill_value=0)


def group_of(sizes: jax.Array, count: int) -> jax.Array:
    """The group that each of `count` rows is in, int [count], where groups follow one another.

    Rows after the last group are in group len(sizes).
    """
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(count), side="right").astype(jnp.int32)


def _before(sizes: jax.Array) -> jax.Array:
    """How much lies before each group."""
    return jnp.cumsum(sizes, dtype=sizes.dtype) - sizes


# --- There and back -----------------------------------------------------------------------------


def dispatch(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: int, compute: Compute
) -> jax.Array:
    """Sorts tokens by expert, lets `compute` make something of them, and adds it up by token.

    Args:
      x: [B, S, embed]. chosen: int [B, S, top_k], `experts` for none. weights: likewise.

    Returns:
      [B, S, embed].
    """
    tokens, top_k = x.reshape(-1, x.shape[-1]), chosen.shape[-1]
    wanted = chosen.reshape(-1)
    order = jnp.argsort(wanted)
    sizes = jnp.sum(wanted[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    rows = jnp.repeat(tokens, top_k, axis=0).at[order].get(unique_indices=True)
    result = compute(rows, sizes).at[jnp.argsort(order)].get(unique_indices=True)
    result = result.reshape(-1, top_k, x.shape[-1])
    weights = weights.reshape(-1, top_k).astype(x.dtype)
    return jnp.einsum("tkd,tk->td", result, weights).reshape(x.shape)


def dispatch_here(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, kernels: Kernels, spec: specs.Experts
) -> jax.Array:
    """The `Dispatch` of one device."""

    def compute(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        activation = spec.expert.activation
        return expert_mlp(rows, sizes, kernels, activation, jax.default_backend())

    return dispatch(x, chosen, weights, spec.count, compute)


# --- The parameters -----------------------------------------------------------------------------


class Stack(nnx.Module):
    """The matrices of all experts, from a named axis to another: [experts, inputs, outputs]."""

    def __init__(
        self,
        count: int,
        inputs: tuple[str, int],
        outputs: tuple[str, int],
        *,
        initialization: Initialization,
        rngs: nnx.Rngs,
        scale: jax.Array | float = 1.0,
    ):
        (before, fan_in), (after, fan_out) = inputs, outputs
        std = initialization.kernel_std(fan_in)
        kernel = normal(rngs.params(), (count, fan_in, fan_out), std) * scale
        self.kernel = param(kernel, ("experts", before, after), (before,))


class Experts(nnx.Module):
    """Several MLPs that read the tokens that a router gives to each; and one that reads all."""

    def __init__(
        self,
        spec: specs.Experts,
        width: int,
        *,
        initialization: Initialization,
        residual_scale: jax.Array,
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        options = {"initialization": initialization, "rngs": rngs}
        embed, mlp = ("embed", width), ("mlp", spec.expert.width)
        self.router = Projection((embed,), (("router", spec.count),), bias=False, **options)
        if spec.choice_bias:
            self.choice_bias = param(jnp.zeros(spec.count), ("router",), trained=False)
        self.up = Stack(spec.count, embed, mlp, **options)
        if spec.expert.gated:
            self.gate = Stack(spec.count, embed, mlp, **options)
        self.down = Stack(spec.count, mlp, embed, scale=residual_scale, **options)
        if spec.shared is not None:
            self.shared = Mlp(spec.shared, width, residual_scale=residual_scale, **options)

    def __call__(
        self, x: jax.Array, real: jax.Array, dispatch: Dispatch
    ) -> tuple[jax.Array, Statistics]:
        """x [B, S, embed], of which those tokens count that are `real` bool [B, S]."""
        logits = self.router(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        bias = self.choice_bias[...] if self.spec.choice_bias else None
        chosen, weights, statistics = route(logits, bias, self.spec, real)
        names = ("up", "gate", "down") if self.spec.expert.gated else ("up", "down")
        kernels = {name: getattr(self, name).kernel[...].astype(x.dtype) for name in names}
        y = dispatch(x, chosen, weights, kernels, self.spec)
        return y if self.spec.shared is None else y + self.shared(x), statistics
