"""Stage 3: a reward model, learnt from which of several completions people preferred."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from instar.data.completions import CompletionEncoder
from instar.data.preferences import Comparisons
from instar.data.rated_texts import RatedTexts
from instar.errors import UserError
from instar.evaluation.bag_of_words import read_ratings
from instar.evaluation.judges import bag_of_words
from instar.evaluation.reward_evaluation import RESULTS, RewardEvaluation
from instar.interchange.card import ModelCard
from instar.interchange.loading import Opened
from instar.interchange.parents import pin
from instar.interchange.reward import TextScores, encoder_of, template_source
from instar.models.language_model import LanguageModel, Params
from instar.models.reward_model import RewardModel
from instar.objectives.preference import ranking_loss
from instar.sharding import rules
from instar.sharding.mesh import make_mesh
from instar.sharding.processes import join_processes
from instar.stages.left_out import tell_left_out
from instar.stages.prefix import check_template
from instar.stages.reward_batches import ComparisonBatches
from instar.stages.reward_config import RewardConfig
from instar.stages.reward_normalise import Normaliser, demonstrations, sampler
from instar.stages.run import (
    Recipe,
    check_attention,
    make_execution,
    make_layout,
    run,
)
from instar.training.flops import parameter_count, train_flops_per_token
from instar.training.loop import Evaluation, Position
from instar.training.state import TrainState
from instar.training.step import LossSums
from instar.workdir import write_json

# From what a reward model is made: language models, and reward models that are trained on.
PARENTS = ("pretrain", "import", "sft", "reward")

# --- The run ------------------------------------------------------------------------------------


def reward(config: RewardConfig, workdir: str) -> TrainState:
    """Trains a reward model on comparisons and writes a report; resumes where it was stopped.

    Raises:
      UserError: the parent or the data do not fit each other, or the mesh, the workdir or the sizes
        do not; nothing is overwritten.
      RunError: the run cannot go on.
    """
    join_processes()
    folder = epath.Path(workdir)
    parent = pin(folder, "parent", config.parent)
    card = make_card(config, parent)
    encoder, mesh = encoder_of(card), make_mesh(config.mesh.of_whole_rows())

    # What is compared, and what is trained.
    comparisons = Comparisons.open(config.data, encoder)
    tell_left_out("data", comparisons.facts, comparisons.skipped)
    config = dataclasses.replace(config, steps=count_steps(config, len(comparisons)))
    model = RewardModel(card.spec, card.members, make_execution(config, mesh))
    check_sizes(config, model, encoder, mesh)
    inputs = ComparisonBatches(
        comparisons,
        config.batch,
        make_layout(config.batch, mesh),
        members=model.members,
        seed=config.seed,
        row_length=config.data.max_length,
    )

    # What becomes of it in the end, and by what it is judged.
    scores = TextScores(model, mesh)
    finish = make_finish(config, parent, encoder, model, scores, mesh, folder)
    evaluation = make_evaluation(config, encoder, scores)
    evaluations = (
        Evaluation("eval", config.evaluation.every, lambda s: (evaluation.quick(s.params), [])),
    )

    recipe = Recipe(
        name="reward",
        card=card,
        model=model,
        loss=make_loss(model, config),
        inputs=inputs,
        start={"group": 0, "tokens": 0},
        lineage=functools.partial(describe_lineage, comparisons, encoder, parent.lineage),
        observe=lambda position: {"epoch/comparisons": position["group"] / len(comparisons)},
        evaluations=evaluations,
        parameters=model.members * parameter_count(model.spec).total,
        flops_per_token=train_flops_per_token(model.spec, config.data.max_length),
        params=functools.partial(read_params, config, parent, model, mesh),
        finish=finish,
        conclude=functools.partial(write_results, config, evaluation, folder),
    )
    return run(config, folder, mesh, recipe)


# --- Its parts ----------------------------------------------------------------------------------


def make_card(config: RewardConfig, parent: Opened) -> ModelCard:
    """What the reward model is.

    Raises:
      UserError: nothing of the kind can be made of the parent.
    """
    stage, known = parent.lineage["stage"], parent.card.members
    if stage not in PARENTS:
        raise UserError(
            f"parent {config.parent} comes from stage {stage}, and reward goes on from "
            f"{', '.join(PARENTS)}"
        )
    if known not in (None, 1) and config.members not in (None, known):
        raise UserError(
            f"parent {config.parent} is a reward model of {known} members, and members is "
            f"{config.members}: leave members out"
        )
    return dataclasses.replace(
        parent.card,
        spec=parent.card.spec.replace(output="scalar"),
        chat_template=template_source(parent.card, config.chat_template, config.parent),
        members=config.members or known or 1,
    )


def count_steps(config: RewardConfig, groups: int) -> int:
    """The steps of the config, or as many as read its epochs of `groups` groups."""
    if config.steps is not None:
        return config.steps
    return max(math.ceil(config.epochs * groups / config.batch.size), 1)


def check_sizes(
    config: RewardConfig, model: RewardModel, encoder: CompletionEncoder, mesh: Mesh
) -> None:
    """Raises UserError where the texts, the tokenizer or the mesh do not fit the model."""
    spec, vocabulary = model.spec, encoder.tokenizer.vocab_size
    if config.data.max_length > spec.max_positions:
        raise UserError(
            f"data.max_length ({config.data.max_length}) exceeds the {spec.max_positions} "
            f"positions of parent {config.parent}"
        )
    if spec.vocab_size < vocabulary:
        raise UserError(
            f"the vocabulary of parent {config.parent} ({spec.vocab_size}) is smaller than its "
            f"tokenizer's ({vocabulary})"
        )
    check_template(spec, encoder.tokenizer, encoder.template, f"parent {config.parent}")
    rules.check_divisible(mesh, model.axes, model.shapes)
    check_attention(model.model, mesh, config.data.max_length)


def read_params(config: RewardConfig, parent: Opened, model: RewardModel, mesh: Mesh) -> Params:
    """The parameters to begin with: a reward model's, or a language model's with fresh heads.

    Where the parent is one network, each member begins with a copy of it.
    """
    dtype, known = jnp.dtype(jnp.float32), parent.card.members
    if known == model.members:
        return parent.read(model, dtype, mesh)
    if known == 1:
        one = RewardModel(model.spec, 1, model.execution)
        body = one.member(parent.read(one, dtype, mesh), 0)
        params = dict.fromkeys(model.shapes, body)
    else:
        body = LanguageModel(parent.card.spec, model.execution)
        params = model.from_language(parent.read(body, dtype, mesh), jax.random.key(config.seed))
    # Each member needs memory of its own, which the run takes over.
    return jax.tree.map(jnp.copy, params)


def make_loss(model: RewardModel, config: RewardConfig) -> LossSums:
    """The mean over members of what `ranking_loss` gives, summed over a microbatch's prompts.

    The gradient of a member is what it would be alone.
    """

    def loss_sums(params: dict, frozen: None, batch: dict, key: jax.Array) -> tuple:
        each = []
        for index in range(model.members):
            mine = {name: values[:, index] for name, values in batch.items()}
            scores = model.packed_scores(
                model.member(params, index),
                mine,
                dropout=config.dropout,
                key=jax.random.fold_in(key, index),
            )
            ranks = mine["ranks"]
            gaps = jnp.abs(ranks[:, :, None] - ranks[:, None, :])
            margin = config.margin + config.gap_margin * gaps
            doubt = jax.nn.sigmoid(-gaps / config.gap_noise) if config.gap_noise else 0.0
            loss, stats = ranking_loss(scores, ranks, mine["mask"], margin, config.centring, doubt)
            prompts = stats["prompts"].astype(jnp.float32)
            each.append(
                {"loss": loss * prompts, "weight": prompts}
                | {"accuracy": stats["accuracy"] * prompts}
            )
        sums = jax.tree.map(lambda *values: sum(values), *each)
        means = jax.tree.map(lambda total: total / model.members, sums)
        return sums["loss"], means | {"tokens": jnp.sum(batch["segment_ids"] > 0)}

    return loss_sums


def make_finish(
    config: RewardConfig,
    parent: Opened,
    encoder: CompletionEncoder,
    model: RewardModel,
    scores: TextScores,
    mesh: Mesh,
    folder: epath.Path,
) -> Callable[[TrainState], TrainState]:
    """What `normalise` asks for after the last step. Raises UserError where it cannot be done."""
    settings, positions = config.normalise, model.spec.max_positions
    if settings.kind == "none":
        return lambda state: state
    if settings.kind == "demonstrations":
        texts = demonstrations(settings, encoder, positions)
        return Normaliser(lambda: texts, False, scores, model)
    policy = parent
    if settings.policy is not None:
        policy = pin(folder, "policy", settings.policy, field="normalise.policy")
    texts = sampler(settings, policy, encoder, mesh, positions, config.seed)
    return Normaliser(texts, True, scores, model)


def make_evaluation(
    config: RewardConfig, encoder: CompletionEncoder, scores: TextScores
) -> RewardEvaluation:
    """What judges the model on the config's sets. Raises UserError where a file cannot be read."""
    settings = config.evaluation
    if settings.baseline and importlib.util.find_spec("sklearn") is None:
        raise UserError(
            'evaluation.baseline needs scikit-learn: install Instar with the extra "demo", or '
            "leave it out"
        )
    for path in settings.baseline:  # which are not needed before the last step
        read_ratings(path, field="evaluation.baseline")
    length = settings.max_length or config.data.max_length
    sets = {
        name: RatedTexts.open(path, encoder, length, config.data.group, f"evaluation.sets.{name}")
        for name, path in settings.sets.items()
    }
    for name, rated in sets.items():
        tell_left_out(f"evaluation.sets.{name}", rated.facts, rated.skipped)
    return RewardEvaluation(sets, scores, limit=settings.limit, final=settings.texts)


def write_results(
    config: RewardConfig, evaluation: RewardEvaluation, folder: epath.Path, state: TrainState
) -> None:
    """Measures the finished model on all of its sets, for `reward.json`."""
    if not config.evaluation.sets:
        return
    files = config.evaluation.baseline

    def words(prompts: list, completions: list) -> np.ndarray:
        return bag_of_words(prompts, completions, *files)

    found = evaluation.whole(state.params, words if files else None)
    results = {
        "step": int(state.step),
        "members": len(state.params),
        "baseline": list(files),
        "sets": found,
    }
    if jax.process_index() == 0:
        write_json(folder / RESULTS, results)


def describe_lineage(
    comparisons: Comparisons, encoder: CompletionEncoder, parent: dict, position: Position
) -> dict:
    """Where a checkpoint comes from."""
    return {
        "parent": parent,
        "tokenizer": encoder.tokenizer.digest,
        "data": comparisons.digest,
        "tokens": position["tokens"],
        "instar": metadata.version("instar"),
    }
