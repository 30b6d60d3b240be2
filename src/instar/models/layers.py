"""The parts of a Transformer, as NNX modules that hold parameters and nothing else."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from instar.models import spec as specs
from instar.models.matmul import matmul
from instar.models.parameters import Initialization, normal, param

Sides = tuple[tuple[str, int], ...]
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
