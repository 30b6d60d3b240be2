"""From where a reward model's scores are measured, as part of its heads."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instar.data.completion_files import read_json_lines, required
from instar.data.completions import CompletionEncoder
from instar.data.prompts import PromptSet
from instar.errors import RunError, UserError
from instar.interchange.loading import Opened
from instar.interchange.model import Model
from instar.interchange.reward import TextScores
from instar.models.language_model import LanguageModel
from instar.models.reward_model import RewardModel
from instar.models.transformer import Execution
from instar.sharding.execution import on_mesh
from instar.stages.left_out import tell_left_out
from instar.stages.prefix import check_template
from instar.stages.reward_config import NormaliseConfig
from instar.training.state import TrainState

# Stages whose checkpoints are of a language model, which can be sampled.
POLICIES = ("pretrain", "import", "sft", "ppo")

Texts = Callable[[], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Normaliser:
    """What `Stage.finish` does to a reward model.

    Attributes:
      texts: makes or reads the texts, as token ids, whose scores are to have mean 0.
      scale: whether their standard deviation is to be 1 too.
      scores: how they are scored.
    """

    texts: Texts
    scale: bool
    scores: TextScores
    model: RewardModel

    def __call__(self, state: TrainState) -> TrainState:
        """The state with new heads.

        Raises:
          RunError: a member gives all texts the same score, which no gain spreads.
        """
        scores = self.scores(state.params, self.texts())
        mean, std = scores.mean(axis=1), scores.std(axis=1)
        if self.scale and not np.all(std > 0):
            raise RunError(
                "normalise.kind samples needs scores that differ, and a member gives every sample "
                "the same: give it other prompts, or more of them"
            )
        gain = 1 / std if self.scale else np.ones_like(std)
        params = self.model.rescaled(state.params, gain, -mean * gain)
        return dataclasses.replace(state, params=params)


def demonstrations(
    config: NormaliseConfig, encoder: CompletionEncoder, max_positions: int
) -> Sequence[Sequence[int]]:
    """The texts of people's completions, at most `config.count` of them, spread over the file.

    Raises:
      UserError: the file cannot be read or is mostly broken, or no text is short enough.
    """

    def parse(record: Mapping[str, Any]) -> list[int]:
        if "messages" not in record:
            return encoder.whole(required(record, "prompt"), required(record, "completion"))
        messages = record["messages"]
        if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
            raise UserError("messages must be a list of messages")
        if messages[-1].get("role") != "assistant":
            raise UserError("messages must end with the assistant's")
        return encoder.whole(messages[:-1], required(messages[-1], "content"))

    read = read_json_lines(config.path, "normalise.path", encoder, parse)
    fitting = [ids for ids in read.items if len(ids) <= max_positions]
    if not fitting:
        raise UserError(
            f"normalise.path {config.path}: none of its {len(read.items)} texts fits into the "
            f"{max_positions} positions of the model"
        )
    facts = {
        "records": len(read.items) + len(read.skipped),
        "skipped": len(read.skipped),
        "too_long": len(read.items) - len(fitting),
        "texts": len(fitting),
    }
    tell_left_out("normalise.path", facts, read.skipped)
    return spread(fitting, config.count)


def sampler(
    config: NormaliseConfig,
    policy: Opened,
    encoder: CompletionEncoder,
    mesh: Mesh,
    max_positions: int,
    seed: int,
) -> Texts:
    """What samples `policy` on the prompts of a file and gives the texts of both.

    Raises:
      UserError: the policy is no language model or reads other tokens, or there are no prompts.
    """
    stage, known = policy.lineage["stage"], policy.card.tokenizer
    if stage not in POLICIES or policy.card.members is not None:
        raise UserError(
            f"normalise.policy comes from stage {stage}, and samples come from a language model: "
            f"name one of {', '.join(POLICIES)}"
        )
    if known is None or known.digest != encoder.tokenizer.digest:
        raise UserError("normalise.policy has another tokenizer than the parent: name another")
    check_template(policy.card.spec, known, encoder.template, "normalise.policy")
    room = min(policy.card.spec.max_positions, max_positions)
    prompts = PromptSet.open(config.path, encoder, room - 1, "normalise.path")
    tell_left_out("normalise.path", prompts.facts, prompts.skipped)

    def texts() -> Sequence[Sequence[int]]:
        execution = on_mesh(mesh, Execution())
        language_model = LanguageModel(policy.card.spec, execution)
        params = policy.read(language_model, jnp.dtype(jnp.float32), mesh)
        # Whatever the policy was trained on, it ends here as the reward model's texts do.
        card = policy.card.stopping_at(encoder.stop_ids)
        model = Model(card, language_model, params, mesh)
        chosen = spread(range(len(prompts)), config.count)
        ids = [prompts.tokens[i, : prompts.lengths[i]].tolist() for i in chosen]
        drawn = model.generate(ids, sampling=config.sampling, seed=seed)
        whole = [
            encoder.whole(prompts.prompts[i], completion.text)
            for i, completion in zip(chosen, drawn, strict=True)
        ]
        return [ids for ids in whole if len(ids) <= max_positions]

    return texts


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
