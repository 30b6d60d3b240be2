"""The update of PPO, against its formulas written as loops over tokens, in float64."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import Toy, draw_params, log_softmax, outputs_after

from instar.generation.rollout import Trajectories, join
from instar.reinforcement.config import (
    AdaptiveKlConfig,
    BetaDecayConfig,
    ScoreConfig,
    UpdateConfig,
)
from instar.reinforcement.experience import Experience
from instar.reinforcement.update import (
    Learner,
    Lessons,
    make_gradients,
    make_improve,
    make_lessons,
    response_order,
)
from instar.training.state import TrainState, step_key

VOCAB, TEMPERATURE = 5, 0.7
STARTS, COUNTS = np.asarray([2, 1, 3, 2, 1, 3]), np.asarray([4, 1, 2, 4, 3, 1])
FINISHED = np.asarray([False, True, True, True, False, True])
BATCH, LONGEST = len(STARTS), 4
REAL = np.arange(LONGEST) < COUNTS[:, None]
NETWORKS = types.SimpleNamespace(policy=Toy(), critic=Toy())


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw_trajectories(rng: np.random.Generator) -> Trajectories:
    """Responses of unequal lengths; the end token 0 is also what pads."""
    prompts = rng.integers(0, VOCAB, (BATCH, 3))
    responses = rng.integers(1, VOCAB, (BATCH, LONGEST)) * REAL
    responses[FINISHED, COUNTS[FINISHED] - 1] = 0
    tokens = join(*map(jnp.asarray, (prompts, STARTS, responses, COUNTS)))
    log_probs = rng.normal(size=REAL.shape)
    return Trajectories(tokens, *map(jnp.asarray, (STARTS, responses, COUNTS, FINISHED, log_probs)))


def draw_experience(rng: np.random.Generator, trajectories: Trajectories) -> Experience:
    """What roles may say, NaN behind the ends."""

    def draw(scale: float = 1.0) -> jnp.ndarray:
        return jnp.asarray(np.where(REAL, scale * rng.normal(size=REAL.shape), np.nan))

    near = trajectories.log_probs + draw(0.3)
    scores = jnp.asarray(rng.normal(size=(3, BATCH)))
    return Experience(near, near + draw(0.5), draw() ** 2, draw(), draw(), scores)


def prefixes(trajectories: Trajectories):
    """Yields (row, t, the tokens before response token t, that token)."""
    for row in range(BATCH):
        for t in range(COUNTS[row]):
            place = STARTS[row] + t
            tokens = np.asarray(trajectories.tokens)[row, : place + 1].tolist()
            yield row, t, tokens[:-1], tokens[-1]


def log_probs_of(policy: dict, trajectories: Trajectories) -> np.ndarray:
    found = np.zeros(REAL.shape)
    for row, t, before, token in prefixes(trajectories):
        found[row, t] = log_softmax(outputs_after(policy, before) / TEMPERATURE)[token]
    return found


# --- Rewards, advantages, returns ---------------------------------------------------------------


def expected_lessons(config, beta, trajectories, experience, scores):
    """Advantages (before they are whitened) and returns, and the sum of a response's rewards."""
    advantages, returns, rewards = np.zeros(REAL.shape), np.zeros(REAL.shape), np.zeros(REAL.shape)
    policy, reference, values = (
        np.asarray(x) for x in (experience.log_probs, experience.ref_log_probs, experience.values)
    )
    for row, count in enumerate(COUNTS):
        score, limit = float(scores[row]), config.scores.limit
        if limit is not None:
            score = min(max(score, -limit), limit)
        if not FINISHED[row]:
            score -= config.scores.eos_penalty
            if config.scores.eos_replacement is not None:
                score = config.scores.eos_replacement
        rewards[row, :count] = -beta * (policy - reference)[row, :count]
        rewards[row, count - 1] += score
    summed = rewards.sum(1)
    if config.whiten_rewards:
        among = rewards[REAL]
        rewards = np.where(REAL, (rewards - among.mean()) / among.std() + among.mean(), 0)
    for row, count in enumerate(COUNTS):
        following = next_value = 0.0
        for t in reversed(range(count)):
            delta = rewards[row, t] + config.gamma * next_value - values[row, t]
            following = delta + config.gamma * config.lam * following
            next_value = values[row, t]
            advantages[row, t], returns[row, t] = following, following + next_value
    return advantages, returns, summed


