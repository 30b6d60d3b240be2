"""PPO on responses that can be enumerated approaches the optimum of its objective."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import telling

from instar.families.registry import ModelConfig, build_spec
from instar.generation.rollout import rollout
from instar.models.language_model import LanguageModel
from instar.models.parameters import Initialization
from instar.models.reward_model import RewardModel
from instar.objectives.language import token_log_probs
from instar.reinforcement.config import UpdateConfig
from instar.reinforcement.experience import Networks, make_assess
from instar.reinforcement.update import Learner, make_improve
from instar.training.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    make_optimizer,
    make_schedule,
)
from instar.training.state import TrainState, step_key

VOCAB, STOP, LONGEST, PROMPT = 3, 1, 3, (0, 2)
BATCH, ITERATIONS = 1024, 100


def all_responses() -> list[tuple[int, ...]]:
    """Every sequence that ends with its first stop token, or breaks off at the longest length."""
    found = []
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            ended = tokens[-1] == STOP
            if STOP not in tokens[:-1] and (ended or length == LONGEST):
                found.append(tokens)
    return found


RESPONSES = all_responses()


def distribution(model: LanguageModel, params: dict) -> np.ndarray:
    """The probability of each response, by one forward pass over all of them."""
    rows = [(*PROMPT, *r, *(0,) * (LONGEST - len(r))) for r in RESPONSES]
    tokens = jnp.asarray(rows)
    log_probs = token_log_probs(
        model.logits(params, tokens)[:, len(PROMPT) - 1 : -1], tokens[:, len(PROMPT) :]
    )
    lengths = np.asarray([len(r) for r in RESPONSES])
    real = np.arange(LONGEST) < lengths[:, None]
    return np.exp(np.where(real, np.asarray(log_probs, np.float64), 0).sum(1))


def number(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A number of its own for each response [B, LONGEST], by which its reward is looked up."""
    real = np.arange(LONGEST) < lengths[:, None]
    return (real * (tokens + 1) * (VOCAB + 1) ** np.arange(LONGEST)).sum(1)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * np.abs(p - q).sum()


@dataclasses.dataclass(frozen=True)
class Task:
    """One compiled PPO iteration on rewards of random sequences; beta is part of the state."""

    policy: LanguageModel
    reference: dict
    rewards: np.ndarray
    begin: Callable[[float], TrainState]
    iteration: Callable[[TrainState], tuple[TrainState, dict]]


@pytest.fixture(scope="module")
def task() -> Task:
    spec = build_spec(
        ModelConfig(family="llama", depth=1, width=16, heads=2, mlp_width=32, tied=False),
        vocab_size=VOCAB,
        max_positions=8,
    )
    key = jax.random.key(3)
    policy, critic = LanguageModel(spec), RewardModel(spec).model
    reference = policy.init(key, Initialization(std=0.2))
    rewards = np.random.default_rng(0).normal(size=len(RESPONSES))
    padded = np.asarray([(*r, *(0,) * (LONGEST - len(r))) for r in RESPONSES])
    table = np.zeros((VOCAB + 1) ** LONGEST, np.float32)
    table[number(padded, np.asarray([len(r) for r in RESPONSES]))] = rewards

    # Where the critic is exact, the optimum leaves no advantage, and so no noise: it learns faster.
    rates = {"policy": 2e-3, "critic": 4e-3}
    models = {"policy": policy, "critic": critic}
    schedule = make_schedule(ScheduleConfig(kind="linear", final_fraction=0.0), ITERATIONS)
    learners = {
        name: Learner(
            rate,
            make_optimizer(
                OptimizerConfig(learning_rate=rate, b2=0.99, weight_decay=0.0), models[name].axes
            ),
            schedule,
            None,
        )
        for name, rate in rates.items()
    }
    config = UpdateConfig(
        lam=1.0,
        epochs=2,
        minibatch=256,
        value_clip=None,
        value_coefficient=1.0,
        whiten_advantages=False,
    )
    assess = make_assess(Networks(policy, critic, policy), temperature=1.0, rows=BATCH)
    improve = make_improve(Networks(policy, critic, policy), learners, config)

    @jax.jit
    def iteration(state: TrainState) -> tuple[TrainState, dict]:
        prompts = jnp.tile(jnp.asarray(PROMPT), (BATCH, 1))
        drawn = rollout(
            policy,
            state.params,
            prompts,
            jnp.full(BATCH, len(PROMPT)),
            jax.random.bits(step_key(state), (BATCH,), jnp.uint32),
            max_new_tokens=LONGEST,
            stop_ids=(STOP,),
        )
        scores = jnp.asarray(table)[number(drawn.responses, drawn.lengths)]
        frozen = {"reference": reference}
        experience = assess(state.params, state.extras["critic"], frozen, drawn)
        return improve(state, drawn, experience, scores, None)

    def begin(beta: float) -> TrainState:
        params = {"policy": reference, "critic": critic.init(key)}
        return TrainState(
            step=jnp.int32(0),
            params=params["policy"],
            opt_state={name: learners[name].optimizer.init(params[name]) for name in learners},
            key=jax.random.key_data(key),
            extras={"critic": params["critic"], "beta": jnp.float32(beta)},
        )

    return Task(policy, reference, rewards, begin, iteration)


@pytest.mark.parametrize("beta", telling([0.5, 1.0, 2.0], [1.0]))
def test_ppo_approaches_the_tilted_reference(task, beta):
    reference = distribution(task.policy, task.reference)
    assert reference.sum() == pytest.approx(1, abs=1e-5)
    optimum = reference * np.exp(task.rewards / beta)
    optimum /= optimum.sum()
    state = task.begin(beta)
    for _ in range(ITERATIONS):
        state, _ = task.iteration(state)
    reached = distribution(task.policy, state.params)
    assert total_variation(reference, optimum) > 0.1
    assert total_variation(reached, optimum) < 0.01
