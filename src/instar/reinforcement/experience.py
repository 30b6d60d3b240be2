"""What the roles say of responses: log-probabilities, values, scores. One compiled program."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

from instar.generation.rollout import Trajectories
from instar.models.language_model import LanguageModel, Params
from instar.models.reward_model import RewardModel
from instar.objectives.language import by_chunks, entropy, token_log_probs
from instar.objectives.responses import length_mask

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Networks:
    """What each role computes. The reward may come from elsewhere, and a base is optional."""

    policy: LanguageModel
    critic: LanguageModel
    reference: LanguageModel
    reward: RewardModel | None = None
    base: LanguageModel | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """What the roles say of trajectories; what belongs to a token is float32 [B, T].

    Attributes:
      log_probs, ref_log_probs: of policy and reference, at the temperature of the rollout.
      entropy: of the policy, at that temperature, in nats.
      values: of the state before each token.
      base_log_probs: of the base, or of the reference where there is none, at temperature 1.
      scores: [members, B], what the reward model's members give; None without one.
    """

    log_probs: jax.Array
    ref_log_probs: jax.Array
    entropy: jax.Array
    values: jax.Array
    base_log_probs: jax.Array
    scores: jax.Array | None


Assess = Callable[[Params, Params, dict[str, Params], Trajectories], Experience]


def response_hidden(
    model: LanguageModel,
    params: Params,
    tokens: jax.Array,
    prompt_lengths: jax.Array,
    lengths: jax.Array,
    size: int,
) -> jax.Array:
    """The hidden states that each response token is predicted from: [B, size, embed].

    They are those of the positions before it, the first one that of the prompt's last token. What
    stands after a response's end is of no meaning.
    """
    real = length_mask(prompt_lengths + lengths, tokens.shape[1])
    hidden, _ = model.apply(params, tokens, segment_ids=real.astype(jnp.int32))
    before = prompt_lengths[:, None] - 1 + jnp.arange(size)
    return jnp.take_along_axis(hidden, before[..., None], axis=1)


def make_assess(
    networks: Networks, *, temperature: float, rows: int, loss_chunk: int = 0
) -> Assess:
    """The function (policy, critic, frozen parameters by role, trajectories) -> experience.

    `rows` responses are looked at at a time, and heads of a vocabulary read `loss_chunk` positions
    of each (0: all), which bounds the memory of their logits: float32 [rows, loss_chunk, V].

    Raises:
      ValueError: `rows` does not divide the number of responses, or `loss_chunk` their positions.
    """

    def read(
        model: LanguageModel,
        params: Params,
        part: Trajectories,
        of_logits: Callable[[jax.Array, jax.Array], Tree],
    ) -> Tree:
        """What is read of each token, [rows, T], from logits and the tokens that were drawn."""
        head, hidden = model.head(params), _hidden(model, params, part)

        def of_hidden(hidden: jax.Array, responses: jax.Array) -> Tree:
            return of_logits(head(hidden), responses)

        return by_chunks(of_hidden, loss_chunk, hidden, part.responses)

    def of_policy(logits: jax.Array, responses: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits / temperature
        return token_log_probs(logits, responses), entropy(logits)

    def of_reference(logits: jax.Array, responses: jax.Array) -> tuple[jax.Array, jax.Array]:
        return token_log_probs(logits / temperature, responses), token_log_probs(logits, responses)

    def one(policy: Params, critic: Params, frozen: dict, part: Trajectories) -> Experience:
        log_probs, spread = read(networks.policy, policy, part, of_policy)
        scores = None
        if networks.reward is not None:
            whole = part.prompt_lengths + part.lengths
            scores = networks.reward.scores(frozen["reward"], part.tokens, whole)
        reference = frozen["reference"]
        ref_log_probs, base_log_probs = read(networks.reference, reference, part, of_reference)
        if networks.base is not None:
            base_log_probs = read(networks.base, frozen["base"], part, token_log_probs)
        return Experience(
            log_probs=log_probs,
            ref_log_probs=ref_log_probs,
            entropy=spread,
            values=networks.critic.value_head(critic)(_hidden(networks.critic, critic, part)),
            base_log_probs=base_log_probs,
            scores=None if scores is None else scores.T,
        )

    def assess(
        policy: Params, critic: Params, frozen: dict[str, Params], trajectories: Trajectories
    ) -> Experience:
        constrain = networks.policy.execution.constrain
        parts = jax.tree.map(lambda x: _split(x, rows, constrain), trajectories)
        found = jax.lax.map(lambda part: one(policy, critic, frozen, part), parts)
        whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
        scores = None if whole.scores is None else whole.scores.T
        return Experience(**{**vars(whole), "scores": scores})

    return assess


def _hidden(model: LanguageModel, params: Params, part: Trajectories) -> jax.Array:
    size = part.responses.shape[1]
    return response_hidden(model, params, part.tokens, part.prompt_lengths, part.lengths, size)


def _split(x: jax.Array, rows: int, constrain: Callable) -> jax.Array:
    """[B, ...] -> [B / rows, rows, ...], split over the mesh along its second dimension."""
    if len(x) % rows:
        raise ValueError(f"{rows} rows do not divide the {len(x)} responses")
    x = x.reshape(-1, rows, *x.shape[1:])
    return constrain(x, (None, "batch") + (None,) * (x.ndim - 2))