@pytest.mark.parametrize(
    "config",
    [
        UpdateConfig(whiten_advantages=False),
        UpdateConfig(scores=ScoreConfig(limit=0.6, eos_penalty=1.25), gamma=0.9, lam=0.8),
        UpdateConfig(scores=ScoreConfig(eos_replacement=-1.5), whiten_rewards=True),
    ],
)
def test_scores_become_advantages_and_returns(config):
    rng = np.random.default_rng(0)
    trajectories = draw_trajectories(rng)
    experience, scores = draw_experience(rng, trajectories), jnp.asarray(rng.normal(size=BATCH))
    found, metrics = make_lessons(config, 0.3, trajectories, experience, scores)
    advantages, returns, rewards = expected_lessons(config, 0.3, trajectories, experience, scores)
    values = np.asarray(experience.values)
    if config.whiten_advantages:
        among = advantages[REAL]
        advantages = np.where(REAL, (advantages - among.mean()) / among.std(), 0)
    np.testing.assert_allclose(found.advantages, advantages, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.returns, returns, rtol=1e-6, atol=1e-6)
    assert float(metrics["reward"]) == pytest.approx(rewards.mean())
    unexplained = np.var((returns - values)[REAL]) / np.var(returns[REAL])
    assert float(metrics["explained_variance"]) == pytest.approx(1 - unexplained)


def test_what_is_watched_leaves_padding_out():
    rng = np.random.default_rng(1)
    trajectories = draw_trajectories(rng)
    experience, scores = draw_experience(rng, trajectories), jnp.asarray(rng.normal(size=BATCH))
    _, found = make_lessons(UpdateConfig(), 0.3, trajectories, experience, scores)
    d = np.asarray(experience.log_probs - experience.ref_log_probs)
    entropy, base = np.asarray(experience.entropy), np.asarray(experience.base_log_probs)
    words = np.arange(LONGEST) < (COUNTS - FINISHED)[:, None]
    mismatch = np.asarray(experience.log_probs - trajectories.log_probs)
    expected = {
        "score": scores.mean(),
        "score_std": np.std(scores),
        "kl": np.where(REAL, d, 0).sum(1).mean(),
        "kl_k2": np.where(REAL, d**2 / 2, 0).sum(1).mean(),
        "kl_k3": np.where(REAL, np.exp(-d) - 1 + d, 0).sum(1).mean(),
        "kl_token": d[REAL].mean(),
        "entropy": entropy[REAL].mean(),
        "length": COUNTS.mean(),
        "eos_rate": FINISHED.mean(),
        "perplexity": np.exp(-base[words].mean()),
        "mismatch": np.abs(mismatch[REAL]).mean(),
        "tokens": (STARTS + COUNTS).sum(),
        "disagreement": np.std(experience.scores, axis=0).mean(),
    }
    found = {name: float(found[name]) for name in expected}
    assert found == pytest.approx({name: float(value) for name, value in expected.items()})


# --- The loss and its gradient ------------------------------------------------------------------

EVERYTHING = UpdateConfig(
    dual_clip=1.3,
    clip=0.1,
    value_clip=0.3,
    value_coefficient=0.4,
    minibatch=BATCH,
    ptx_coefficient=2.5,
)


def draw_lessons(rng: np.random.Generator, trajectories: Trajectories, policy: dict) -> Lessons:
    """Old log-probabilities near the policy's, so that ratios are on both sides of the bounds."""

    def draw(scale: float) -> np.ndarray:
        return np.where(REAL, scale * rng.normal(size=REAL.shape), np.nan)

    return Lessons(
        trajectories.tokens,
        trajectories.prompt_lengths,
        trajectories.responses,
        trajectories.lengths,
        *map(
            jnp.asarray,
            (
                log_probs_of(policy, trajectories) + draw(0.2),
                draw(0.5),
                draw(1.0),
                draw(1.0),
                np.exp(draw(0.1)),
            ),
        ),
    )


def draw_ptx(rng: np.random.Generator) -> dict:
    """Three rows, each of two texts and padding."""
    segments = np.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2], [1, 1, 0, 0, 0, 0]])
    weights = np.where(segments > 0, rng.uniform(0.5, 2, segments.shape), 0)
    tokens, targets = rng.integers(0, VOCAB, (2, *segments.shape))
    named = {"tokens": tokens, "targets": targets, "segment_ids": segments, "weights": weights}
    return {name: jnp.asarray(x) for name, x in named.items()} | {"positions": jnp.zeros((3, 6))}


