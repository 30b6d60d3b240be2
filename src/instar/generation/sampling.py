"""Sampling continuations with a cache of keys and values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from instar.errors import UserError
from instar.models.cache import KVCache, init_cache
from instar.models.language_model import LanguageModel, Params

# (params, tokens, lengths, key) -> (new tokens, how many)
Sampler = Callable[[Params, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn.

    `temperature` 0 takes the most probable token. `top_k` keeps the k most probable (0: all), then
    `top_p` the fewest whose probabilities sum to it (Holtzman et al. 2020, section 3.1).
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise UserError(f"temperature must not be negative ({self.temperature})")
        if self.top_k < 0:
            raise UserError(f"top_k must not be negative ({self.top_k})")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}")


def choose(logits: jax.Array, key: jax.Array, config: SamplingConfig) -> jax.Array:
    """The next token of each row: float [B, V] -> int32 [B]."""
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.temperature
    if config.top_k:
        kth = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        kept = jnp.where(before < config.top_p, ordered, jnp.inf)
        logits = jnp.where(logits < kept.min(-1, keepdims=True), -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def make_sampler(model: LanguageModel, config: SamplingConfig, end_id: int) -> Sampler:
    """The compiled function (params, tokens, lengths, key) -> (new tokens, how many).

    Prompts are int32 [B, P], right-padded, of `lengths` int32 [B]. New tokens are int32
    [B, max_new_tokens] up to and with `end_id`, and 0 after it. Generation ends early when all rows
    have ended. Prompt and new tokens together must not exceed the model's positions.
    """
    total = config.max_new_tokens

    def read(
        params: Params, tokens: jax.Array, positions: jax.Array, real: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        hidden, aux = model.apply(
            params, tokens, positions=positions, segment_ids=real.astype(jnp.int32), cache=cache
        )
        return hidden, aux["cache"]

    @jax.jit
    def sample(
        params: Params, tokens: jax.Array, lengths: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        batch, width = tokens.shape
        cache = init_cache(model.spec, batch, width + total, model.execution.dtype)
        positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
        hidden, cache = read(params, tokens, positions, positions < lengths[:, None], cache)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        head = model.head(params)

        def unfinished(carry: tuple) -> jax.Array:
            step, _, _, alive, _, _ = carry
            return (step < total) & alive.any()

        def body(carry: tuple) -> tuple:
            step, hidden, cache, alive, out, counts = carry
            token = choose(head(hidden[:, 0]), jax.random.fold_in(key, step), config)
            out = out.at[:, step].set(jnp.where(alive, token, 0))
            counts += alive
            alive &= token != end_id
            positions = (lengths + step)[:, None]
            hidden, cache = read(params, token[:, None], positions, alive[:, None], cache)
            return step + 1, hidden, cache, alive, out, counts

        out = jnp.zeros((batch, total), jnp.int32)
        counts, alive = jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
        carry = (jnp.int32(0), last, cache, alive, out, counts)
        _, _, _, _, out, counts = jax.lax.while_loop(unfinished, body, carry)
        return out, counts

    return sample


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token lists as int32 [B, longest], right-padded with 0, and their lengths int32 [B]."""
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths
