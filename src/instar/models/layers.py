"""The parts of a Transformer, as NNX modules that hold parameters and nothing else."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from instar.models import spec as specs
from instar.models.matmul import matmul
from instar.models.parameters import Initialization, normal, param

Sides = tuple[tuple[str, int], ...]
Turns = tuple[jax.Array, jax.Array]
Spread = Callable[[jax.Array, int], jax.Array]  # (weights, the axis of heads) -> more heads


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axes, computed in at least float32."""

    def __init__(self, spec: specs.Norm, *sides: tuple[str, int]):
        names, sizes = zip(*sides, strict=True)
        self.spec, self.axes = spec, tuple(range(-len(sides), 0))
        self.scale = param(jnp.full(sizes, 1 - spec.offset, jnp.float32), names)
        if spec.bias:
            self.bias = param(jnp.zeros(sizes), names)

    def __call__(self, x: jax.Array, spread: Spread | None = None) -> jax.Array:
        """The normed x, with parameters that `spread` repeats along their first axis."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.spec.kind == "layer":
            wide -= wide.mean(self.axes, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(self.axes, keepdims=True) + self.spec.epsilon)
        scale = self.scale[...] + self.spec.offset if self.spec.offset else self.scale[...]
        wide *= scale if spread is None else spread(scale, 0)
        if self.spec.bias:
            wide += self.bias[...] if spread is None else spread(self.bias[...], 0)
        return wide.astype(x.dtype)


class Projection(nnx.Module):
    """A matrix product from named input axes to named output axes, with an optional bias."""

    def __init__(
        self,
        inputs: Sides,
        outputs: Sides,
        *,
        bias: bool,
        initialization: Initialization,
        rngs: nnx.Rngs,
        scale: jax.Array | float = 1.0,
    ):
        names, sizes = zip(*inputs + outputs, strict=True)
        self.contracted = len(inputs)
        fan_in = math.prod(size for _, size in inputs)
        kernel = normal(rngs.params(), sizes, initialization.kernel_std(fan_in)) * scale
        self.kernel = param(kernel, names, names[: len(inputs)])
        outer = slice(len(inputs), None)
        self.bias = param(jnp.zeros(sizes[outer]), names[outer]) if bias else None

    def __call__(self, x: jax.Array, spread: Spread | None = None) -> jax.Array:
        """The product of x, with weights that `spread` repeats along their first output axis."""
        kernel, n = self.kernel[...].astype(x.dtype), self.contracted
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        if spread is not None:
            kernel, bias = spread(kernel, n), None if bias is None else spread(bias, 0)
        rows, outputs = x.shape[: x.ndim - n], kernel.shape[n:]
        size = math.prod(kernel.shape[:n])
        # Rows stay apart: a mesh that splits batch and sequence cannot split the two merged.
        y = matmul(x.reshape(*rows, size), kernel.reshape(size, -1)).reshape(rows + outputs)
        return y if bias is None else y + bias


def frequencies_of(rotary: specs.Rotary, size: int) -> np.ndarray:
    """By how many radians each pair of the `size` rotated elements turns a position: [size/2]."""
    frequencies = rotary.theta ** (-np.arange(0, size, 2) / size)
    if rotary.rounded:
        frequencies = frequencies.astype(np.float16).astype(np.float64)
    scaling = rotary.scaling
    if isinstance(scaling, specs.LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, specs.Llama3Scaling):
        waves = scaling.positions * frequencies / (2 * np.pi)  # in the original positions
        kept = np.clip((waves - scaling.low) / (scaling.high - scaling.low), 0, 1)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies


def turns_of(positions: jax.Array, rotary: specs.Rotary, head_dim: int, dtype: jnp.dtype) -> Turns:
    """The cosines and sines by which heads turn at int positions [B, S]: each [B, S, 1, D/2].

    D is the rotated part of `head_dim`. Where that has two planes, `positions` are [B, S, 2], one
    for each, and the cosines and sines [B, S, 1, 2, D/4].
    """
    size = int(head_dim * rotary.fraction) // rotary.planes
    wide = jnp.promote_types(dtype, jnp.float32)
    places = positions[:, :, None, ..., None].astype(wide)
    angles = places * frequencies_of(rotary, size).astype(wide)

    def turn(angles: jax.Array) -> Turns:
        return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)

    # XLA's CPU backend would compute them again at every use in every head: a loop keeps it from
    # that. Elsewhere the loop would only cost.
    return jax.lax.platform_dependent(angles, cpu=lambda x: jax.lax.map(turn, x), default=turn)


def rotate(x: jax.Array, turns: Turns, style: Literal["half", "interleaved"]) -> jax.Array:
    """Rotary positions: x [B, S, heads, D] turned by `turns_of` (Su et al. 2021, eq. 34)."""
    cos, sin = turns
    planes = cos.shape[3:-1]  # () or (2,)
    size = 2 * math.prod(cos.shape[3:])
    turned, rest = x[..., :size], x[..., size:]
    turned = turned.reshape(*x.shape[:-1], *planes, -1)
    if style == "half":
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.reshape(*x.shape[:-1], size)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


class Attention(nnx.Module):
    """The parameters of attention: queries, keys and values in, the mixed values out."""

    def __init__(
        self,
        spec: specs.Attention,
        width: int,
        *,
        initialization: Initialization,
        residual_scale: jax.Array,
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        embed = (("embed", width),)
        head_dim = ("head_dim", spec.head_dim)

        def projection(
            inputs: Sides, outputs: Sides, bias: bool, scale: jax.Array | float = 1.0
        ) -> Projection:
            return Projection(
                inputs, outputs, bias=bias, initialization=initialization, rngs=rngs, scale=scale
            )

        self.query = projection(embed, (("heads", spec.heads), head_dim), spec.bias)
        self.key = projection(embed, (("kv_heads", spec.kv_heads), head_dim), spec.bias)
        self.value = projection(embed, (("kv_heads", spec.kv_heads), head_dim), spec.bias)
        self.out = projection(
            (("heads", spec.heads), head_dim), embed, spec.out_bias, residual_scale
        )
        if spec.qk_norm is not None:
            whole = spec.qk_norm_over == "all"
            heads, kv_heads = ("heads", spec.heads), ("kv_heads", spec.kv_heads)
            self.query_norm = Norm(spec.qk_norm, *([heads] if whole else []), head_dim)
            self.key_norm = Norm(spec.qk_norm, *([kv_heads] if whole else []), head_dim)

    def project(
        self, x: jax.Array, turns: Turns | None, spread: Spread | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, S, embed] -> q [B, S, heads, D], k and v [B, S, kv_heads, D]; q and k turned.

        There are more kv_heads than the spec's where `spread` repeats their weights.
        """
        q, k, v = self.query(x), self.key(x, spread), self.value(x, spread)
        if self.spec.qk_norm is not None:
            # Where each key is there as often as the others, their mean square is the same.
            whole = self.spec.qk_norm_over == "all"
            q, k = self.query_norm(q), self.key_norm(k, spread if whole else None)
        if self.spec.rotary is not None:
            style = self.spec.rotary.style
            q, k = rotate(q, turns, style), rotate(k, turns, style)
        return q, k, v


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where gated."""

    def __init__(
        self,
        spec: specs.Mlp,
        width: int,
        *,
        initialization: Initialization,
        residual_scale: jax.Array,
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        embed, mlp = (("embed", width),), (("mlp", spec.width),)
        options = {"bias": spec.bias, "initialization": initialization, "rngs": rngs}
        self.up = Projection(embed, mlp, **options)
        if spec.gated:
            self.gate = Projection(embed, mlp, **options)
        self.down = Projection(mlp, embed, scale=residual_scale, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        activate = ACTIVATIONS[self.spec.activation]
        hidden = activate(self.gate(x)) * self.up(x) if self.spec.gated else activate(self.up(x))
        return self.down(hidden)