def expected_losses(policy, critic, config, trajectories, lessons, ptx) -> dict[str, float]:
    old, old_values, advantages, returns, weights = (
        np.asarray(getattr(lessons, name))
        for name in ("old_log_probs", "old_values", "advantages", "returns", "weights")
    )
    policy_loss, value_loss, approx_kl, clipped_share, ratios = [], [], [], [], []
    for row, t, before, token in prefixes(trajectories):
        log_prob = log_softmax(outputs_after(policy, before) / TEMPERATURE)[token]
        d, advantage = log_prob - old[row, t], advantages[row, t]
        ratio, low, high = np.exp(d), 1 - config.clip, 1 + config.clip
        clipped = -advantage * min(max(ratio, low), high)
        loss = max(-advantage * ratio, clipped)
        if advantage < 0:
            loss = min(loss, -advantage * config.dual_clip)
        policy_loss.append(weights[row, t] * loss)
        value, was, wanted = outputs_after(critic, before)[0], old_values[row, t], returns[row, t]
        near = was + min(max(value - was, -config.value_clip), config.value_clip)
        value_loss.append(max((value - wanted) ** 2, (near - wanted) ** 2) / 2)
        approx_kl.append(np.exp(d) - 1 - d)
        clipped_share.append(clipped > -advantage * ratio)
        ratios.append(ratio)
    nats, weight = 0.0, 0.0
    tokens, targets, segments, mattering = (
        np.asarray(ptx[name]) for name in ("tokens", "targets", "segment_ids", "weights")
    )
    for row, t in zip(*np.nonzero(mattering), strict=True):
        same = np.flatnonzero(segments[row, : t + 1] == segments[row, t])
        log_probs = log_softmax(outputs_after(policy, tokens[row, same]))
        nats -= mattering[row, t] * log_probs[targets[row, t]]
        weight += mattering[row, t]
    found = {
        "policy_loss": np.mean(policy_loss),
        "value_loss": np.mean(value_loss),
        "approx_kl": np.mean(approx_kl),
        "clip_fraction": np.mean(clipped_share),
        "ratio": np.mean(ratios),
        "ptx_loss": nats / weight,
    }
    parts = config.value_coefficient * found["value_loss"], found["ptx_loss"]
    found["loss"] = found["policy_loss"] + parts[0] + config.ptx_coefficient * parts[1]
    return found


@pytest.mark.parametrize(("microbatch", "loss_chunk"), [(None, 0), (2, 0), (2, 2)])
def test_losses_and_gradients_are_those_of_the_formulas(microbatch, loss_chunk):
    """Microbatches have unequal numbers of tokens, and a sum of their means would not do."""
    rng = np.random.default_rng(2)
    trajectories = draw_trajectories(rng)
    params = {"policy": draw_params(rng, VOCAB, VOCAB), "critic": draw_params(rng, VOCAB, 1)}
    lessons, ptx = draw_lessons(rng, trajectories, params["policy"]), draw_ptx(rng)
    differentiate = make_gradients(NETWORKS, EVERYTHING, TEMPERATURE, microbatch, loss_chunk)
    gradients, stats = jax.jit(differentiate)(params, lessons, ptx, jax.random.key(0))

    def losses(params: dict) -> dict[str, float]:
        both = params["policy"], params["critic"]
        return expected_losses(*both, EVERYTHING, trajectories, lessons, ptx)

    expected = losses(params)
    assert 0 < expected["clip_fraction"] < 1
    assert {name: float(stats[name]) for name in expected} == pytest.approx(expected)
    for name in params:
        for leaf in params[name]:
            array, step = params[name][leaf], 1e-6
            for place in np.ndindex(array.shape):
                ends = []
                for nudge in (step, -step):
                    moved = array.copy()
                    moved[place] += nudge
                    ends.append(losses(params | {name: params[name] | {leaf: moved}})["loss"])
                slope = (ends[0] - ends[1]) / (2 * step)
                assert float(gradients[name][leaf][place]) == pytest.approx(slope, abs=1e-7)


