"""What the roles say of responses: log-probabilities, values, scores. One compiled program."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from instar.generation.rollout import Trajectories
from instar.models.language_model import LanguageModel, Params
from instar.models.reward_model import RewardModel
from instar.objectives.language import entropy, token_log_probs
from instar.objectives.responses import length_mask


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


def make_assess(networks: Networks, *, temperature: float, rows: int) -> Assess:
    """The function (policy, critic, frozen parameters by role, trajectories) -> experience.

    `rows` responses are looked at at a time, which bounds the memory of their logits.

    Raises:
      ValueError: `rows` does not divide the number of responses.
    """

    def of_language(
        model: LanguageModel, params: Params, part: Trajectories, temperature: float
    ) -> jax.Array:
        hidden = _hidden(model, params, part)
        return model.head(params)(hidden) / temperature

    def one(policy: Params, critic: Params, frozen: dict, part: Trajectories) -> Experience:
        logits = of_language(networks.policy, policy, part, temperature)
        scores = None
        if networks.reward is not None:
            whole = part.prompt_lengths + part.lengths
            scores = networks.reward.scores(frozen["reward"], part.tokens, whole)
        ref_logits = of_language(networks.reference, frozen["reference"], part, 1.0)
        base_logits = ref_logits
        if networks.base is not None:
            base_logits = of_language(networks.base, frozen["base"], part, 1.0)
        return Experience(
            log_probs=token_log_probs(logits, part.responses),
            ref_log_probs=token_log_probs(ref_logits / temperature, part.responses),
            entropy=entropy(logits),
            values=networks.critic.value_head(critic)(_hidden(networks.critic, critic, part)),
            base_log_probs=token_log_probs(base_logits, part.responses),
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
