"""One iteration of PPO: respond, judge, improve. The host reads texts; the rest is compiled."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instar.data.completions import CompletionEncoder, Prompt
from instar.data.prompts import PromptSet
from instar.evaluation.diversity import distinct_n, self_bleu
from instar.evaluation.scorers import Scorer
from instar.generation.rollout import Trajectories, rollout
from instar.models.language_model import Params
from instar.objectives.responses import length_mask
from instar.reinforcement.experience import Experience, Networks, make_assess
from instar.reinforcement.roles import for_generation
from instar.reinforcement.update import CRITIC, Improve, watch
from instar.sharding.inputs import fetch, place_rows
from instar.stages.ppo_config import PpoConfig
from instar.training.loop import Scalars
from instar.training.state import TrainState, step_key

Frozen = dict[str, Params]


@dataclass(frozen=True)
class Answers:
    """Responses to prompts, and what is said of them.

    `scores` are float32 [B], before any clipping or penalty.
    """

    prompts: Sequence[Prompt]
    texts: list[str]
    trajectories: Trajectories
    experience: Experience
    scores: jax.Array


class Player:
    """Answers prompts with given parameters and has the answers judged; each program compiles once.

    Args:
      scorer: what scores the answers; None: the reward model among the networks.
      gold: measures that are watched.
    """

    def __init__(
        self,
        config: PpoConfig,
        networks: Networks,
        encoder: CompletionEncoder,
        stop_ids: tuple[int, ...],
        mesh: Mesh,
        scorer: Scorer | None,
        gold: dict[str, Scorer],
    ):
        self._mesh, self._decode, self._scorer, self._gold = (
            mesh,
            encoder.tokenizer.decode,
            scorer,
            gold,
        )
        response = config.response
        self._rollout = jax.jit(
            functools.partial(
                rollout,
                for_generation(networks.policy, config.roles, mesh),
                max_new_tokens=response.max_new_tokens,
                stop_ids=stop_ids,
                temperature=response.temperature,
            )
        )
        self._assess = jax.jit(
            make_assess(
                networks,
                temperature=response.temperature,
                rows=config.microbatch,
                loss_chunk=config.execution.loss_chunk,
            )
        )
        self._watch = jax.jit(_watch)

    def place(self, prompts: PromptSet, indices: np.ndarray) -> dict[str, jax.Array]:
        """The tokens of some prompts on the mesh."""
        tokens, lengths = prompts.tokens[indices], prompts.lengths[indices]
        return place_rows(self._mesh, {"tokens": tokens, "lengths": lengths.astype(np.int32)})

    def answer(
        self,
        policy: Params,
        critic: Params,
        frozen: Frozen,
        prompts: Sequence[Prompt],
        placed: dict[str, jax.Array],
        seeds: jax.Array,
    ) -> Answers:
        """Answers by `policy`, with what all roles say of them."""
        # In one place wherever they come from, so that nothing is compiled again.
        seeds = jax.device_put(seeds, placed["lengths"].sharding)
        drawn = self._rollout(policy, placed["tokens"], placed["lengths"], seeds)
        experience = self._assess(policy, critic, frozen, drawn)
        texts = self._texts(drawn)
        if self._scorer is None:
            scores = jnp.mean(experience.scores, axis=0)
        else:
            values = self._scorer(prompts, texts).astype(np.float32)
            scores = place_rows(self._mesh, {"scores": values})["scores"]
        return Answers(prompts, texts, drawn, experience, scores)

    def _texts(self, trajectories: Trajectories) -> list[str]:
        """What was said, without end tokens; every process has all of it."""
        arrays = (trajectories.responses, trajectories.lengths, trajectories.finished)
        responses, lengths, finished = fetch(arrays)
        ends = lengths - finished
        return [self._decode(row[:end].tolist()) for row, end in zip(responses, ends, strict=True)]

    def describe(self, answers: Answers) -> Scalars:
        """What texts alone tell: gold scores and diversity."""
        gold = {
            f"gold/{name}": float(np.mean(score(answers.prompts, answers.texts)))
            for name, score in self._gold.items()
        }
        return gold | {
            "distinct_1": distinct_n(answers.texts, 1),
            "distinct_2": distinct_n(answers.texts, 2),
            "self_bleu": self_bleu(answers.texts),
        }

    def measure(self, answers: Answers) -> Scalars:
        """All that is watched of answers that nothing is learnt from."""
        found = self._watch(answers.trajectories, answers.experience, answers.scores)
        scalars = {name: float(value) for name, value in jax.device_get(found).items()}
        return scalars | self.describe(answers)

    def gold_scores(self, answers: Answers) -> dict[str, np.ndarray]:
        """What each gold measure gives to each answer, float64 [B]."""
        return {name: score(answers.prompts, answers.texts) for name, score in self._gold.items()}


def _watch(trajectories: Trajectories, experience: Experience, scores: jax.Array) -> dict:
    mask = length_mask(trajectories.lengths, trajectories.responses.shape[1])
    return watch(trajectories, experience, scores, mask)


class Iteration:
    """The step of the PPO stage: (state, frozen, inputs) -> (state, metrics).

    Inputs are `prompts`, `placed` (their tokens) and `ptx` (rows or None). All randomness comes
    from the state, so that an iteration that is done again gives the same result.
    """

    def __init__(self, player: Player, improve: Improve, template: TrainState):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
        self._player = player
        self._improve = jax.jit(improve, donate_argnums=0, out_shardings=(shardings, None))
        self._seeds = jax.jit(_seeds, static_argnums=1)

    def __call__(
        self, state: TrainState, frozen: Frozen, inputs: dict
    ) -> tuple[TrainState, dict[str, jax.Array | float]]:
        prompts = inputs["prompts"]
        answers = self._player.answer(
            state.params,
            state.extras[CRITIC],
            frozen,
            prompts,
            inputs["placed"],
            self._seeds(state, len(prompts)),
        )
        state, metrics = self._improve(
            state, answers.trajectories, answers.experience, answers.scores, inputs["ptx"]
        )
        # The device updates meanwhile.
        return state, metrics | self._player.describe(answers)


def _seeds(state: TrainState, count: int) -> jax.Array:
    return jax.random.bits(step_key(state), (count,), jnp.uint32)


class HeldOut:
    """The evaluation: policy and reference answer the same prompts, with the same seeds.

    Args:
      indices: int [B], which of the prompts, as many as an iteration has responses, so that the
        programs are the same.
      samples: how many answers are kept side by side.
    """

    def __init__(
        self,
        player: Player,
        prompts: PromptSet,
        indices: np.ndarray,
        frozen: Frozen,
        samples: int,
    ):
        self._player, self._frozen, self._samples = player, frozen, samples
        self._prompts = [prompts.prompts[index] for index in indices]
        self._placed = player.place(prompts, indices)
        self._seeds = jnp.arange(len(indices), dtype=jnp.uint32)
        self._reference: tuple[Answers, Scalars] | None = None

    def __call__(self, state: TrainState) -> tuple[Scalars, list[dict]]:
        """Scalars of the policy, those of the reference as NAME_reference, and samples."""
        policy, scalars = self._answers(state.params, state)
        if self._reference is None:
            self._reference = self._answers(self._frozen["reference"], state)
        reference, theirs = self._reference
        ours, base = fetch((policy.scores, reference.scores))
        wins = np.sign(ours.astype(np.float64) - base)
        named = {f"{name}_reference": value for name, value in theirs.items()}
        won = {"win_rate": float(np.mean((wins + 1) / 2))}
        return scalars | named | won, self._side_by_side(policy, reference)

    def _answers(self, params: Params, state: TrainState) -> tuple[Answers, Scalars]:
        answers = self._player.answer(
            params,
            state.extras[CRITIC],
            self._frozen,
            self._prompts,
            self._placed,
            self._seeds,
        )
        return answers, self._player.measure(answers)

    def _side_by_side(self, policy: Answers, reference: Answers) -> list[dict]:
        ours, theirs = self._player.gold_scores(policy), self._player.gold_scores(reference)
        scores = fetch((policy.scores, reference.scores))
        return [
            {
                "prompt": self._prompts[i],
                "completion": policy.texts[i],
                "reference": reference.texts[i],
                "score": float(scores[0][i]),
                "reference_score": float(scores[1][i]),
            }
            | {f"gold/{name}": float(values[i]) for name, values in ours.items()}
            | {f"reference_gold/{name}": float(values[i]) for name, values in theirs.items()}
            for i in range(min(self._samples, len(self._prompts)))
        ]