def test_chunks_change_no_gradient_and_leave_no_logits_of_all_positions():
    rng = np.random.default_rng(5)
    trajectories = draw_trajectories(rng)
    params = {"policy": draw_params(rng, VOCAB, VOCAB), "critic": draw_params(rng, VOCAB, 1)}
    inputs = draw_lessons(rng, trajectories, params["policy"]), draw_ptx(rng), jax.random.key(0)

    def traced(loss_chunk: int) -> tuple[dict, str]:
        program = jax.jit(make_gradients(NETWORKS, EVERYTHING, TEMPERATURE, None, loss_chunk))
        return program(params, *inputs), str(program.trace(params, *inputs).jaxpr)

    (whole, text), (chunked, chunked_text) = traced(0), traced(2)
    assert_trees_close(chunked, whole)
    # Whole they are [6, 4, 5], and [3, 6, 5] of the pretraining text; nor are chunks of them kept.
    assert "[6,4,5]" in text and "[3,6,5]" in text
    assert "[6,2,5]" in chunked_text and "[3,2,5]" in chunked_text
    assert not re.search(r"\[6,4,5\]|\[3,6,5\]|\[\d+,6,2,5\]|\[\d+,3,2,5\]", chunked_text)
    with pytest.raises(ValueError, match="chunk 3 does not divide the 4 positions"):
        traced(3)


# --- The updates of an iteration ----------------------------------------------------------------

SEVERAL = UpdateConfig(
    beta=0.3,
    adaptive_kl=AdaptiveKlConfig(target=1.0, horizon=20.0),
    whiten_advantages=False,
    epochs=2,
    minibatch=2,
    critic_warmup=1,
)
EMA, SHARE = 0.8, 0.5


def learner(rate: float, clip_norm: float) -> Learner:
    return Learner(rate, optax.adam(rate), lambda step: jnp.where(step > 0, SHARE, 1.0), clip_norm)


LEARNERS = {"policy": learner(0.1, 0.2), "critic": learner(0.2, 0.3)}


@functools.cache
def improve_with(config: UpdateConfig):
    return jax.jit(make_improve(NETWORKS, LEARNERS, config, temperature=TEMPERATURE, ema=EMA))


@dataclasses.dataclass(frozen=True)
class Given:
    """The inputs of an iteration, whose old log-probabilities are those of the policy."""

    state: TrainState
    trajectories: Trajectories
    experience: Experience
    scores: jax.Array

    def improved(self, config: UpdateConfig) -> tuple[TrainState, dict]:
        inputs = self.trajectories, self.experience, self.scores, None
        return jax.device_get(improve_with(config)(self.state, *inputs))


def given(step: int, seed: int = 3) -> Given:
    rng = np.random.default_rng(seed)
    trajectories = draw_trajectories(rng)
    params = {"policy": draw_params(rng, VOCAB, VOCAB), "critic": draw_params(rng, VOCAB, 1)}
    opt_state = {name: LEARNERS[name].optimizer.init(params[name]) for name in params}
    ema = jax.tree.map(lambda x: 2 * x, params["policy"])
    state = TrainState(
        jnp.int32(step),
        params["policy"],
        opt_state,
        jax.random.key_data(jax.random.key(4)),
        extras={"critic": params["critic"], "beta": jnp.float64(0.3), "ema": ema},
    )
    log_probs = jnp.asarray(np.where(REAL, log_probs_of(params["policy"], trajectories), np.nan))
    experience = draw_experience(rng, trajectories)
    experience = dataclasses.replace(experience, log_probs=log_probs)
    return Given(state, trajectories, experience, jnp.asarray(rng.normal(size=BATCH)))


def step_by_step(start: Given, config: UpdateConfig, updates: int) -> tuple[dict, dict]:
    """Parameters and optimiser states of both after some updates, one after the other."""
    inputs = start.trajectories, start.experience, start.scores
    lessons, _ = make_lessons(config, start.state.extras["beta"], *inputs)
    differentiate = jax.jit(make_gradients(NETWORKS, config, TEMPERATURE, None, 0))
    params = {"policy": start.state.params, "critic": start.state.extras["critic"]}
    opt_state, share = start.state.opt_state, SHARE if start.state.step else 1.0
    order = response_order(step_key(start.state), BATCH, config)
    for rows in np.asarray(order)[:updates]:
        taken = jax.tree.map(lambda x, rows=rows: x[rows], lessons)
        gradients, _ = differentiate(params, taken, None, jax.random.key(0))
        for name, each in LEARNERS.items():
            squares = sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradients[name]))
            factor = each.clip_norm / max(np.sqrt(squares), each.clip_norm)
            clipped = jax.tree.map(lambda g, f=factor: g * f, gradients[name])
            moves, state = each.optimizer.update(clipped, opt_state[name])
            opt_state = opt_state | {name: state}
            moved = jax.tree.map(lambda p, m: p + share * m, params[name], moves)
            params = params | {name: moved}
    return params, opt_state


def assert_trees_close(found, expected) -> None:
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, found, expected)


def assert_trees_equal(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(expected))


