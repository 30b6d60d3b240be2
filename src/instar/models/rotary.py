"""Rotary positions: what they are, as pure data, and how heads turn by them."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from instar.errors import UserError

Turns = tuple[jax.Array, jax.Array]


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
class Yarn:
    """Slow rotations slowed by `factor`, fast ones kept (Peng et al. 2023, 2309.00071, section 3).

    A pair that turns more than `fast` times in the `positions` of the first training is kept, one
    that turns less than `slow` times is stretched, and in between the frequency is interpolated.
    What turned is longer by `magnitude`: `attention_factor` where that is given, else the growth of
    logits by `mscale` over that by `mscale_all_dim`, and where one of them is 0 the paper's own.
    """

    factor: float
    positions: int
    fast: float = 32.0
    slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None

    def growth(self, scale: float) -> float:
        """By how much either side of a logit is to grow with the length of texts (eq. 22)."""
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

    @property
    def magnitude(self) -> float:
        """What the cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.growth(self.mscale) / self.growth(self.mscale_all_dim)
        return self.growth(1.0)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, eq. 34) on the first `fraction` of each head.

    `half` rotates element i with i + n/2 (GPT-NeoX, LLaMA); `interleaved` rotates 2i with 2i + 1
    (GPT-J, the paper). `scaling` stretches them to longer texts. With two `planes` one half of a
    head turns by a token's place and the other by its block (see `Prefix`). `rounded` gives the
    frequencies the precision of float16, in which ChatGLM-6B was trained with them.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    style: Literal["half", "interleaved"] = "half"
    scaling: LinearScaling | Llama3Scaling | Yarn | None = None
    planes: Literal[1, 2] = 1
    rounded: bool = False

    def check_heads(self, head_dim: int) -> None:
        """Raises UserError where heads of that size do not turn so."""
        rotated, pairs = self.fraction * head_dim, 2 * self.planes
        if rotated != int(rotated) or int(rotated) % pairs or not 0 < rotated <= head_dim:
            number = "an even number" if pairs == 2 else "a multiple of 4"
            raise UserError(
                f"rotary positions need {number} of rotated elements in each head, and "
                f"head_dim {head_dim} x fraction {self.fraction} gives {rotated:g}"
            )
        if isinstance(self.scaling, Yarn) and self.theta <= 1:
            raise UserError(f"rotary positions need a theta above 1, not {self.theta:g}")


HeadKind = tuple[Rotary, int]  # how a head turns, and its size


def frequencies_of(rotary: Rotary, size: int) -> np.ndarray:
    """By how many radians each pair of the `size` rotated elements turns a position: [size/2]."""
    frequencies = rotary.theta ** (-np.arange(0, size, 2) / size)
    if rotary.rounded:
        frequencies = frequencies.astype(np.float16).astype(np.float64)
    scaling = rotary.scaling
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Yarn):
        kept = _kept_by_yarn(scaling, rotary.theta, size)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    if isinstance(scaling, Llama3Scaling):
        waves = scaling.positions * frequencies / (2 * np.pi)  # in the original positions
        kept = np.clip((waves - scaling.low) / (scaling.high - scaling.low), 0, 1)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies


def _kept_by_yarn(scaling: Yarn, theta: float, size: int) -> np.ndarray:
    """How much of each frequency is kept, from 1 (all) to 0: [size/2].

    It falls with the index of the pair, between two indices that are rounded outwards, as in the
    published code of YaRN and DeepSeek; eq. 18 has it fall with the number of turns.
    """

    def index(turns: float) -> float:
        """Of the pair, in between two as well, that turns so many times in the positions."""
        wave = scaling.positions / (2 * math.pi * turns)
        return size * math.log(wave) / (2 * math.log(theta))

    first = max(math.floor(index(scaling.fast)), 0)
    last = min(math.ceil(index(scaling.slow)), size - 1)
    ramp = (np.arange(size // 2) - first) / ((last - first) or 1e-3)
    return 1 - np.clip(ramp, 0, 1)


def turns_of(positions: jax.Array, rotary: Rotary, head_dim: int, dtype: jnp.dtype) -> Turns:
    """The cosines and sines by which heads turn at int positions [B, S]: each [B, S, 1, D/2].

    Both are multiplied by the `magnitude` of a scaling that has one.

    D is the rotated part of `head_dim`. Where that has two planes, `positions` are [B, S, 2], one
    for each, and the cosines and sines [B, S, 1, 2, D/4].
    """
    size = int(head_dim * rotary.fraction) // rotary.planes
    wide = jnp.promote_types(dtype, jnp.float32)
    places = positions[:, :, None, ..., None].astype(wide)
    angles = places * frequencies_of(rotary, size).astype(wide)
    magnitude = rotary.scaling.magnitude if isinstance(rotary.scaling, Yarn) else 1.0

    def turn(angles: jax.Array) -> Turns:
        cos, sin = magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)
        return cos.astype(dtype), sin.astype(dtype)

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
