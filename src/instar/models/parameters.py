"""Parameters and what is known of them: logical axes, kind, and initialisation."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

Kind = Literal["matrix", "embedding", "vector"]


@dataclass(frozen=True)
class Axes:
    """The logical axes of one parameter, one name for each dimension of its array.

    `contracts` names those that a matrix product sums over. Whether a parameter is a matrix, a
    table of embeddings or a vector (a bias, the scale of a norm, the one row of a scalar head) is
    decided by these names, never by the number of dimensions: stacked layers add one, and separate
    heads another. What is not `trained` is moved by other rules than a gradient's.
    """

    names: tuple[str, ...]
    contracts: tuple[str, ...] = ()
    trained: bool = True

    @property
    def kind(self) -> Kind:
        if ("vocab" in self.names and "embed" in self.names) or "positions" in self.names:
            return "embedding"
        if "score" in self.names:
            return "vector"
        return "matrix" if self.contracts else "vector"

    @property
    def reduction_dims(self) -> tuple[int, ...]:
        """The dimensions of a matrix's input side."""
        return tuple(i for i, name in enumerate(self.names) if name in self.contracts)

    @property
    def output_dims(self) -> tuple[int, ...]:
        """The dimensions of a matrix's output side (neither summed over nor stacked)."""
        return tuple(
            i
            for i, name in enumerate(self.names)
            if name not in self.contracts and name not in ("layers", "experts")
        )


@dataclass(frozen=True)
class Initialization:
    """How fresh parameters are drawn; biases are 0 and scales of norms are 1.

    - `gpt3` (Radford et al. 2019, section 2.3): normal with `std` 0.02; matrices that write into
      the residual stream are divided by sqrt(2 * depth).
    - `opt` (Zhang et al. 2022, section 2.2): the same with `std` 0.006.
    - `depth_scaled` (after Zhang et al. 2019, 1908.11365): normal with std 1/sqrt(fan in);
      matrices of layer l (from 1) that write into the residual stream are divided by sqrt(2 * l).
      Embeddings have `std` 0.02.
    """

    scheme: Literal["gpt3", "opt", "depth_scaled"] = "gpt3"
    std: float | None = None

    @property
    def base_std(self) -> float:
        return self.std if self.std is not None else {"opt": 0.006}.get(self.scheme, 0.02)

    def kernel_std(self, fan_in: int) -> float:
        """The standard deviation of a matrix with `fan_in` inputs."""
        return 1 / math.sqrt(fan_in) if self.scheme == "depth_scaled" else self.base_std

    def residual_scale(self, depth: int, index: jax.Array) -> jax.Array:
        """The factor for matrices that write into the residual stream in layer `index` (from 0)."""
        layers = index + 1.0 if self.scheme == "depth_scaled" else jnp.asarray(float(depth))
        return jax.lax.rsqrt(2.0 * layers)


def normal(key: jax.Array, shape: tuple[int, ...], std: float | jax.Array) -> jax.Array:
    """Float32 draws from N(0, std^2)."""
    return std * jax.random.normal(key, shape, jnp.float32)


def param(
    value: jax.Array, names: tuple[str, ...], contracts: tuple[str, ...] = (), trained: bool = True
) -> nnx.Param:
    """A parameter that carries its logical axes."""
    return nnx.Param(value, axes=Axes(names, contracts, trained))


def logical_axes(state: nnx.State) -> dict:
    """The tree of `Axes` beside a tree of parameters; stacked ones gain the axis `layers`."""

    def axes_of(variable: nnx.Param) -> Axes:
        axes: Axes = variable.get_metadata()["axes"]
        stacked = len(variable.shape) - len(axes.names)
        return dataclasses.replace(axes, names=("layers",) * stacked + axes.names)

    flat = {path: axes_of(variable) for path, variable in nnx.to_flat_state(state)}
    tree: dict = {}
    for path, axes in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = axes
    return tree
