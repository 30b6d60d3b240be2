"""The update of PPO: from scored responses to new parameters of policy and critic. One program."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from instar.generation.rollout import Trajectories
from instar.models.language_model import Params
from instar.objectives import masked
from instar.objectives.language import by_chunks, next_token_sums, token_log_probs
from instar.objectives.policy import importance_weights, ppo_policy_loss, ppo_value_loss
from instar.objectives.responses import adjust_scores, length_mask
from instar.objectives.rewards import adaptive_beta, decayed_beta, gae, kl, shape_rewards
from instar.reinforcement.config import UpdateConfig
from instar.reinforcement.experience import Experience, Networks, response_hidden
from instar.training.optimizer import Schedule, clip_by_norm
from instar.training.state import TrainState, step_key
from instar.training.step import accumulate

POLICY, CRITIC = "policy", "critic"
Improve = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclass(frozen=True)
class Learner:
    """How one of the two is optimised.

    `optimizer` is for the peak rate `learning_rate`, of which `schedule` gives shares.
    """

    learning_rate: float
    optimizer: optax.GradientTransformation
    schedule: Schedule
    clip_norm: float | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lessons:
    """What the losses read of each response; [B, ...] as in Trajectories, floats [B, T]."""

    tokens: jax.Array
    prompt_lengths: jax.Array
    responses: jax.Array
    lengths: jax.Array
    old_log_probs: jax.Array
    old_values: jax.Array
    advantages: jax.Array
    returns: jax.Array
    weights: jax.Array | None


def make_improve(
    networks: Networks,
    learners: dict[str, Learner],
    config: UpdateConfig,
    *,
    temperature: float = 1.0,
    microbatch: int | None = None,
    ema: float | None = None,
    loss_chunk: int = 0,
) -> Improve:
    """The pure function (state, trajectories, experience, scores [B], ptx) -> (state, metrics).

    A state has the policy in `params`, and in `extras` the critic's parameters, `beta`, and `ema`
    where it is asked for. `ptx` is None, or rows of pretraining text for every update, as
    `TrainingRows` gives them: [updates, rows, sequence].

    An update whose losses or gradients are not finite changes nothing. Responses are taken in a
    new order in each epoch, drawn from the state's key; `microbatch` of them are in a gradient at
    once (None: all of an update), and the policy's head reads `loss_chunk` positions of each row at
    a time (0: all), which must divide the responses' positions and those of the pretraining text.
    """
    differentiate = make_gradients(networks, config, temperature, microbatch, loss_chunk)

    def improve(
        state: TrainState,
        trajectories: Trajectories,
        experience: Experience,
        scores: jax.Array,
        ptx: dict[str, jax.Array] | None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        beta = state.extras["beta"]
        lessons, metrics = make_lessons(config, beta, trajectories, experience, scores)
        order = response_order(step_key(state), len(scores), config)
        params = {POLICY: state.params, CRITIC: state.extras[CRITIC]}
        active = {POLICY: state.step >= config.critic_warmup, CRITIC: jnp.bool_(True)}
        shares = {name: learner.schedule(state.step) for name, learner in learners.items()}

        def update(carry: tuple, given: tuple) -> tuple[tuple, dict]:
            index, rows, ptx_rows = given
            params, opt_state, stopped = carry
            taken = jax.tree.map(lambda x: x[rows], lessons)
            key = jax.random.fold_in(step_key(state), index)
            grads, stats = differentiate(params, taken, ptx_rows, key)
            if config.target_kl is not None:
                stopped |= stats["approx_kl"] > config.target_kl
            norms = {name: optax.tree.norm(grads[name]) for name in learners}
            finite = jnp.isfinite(stats["loss"]) & jnp.isfinite(sum(norms.values()))
            params, opt_state = dict(params), dict(opt_state)
            for name, learner in learners.items():
                apply = finite & ~stopped & active[name]
                clipped = clip_by_norm(grads[name], norms[name], learner.clip_norm)
                old = params[name], opt_state[name]
                params[name], opt_state[name] = _kept(
                    apply, _stepped(learner, clipped, shares[name], *old), old
                )
            stats |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
            stats |= {"tried": jnp.float32(1), "done": 1.0 - stopped, "skipped": 1.0 - finite}
            return (params, opt_state, stopped), stats

        def update_or_rest(carry: tuple, given: tuple) -> tuple[tuple, dict]:
            if config.target_kl is None:
                return update(carry, given)
            shapes = jax.eval_shape(update, carry, given)[1]
            nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return jax.lax.cond(carry[2], lambda: (carry, nothing), lambda: update(carry, given))

        indexes = jnp.arange(len(order))
        carry = (params, state.opt_state, jnp.bool_(False))
        (params, opt_state, _), stats = jax.lax.scan(update_or_rest, carry, (indexes, order, ptx))
        metrics |= _over_updates(stats) | {
            "learning_rate": learners[POLICY].learning_rate * shares[POLICY],
            "beta": beta,
        }
        extras = {**state.extras, CRITIC: params[CRITIC]}
        extras["beta"] = _next_beta(config, beta, state.step + 1, metrics["kl"], len(scores))
        if ema is not None:
            extras["ema"] = jax.tree.map(
                lambda old, new: ema * old + (1 - ema) * new, extras["ema"], params[POLICY]
            )
        state = dataclasses.replace(
            state, step=state.step + 1, params=params[POLICY], opt_state=opt_state, extras=extras
        )
        return state, metrics

    return improve


def _next_beta(
    config: UpdateConfig, beta: jax.Array, step: jax.Array, kl: jax.Array, count: int
) -> jax.Array:
    """The coefficient after `step` iterations, the last of `count` responses."""
    if config.adaptive_kl is not None:
        adaptive = config.adaptive_kl
        moved = adaptive_beta(beta, kl, count, adaptive.target, adaptive.horizon)
        # A policy that has not learnt yet says nothing of what the coefficient does to it.
        learning = step > config.critic_warmup
        return jnp.where(learning & jnp.isfinite(moved), moved, beta)
    if config.beta_decay is not None:
        decay = config.beta_decay
        moved = decayed_beta(step, config.beta, decay.final, decay.iterations)
        return moved.astype(beta.dtype)
    return beta


def make_lessons(
    config: UpdateConfig,
    beta: jax.Array,
    trajectories: Trajectories,
    experience: Experience,
    scores: jax.Array,
) -> tuple[Lessons, dict[str, jax.Array]]:
    """Rewards, advantages and returns of scored responses, and what is to be watched of them."""
    mask = length_mask(trajectories.lengths, trajectories.responses.shape[1])
    shaped = adjust_scores(
        scores,
        trajectories.finished,
        limit=config.scores.limit or jnp.inf,
        penalty=config.scores.eos_penalty,
        replacement=config.scores.eos_replacement,
    )
    log_probs, values = experience.log_probs, experience.values
    rewards = shape_rewards(shaped, log_probs, experience.ref_log_probs, mask, beta)
    metrics = watch(trajectories, experience, scores, mask) | {
        "reward": jnp.mean(masked.total(rewards, mask, axis=-1))
    }
    if config.whiten_rewards:
        rewards = masked.whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    metrics["explained_variance"] = ppo_value_loss(values, values, returns, mask, jnp.inf)[1][
        "explained_variance"
    ]
    if config.whiten_advantages:
        advantages = masked.whiten(advantages, mask)
    weights = None
    if config.importance_cap is not None:
        weights = importance_weights(log_probs, trajectories.log_probs, config.importance_cap)
    lessons = Lessons(
        tokens=trajectories.tokens,
        prompt_lengths=trajectories.prompt_lengths,
        responses=trajectories.responses,
        lengths=trajectories.lengths,
        old_log_probs=log_probs,
        old_values=values,
        advantages=advantages,
        returns=returns,
        weights=weights,
    )
    return lessons, metrics


def watch(
    trajectories: Trajectories, experience: Experience, scores: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """What the host is told of the responses of an iteration: scalars.

    `kl`, `kl_k2` and `kl_k3` are in nats, summed over a response; `kl_token` and `entropy` are of
    a token. `perplexity` is that of the responses, without their end tokens, under the base.
    `mismatch` is how far the sampler's log-probabilities are from the trainer's, in the mean.
    """
    policy, reference = experience.log_probs, experience.ref_log_probs

    def of_response(estimator: str) -> jax.Array:
        return jnp.mean(masked.total(kl(policy, reference, estimator), mask, axis=-1))

    words = length_mask(trajectories.lengths - trajectories.finished, mask.shape[1])
    lengths = trajectories.lengths.astype(jnp.float32)
    metrics = {
        "score": jnp.mean(scores),
        "score_std": jnp.std(scores),
        "kl": of_response("k1"),
        "kl_k2": of_response("k2"),
        "kl_k3": of_response("k3"),
        "kl_token": masked.mean(kl(policy, reference, "k1"), mask),
        "entropy": masked.mean(experience.entropy, mask),
        "length": jnp.mean(lengths),
        "eos_rate": jnp.mean(trajectories.finished.astype(jnp.float32)),
        "perplexity": jnp.exp(-masked.mean(experience.base_log_probs, words)),
        "mismatch": masked.mean(jnp.abs(policy - trajectories.log_probs), mask),
        "tokens": jnp.sum(lengths + trajectories.prompt_lengths),
    }
    if experience.scores is not None:
        metrics["disagreement"] = jnp.mean(jnp.std(experience.scores, axis=0))
    return metrics


def response_order(key: jax.Array, count: int, config: UpdateConfig) -> jax.Array:
    """The responses of each update: int [epochs * count / minibatch, minibatch]."""
    keys = jax.random.split(jax.random.fold_in(key, 2**31), config.epochs)
    orders = jax.vmap(lambda key: jax.random.permutation(key, count))(keys)
    return orders.reshape(-1, config.minibatch)


def make_gradients(
    networks: Networks,
    config: UpdateConfig,
    temperature: float,
    microbatch: int | None,
    loss_chunk: int,
) -> Callable:
    """The function (params of both, lessons, ptx rows, key) -> (gradients of both, stats)."""

    def losses(params: dict, _: None, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
        """This microbatch's part of the mean losses of the update that it belongs to."""
        part: Lessons = batch["lessons"]
        mask = length_mask(part.lengths, part.responses.shape[1])
        share = jnp.sum(mask) / batch["total"]
        where = (part.tokens, part.prompt_lengths, part.lengths, mask.shape[1])
        head = networks.policy.head(params[POLICY])

        def log_probs(hidden: jax.Array, responses: jax.Array) -> jax.Array:
            return token_log_probs(head(hidden) / temperature, responses)

        hidden = response_hidden(networks.policy, params[POLICY], *where)
        policy_loss, policy_stats = ppo_policy_loss(
            by_chunks(log_probs, loss_chunk, hidden, part.responses),
            part.old_log_probs,
            part.advantages,
            mask,
            config.clip,
            dual_clip=config.dual_clip,
            log_ratio_limit=config.log_ratio_limit,
            weights=part.weights,
        )
        hidden = response_hidden(networks.critic, params[CRITIC], *where)
        value_loss, value_stats = ppo_value_loss(
            networks.critic.value_head(params[CRITIC])(hidden),
            part.old_values,
            part.returns,
            mask,
            config.value_clip or jnp.inf,
        )
        stats = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "approx_kl": policy_stats["approx_kl_k3"],
            "clip_fraction": policy_stats["clip_fraction"],
            "ratio": policy_stats["ratio"],
            "value_clip_fraction": value_stats["clip_fraction"],
        }
        stats = {name: value * share for name, value in stats.items()}
        loss = stats["policy_loss"] + config.value_coefficient * stats["value_loss"]
        if "ptx" in batch:
            rows = batch["ptx"]
            hidden, _ = networks.policy.apply(
                params[POLICY],
                rows["tokens"],
                positions=rows["positions"],
                segment_ids=rows["segment_ids"],
            )
            sums = next_token_sums(hidden, head, rows["targets"], rows["weights"], loss_chunk)
            stats["ptx_loss"] = sums["nats"] / batch["ptx_total"]
            loss += config.ptx_coefficient * stats["ptx_loss"]
        return loss, stats | {"loss": loss}

    def gradients(
        params: dict, lessons: Lessons, ptx: dict | None, key: jax.Array
    ) -> tuple[dict, dict]:
        size = microbatch or config.minibatch
        constrain = networks.policy.execution.constrain
        count = config.minibatch // size

        def split(x: jax.Array) -> jax.Array:
            x = x.reshape(count, -1, *x.shape[1:])
            return constrain(x, (None, "batch") + (None,) * (x.ndim - 2))

        inputs = {
            "lessons": jax.tree.map(split, lessons),
            "total": jnp.full(count, jnp.sum(lessons.lengths)),
            "microbatches": jnp.int32(count),
        }
        if ptx is not None:
            inputs["ptx"] = jax.tree.map(split, ptx)
            inputs["ptx_total"] = jnp.full(count, jnp.maximum(jnp.sum(ptx["weights"]), 1))
        return accumulate(losses, params, None, inputs, key)

    return gradients


def _stepped(
    learner: Learner, grads: Params, share: jax.Array, params: Params, opt_state: optax.OptState
) -> tuple[Params, optax.OptState]:
    """Parameters and optimiser state after one step at a share of the peak rate."""
    updates, opt_state = learner.optimizer.update(grads, opt_state, params)
    updates = jax.tree.map(lambda u: (u * share).astype(u.dtype), updates)
    return optax.apply_updates(params, updates), opt_state


def _kept(apply: jax.Array, new: tuple, old: tuple) -> tuple:
    """`new` where `apply` is true, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(apply, n, o), new, old)


def _over_updates(stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means of arrays [updates] over the updates that were tried; and how many were made.

    The one that an early stop refuses has been tried; those after it have not.
    """
    tried, done, skipped = (stats.pop(name) for name in ("tried", "done", "skipped"))
    means = {name: masked.mean(value, tried) for name, value in stats.items()}
    means["grad_norm"] = means.pop("grad_norm_policy")
    return means | {"updates": jnp.sum(done * (1 - skipped)), "skipped": jnp.max(skipped)}
