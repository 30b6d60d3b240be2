"""How the next token is chosen: settings of each row as arrays, so that no value compiles anew."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from instar.errors import UserError
from instar.generation import filters


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn, in the order in which the settings apply.

    1. `repetition_penalty` moves tokens of the prompt and of what was generated down (1: off).
    2. `temperature` divides the logits; 0 takes the most probable token, and ignores what follows.
    3. `top_k` keeps the k most probable tokens (0: all).
    4. `top_p` keeps the fewest of those whose probabilities, renormalised, sum to it (1: all).
    5. `min_p` keeps those at least so many times as probable as the best (0: all).

    There are at most `max_new_tokens`, and no more than the model's positions leave.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raises UserError where a value makes no sense."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must not be negative ({self.temperature})")
        if self.top_k < 0:
            raise UserError(f"top_k must not be negative ({self.top_k})")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be in [0, 1], not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty must be positive, not {self.repetition_penalty}")


@dataclass(frozen=True)
class Mode:
    """The parts of sampling that any row of a batch needs; the others are not compiled in.

    A row's tokens do not depend on it: a part that a row does not need leaves its scores alone.
    """

    draws: bool
    filters: bool
    penalizes: bool

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig]) -> "Mode":
        drawn = [c for c in configs if c.temperature > 0]
        return cls(
            draws=bool(drawn),
            filters=any(c.top_k > 0 or c.top_p < 1 or c.min_p > 0 for c in drawn),
            penalizes=any(c.repetition_penalty != 1 for c in configs),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSettings:
    """The settings of each row, arrays [B]: float32, `top_k` int32 and `seed` uint32."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], seeds: Sequence[int]) -> "RowSettings":
        """The settings as NumPy arrays, a row for each config and its seed."""

        def column(name: str) -> np.ndarray:
            values = [getattr(config, name) for config in configs]
            return np.asarray(values, np.int32 if name == "top_k" else np.float32)

        names = [field.name for field in dataclasses.fields(cls) if field.name != "seed"]
        return cls(**{name: column(name) for name in names}, seed=np.asarray(seeds, np.uint32))


def choose(
    logits: jax.Array,
    settings: RowSettings,
    index: jax.Array,
    seen: jax.Array | None,
    mode: Mode,
) -> jax.Array:
    """The next token of each row: int32 [B].

    Args:
      logits: float32 [B, V].
      index: int32 [B], how many tokens each row has drawn: with its seed, its source of randomness.
      seen: bool [B, V], the tokens that `repetition_penalty` is for; None where `mode` has none.
    """
    if mode.penalizes:
        logits = filters.penalize(logits, seen, settings.repetition_penalty)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not mode.draws:
        return greedy
    cold = settings.temperature == 0
    # The best score is 0, so that the lowest temperature does not make it infinite.
    scores = logits - logits.max(-1, keepdims=True)
    scores /= jnp.where(cold, 1, settings.temperature)[:, None]
    if mode.filters:
        scores = jnp.where(filters.top_k(scores, settings.top_k), scores, -jnp.inf)
        scores = jnp.where(filters.top_p(scores, settings.top_p), scores, -jnp.inf)
        scores = jnp.where(filters.min_p(scores, settings.min_p), scores, -jnp.inf)
    return jnp.where(cold, greedy, filters.draw(scores, uniforms(settings.seed, index)))


def uniforms(seeds: jax.Array, index: jax.Array) -> jax.Array:
    """A number of [0, 1) for each pair of a seed and an index: float32 [B]."""

    def uniform(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
        return jax.random.uniform(key, dtype=jnp.float32)

    return jax.vmap(uniform)(seeds, index)
