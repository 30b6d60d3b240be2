"""The compiled programs of generation: start, read a piece of the prompts, and draw new tokens.

Each is a pure function of pytrees. A row whose prompt is read, all but its last token, holds that
token as the next to be read; every step reads one token and draws another.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from instar.generation.sampling import Mode, RowSettings, choose
from instar.models.cache import KVCache, init_cache
from instar.models.language_model import LanguageModel, Params

NOTHING = -1  # in the place of a new token where a row has ended


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What does not change while a batch is generated.

    `limit` int32 [B] is the most new tokens of each row; `stop_ids` int32 [B, N] is filled up with
    NOTHING.
    """

    settings: RowSettings
    limit: jax.Array
    stop_ids: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where a batch stands.

    `token` int32 [B] is the last token of each row, which is not read yet; `count` int32 [B] is how
    many new ones it has; `alive` bool [B] tells whether there will be more. `seen` bool [B, V] are
    the tokens that a repetition penalty is for, or None where no row has one.
    """

    cache: KVCache
    token: jax.Array
    count: jax.Array
    alive: jax.Array
    seen: jax.Array | None


def start(
    model: LanguageModel,
    token: jax.Array,
    alive: jax.Array,
    seen: jax.Array | None,
    capacity: int,
) -> State:
    """Rows that have read nothing."""
    execution = model.execution
    parts = execution.parts("kv_heads")
    cache = init_cache(model.spec, len(token), capacity, execution.dtype, parts)
    return pin(model, State(cache, token, jnp.zeros_like(token), alive, seen))


def read(
    model: LanguageModel, params: Params, cache: KVCache, tokens: jax.Array, real: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Hidden states of tokens [B, S], of which those are read that are `real` bool [B, S]."""
    ahead = jnp.cumsum(real, axis=1) - real
    hidden, aux = model.apply(
        params,
        tokens,
        positions=cache.length[:, None] + ahead.astype(jnp.int32),
        segment_ids=real.astype(jnp.int32),
        cache=cache,
    )
    return hidden, aux["cache"]


def prefill(
    model: LanguageModel, params: Params, state: State, tokens: jax.Array, lengths: jax.Array
) -> State:
    """Reads a piece of each prompt: the first `lengths` int32 [B] of tokens int32 [B, S]."""
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    _, cache = read(model, params, state.cache, tokens, real)
    return pin(model, dataclasses.replace(state, cache=cache))


def generate(
    model: LanguageModel,
    params: Params,
    state: State,
    rows: Rows,
    wanted: jax.Array,
    *,
    steps: int,
    mode: Mode,
    tempered: bool = False,
) -> tuple[State, jax.Array, jax.Array]:
    """Draws up to `steps` new tokens of each row, until the last row ends.

    Args:
      wanted: bool [B]; the other rows end here.
      tempered: whether log-probabilities are those at each row's temperature, which is not 0.

    Returns:
      The new state; the tokens int32 [B, steps], NOTHING after a row's end; and their
      log-probabilities under the model itself (at the temperature: `tempered`), float32 [B, steps].
    """
    head = model.head(params)
    batch = jnp.arange(len(wanted))

    def unfinished(carry: tuple) -> jax.Array:
        step, state, _, _ = carry
        return (step < steps) & state.alive.any()

    def body(carry: tuple) -> tuple:
        step, state, tokens, log_probs = carry
        alive = state.alive
        hidden, cache = read(model, params, state.cache, state.token[:, None], alive[:, None])
        logits = model.execution.constrain(head(hidden[:, 0]), ("batch", None))
        logits = logits.astype(jnp.float32)
        token = choose(logits, rows.settings, state.count, state.seen, mode)
        if tempered:
            logits /= rows.settings.temperature[:, None]
        log_prob = logits[batch, token] - jax.nn.logsumexp(logits, axis=-1)
        tokens = tokens.at[:, step].set(jnp.where(alive, token, NOTHING))
        log_probs = log_probs.at[:, step].set(jnp.where(alive, log_prob, 0))
        count = state.count + alive
        ended = (token[:, None] == rows.stop_ids).any(-1) | (count >= rows.limit)
        seen = None if state.seen is None else state.seen.at[batch, token].set(True)
        return step + 1, State(cache, token, count, alive & ~ended, seen), tokens, log_probs

    state = dataclasses.replace(state, alive=state.alive & wanted)
    tokens = jnp.full((len(wanted), steps), NOTHING, jnp.int32)
    carry = (jnp.int32(0), state, tokens, jnp.zeros(tokens.shape, jnp.float32))
    _, state, tokens, log_probs = jax.lax.while_loop(unfinished, body, carry)
    # The host reads them, and in several processes each must have them all.
    tokens, log_probs = (model.execution.constrain(x, (None, None)) for x in (tokens, log_probs))
    return pin(model, state), tokens, log_probs


def pin(model: LanguageModel, state: State) -> State:
    """The state in its one place on the mesh, so that a program takes what another returned."""
    constrain = model.execution.constrain

    def rows(x: jax.Array) -> jax.Array:
        return constrain(x, ("batch",) + (None,) * (x.ndim - 1))

    layers = jax.tree.map(
        lambda x: constrain(x, ("layers", "batch", "kv_heads", None, None)), state.cache.layers
    )
    pinned = jax.tree.map(rows, dataclasses.replace(state, cache=None))
    cache = jax.tree.map(rows, dataclasses.replace(state.cache, layers=()))
    return dataclasses.replace(pinned, cache=dataclasses.replace(cache, layers=layers))
