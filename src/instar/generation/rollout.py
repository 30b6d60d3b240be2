"""Responses of a policy to prompts, as arrays: one compiled program, nothing read by the host."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from instar.generation import programs
from instar.generation.programs import NOTHING, Rows
from instar.generation.sampling import Mode, RowSettings
from instar.generation.weights import for_decoding
from instar.models.language_model import LanguageModel, Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Trajectories:
    """Prompts and what was answered. Real tokens are known by lengths alone.

    Attributes:
      tokens: int32 [B, P + T], each prompt with its response right behind it, then zeros.
      prompt_lengths: int32 [B], at least 1.
      responses: int32 [B, T], zeros after the end; the stop token is part of a response.
      lengths: int32 [B], those of the responses, at least 1.
      finished: bool [B], whether a response ended with a stop token.
      log_probs: float32 [B, T], of the responses under what they were drawn from.
    """

    tokens: jax.Array
    prompt_lengths: jax.Array
    responses: jax.Array
    lengths: jax.Array
    finished: jax.Array
    log_probs: jax.Array


def rollout(
    model: LanguageModel,
    params: Params,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    seeds: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 1.0,
) -> Trajectories:
    """Draws a response to each prompt from the policy at a temperature, without any filter.

    A filter such as top-k would make the samples those of another distribution, and estimates of
    the KL divergence wrong. What is drawn depends on the prompt and its seed alone.

    Args:
      prompts: int32 [B, P], right-padded. prompt_lengths: int32 [B]. seeds: uint32 [B].
    """
    model, params = for_decoding(model, params)
    count, width = prompts.shape
    constrain = model.execution.constrain
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)[:, 0]
    everyone = jnp.ones(count, bool)
    state = programs.start(model, last, everyone, None, width + max_new_tokens)
    state = programs.prefill(model, params, state, prompts, prompt_lengths - 1)
    tokens, log_probs = programs.generate(
        model,
        params,
        state,
        _rows(count, seeds, max_new_tokens, stop_ids, temperature),
        everyone,
        steps=max_new_tokens,
        mode=Mode(draws=True, filters=False, penalizes=False),
        tempered=True,
    )[1:]
    tokens, log_probs = (constrain(x, ("batch", None)) for x in (tokens, log_probs))
    lengths = jnp.sum(tokens != NOTHING, axis=1, dtype=jnp.int32)
    responses = jnp.maximum(tokens, 0)
    return Trajectories(
        tokens=join(prompts, prompt_lengths, responses, lengths),
        prompt_lengths=prompt_lengths,
        responses=responses,
        lengths=lengths,
        finished=jnp.isin(tokens, jnp.asarray(stop_ids, jnp.int32)).any(axis=1),
        log_probs=log_probs,
    )


def _rows(
    count: int, seeds: jax.Array, limit: int, stop_ids: tuple[int, ...], temperature: float
) -> Rows:
    def column(value: float, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jnp.full(count, value, dtype)

    settings = RowSettings(
        temperature=column(temperature),
        top_k=column(0, jnp.int32),
        top_p=column(1.0),
        min_p=column(0.0),
        repetition_penalty=column(1.0),
        seed=seeds,
    )
    stops = jnp.tile(jnp.asarray(stop_ids, jnp.int32), (count, 1))
    return Rows(settings, column(limit, jnp.int32), stops)


def join(
    prompts: jax.Array, prompt_lengths: jax.Array, responses: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Each prompt with its response right behind it: int32 [B, P + T], zeros after both."""
    width = prompts.shape[1]
    place = jnp.arange(width + responses.shape[1])[None]
    start, end = prompt_lengths[:, None], (prompt_lengths + lengths)[:, None]
    both = jnp.concatenate([prompts, responses], axis=1)
    source = jnp.where(place < start, place, jnp.minimum(place - start + width, both.shape[1] - 1))
    return jnp.where(place < end, jnp.take_along_axis(both, source, axis=1), 0)