def test_an_iteration_is_its_updates_one_after_the_other():
    start = given(step=1)
    state, metrics = start.improved(SEVERAL)
    params, opt_state = step_by_step(start, SEVERAL, 6)
    assert_trees_close(state.params, params["policy"])
    assert_trees_close(state.extras["critic"], params["critic"])
    assert_trees_close(state.opt_state, opt_state)
    assert state.step == 2 and metrics["updates"] == 6 and metrics["skipped"] == 0
    assert metrics["learning_rate"] == pytest.approx(0.1 * SHARE)
    np.testing.assert_array_equal(state.key, start.state.key)
    # The mean of the policy, and the coefficient for the next iteration.
    mean = jax.tree.map(
        lambda old, new: EMA * old + (1 - EMA) * new, start.state.extras["ema"], params["policy"]
    )
    assert_trees_close(state.extras["ema"], mean)
    error = np.clip(metrics["kl"] / 1.0 - 1, -0.2, 0.2)
    assert metrics["beta"] == pytest.approx(0.3) and abs(error) > 0
    assert state.extras["beta"] == pytest.approx(0.3 * (1 + error * BATCH / 20))


def test_a_critic_that_warms_up_leaves_the_policy_alone():
    start = given(step=0)
    # And a coefficient that decays goes by the iteration: the second of 5 is a quarter of the way.
    decay = BetaDecayConfig(final=0.1, iterations=5)
    config = dataclasses.replace(SEVERAL, adaptive_kl=None, beta_decay=decay)
    state, metrics = start.improved(config)
    assert metrics["beta"] == pytest.approx(0.3) and state.extras["beta"] == pytest.approx(0.25)
    assert_trees_equal(state.params, start.state.params)
    assert_trees_equal(state.opt_state["policy"], start.state.opt_state["policy"])
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), state.extras["critic"], start.state.extras["critic"]
    )
    assert min(jax.tree.leaves(moved)) > 0.1 and metrics["updates"] == 6
    # One that adapts to the KL waits until the policy learns.
    state, metrics = start.improved(SEVERAL)
    assert abs(metrics["kl"] - 1) > 0.01 and state.extras["beta"] == 0.3


def test_updates_that_are_not_finite_change_nothing_and_are_told():
    start = given(step=1)
    # One response spoils the one update of each epoch that it is in.
    spoilt = dataclasses.replace(start, scores=start.scores.at[2].set(jnp.inf))
    state, metrics = spoilt.improved(SEVERAL)
    assert metrics["skipped"] == 1 and metrics["updates"] == 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    # All of them: neither parameters nor optimisers nor the coefficient move.
    broken = dataclasses.replace(
        start.experience,
        log_probs=jnp.full(REAL.shape, jnp.nan),
        values=jnp.full(REAL.shape, jnp.nan),
    )
    state, metrics = dataclasses.replace(start, experience=broken).improved(SEVERAL)
    assert metrics["skipped"] == 1 and metrics["updates"] == 0 and state.step == 2
    assert_trees_equal(state.params, start.state.params)
    assert_trees_equal(state.opt_state, start.state.opt_state)
    assert_trees_equal(state.extras["critic"], start.state.extras["critic"])
    assert state.extras["beta"] == start.state.extras["beta"]


def test_a_policy_that_is_too_far_stops_the_iteration():
    start = given(step=1)
    config = dataclasses.replace(SEVERAL, target_kl=1e-6)
    state, metrics = start.improved(config)
    # Nothing has moved before the first update; the second one is refused, for both networks.
    params, opt_state = step_by_step(start, config, 1)
    assert metrics["updates"] == 1 and metrics["skipped"] == 0
    assert_trees_close(state.params, params["policy"])
    assert_trees_close(state.extras["critic"], params["critic"])
    assert_trees_close(state.opt_state, opt_state)
    # The mean over the two that were tried: 0 before the first, too much before the second.
    assert metrics["approx_kl"] > 0.5e-6 and metrics["ratio"] == pytest.approx(1, abs=0.5)


def test_each_epoch_has_every_response_once_in_an_order_of_its_own():
    config = UpdateConfig(epochs=3, minibatch=8)
    state = given(step=0).state
    orders = []
    for step in range(4):
        key = step_key(dataclasses.replace(state, step=jnp.int32(step)))
        order = np.asarray(response_order(key, 32, config))
        assert order.shape == (12, 8)
        orders += [tuple(epoch) for epoch in order.reshape(3, 32)]
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert len(set(orders)) == 12
