"""Stage 4: proximal policy optimisation against a reward, held near the model it starts from."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from importlib import metadata

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instar.data.completions import CompletionEncoder
from instar.data.dataset import TokenDataset
from instar.data.prompts import PromptSet
from instar.data.rows import TrainingRows
from instar.errors import UserError
from instar.evaluation.alarms import Alarms
from instar.evaluation.scorers import open_scorer
from instar.interchange.reward import encoder_of
from instar.models.language_model import LanguageModel
from instar.models.reward_model import RewardModel
from instar.models.spec import ModelSpec
from instar.reinforcement.experience import Networks
from instar.reinforcement.update import make_improve
from instar.sharding import rules
from instar.sharding.mesh import make_mesh
from instar.sharding.processes import join_processes
from instar.stages.left_out import tell_left_out
from instar.stages.ppo_config import PpoConfig
from instar.stages.ppo_iteration import HeldOut, Iteration, Player
from instar.stages.ppo_roles import (
    Roles,
    make_card,
    make_networks,
    open_roles,
    print_memory,
    read_frozen,
)
from instar.stages.ppo_state import begin, finish, make_learners, make_template
from instar.stages.prefix import check_dataset
from instar.stages.run import conduct, facts_of, make_layout
from instar.training.agreement import first_before_others
from instar.training.flops import forward_flops_per_token, parameter_count
from instar.training.hardware import peak_of_devices
from instar.training.loop import Evaluation, Position, Scalars, Stage
from instar.training.metrics import read_metrics
from instar.training.state import TrainState
from instar.workdir import claim, record_start

# --- The run ------------------------------------------------------------------------------------


def ppo(config: PpoConfig, workdir: str) -> TrainState:
    """Improves a model by PPO and writes a report; resumes where it was stopped.

    Raises:
      UserError: the models, the prompts or the reward do not fit each other, or the mesh, the
        workdir or the sizes do not; nothing is overwritten.
      RunError: the run cannot go on.
    """
    join_processes()
    folder = epath.Path(workdir)
    mesh = make_mesh(config.mesh.of_whole_rows())
    make_layout(dataclasses.replace(config.batch, microbatch=config.microbatch), mesh)
    check_pretraining_rows(config, mesh)

    # Who takes part, what they are asked, and by what the answers are judged.
    roles = open_roles(config, folder)
    card = make_card(config, roles.parent)
    encoder = encoder_of(card)
    networks = make_networks(config, roles, card, encoder, mesh)
    prompts = open_prompts(config, encoder, "path")
    held_out = open_prompts(config, encoder, "held_out")
    example = prompts.prompts[0]
    scorer = open_scorer(config.reward.scorer, example) if config.reward.scorer else None
    gold = {name: open_scorer(each, example) for name, each in config.gold.items()}
    pretraining = open_pretraining(config, encoder, networks.policy.spec)

    data = {"prompts.path": prompts.digest}
    if held_out is not None:
        data["prompts.held_out"] = held_out.digest
    if pretraining is not None:
        data["ptx.data"] = pretraining.dataset.digest

    # What changes, and how.
    learners = make_learners(config, networks)
    template = make_template(config, networks, learners, mesh)
    player = Player(config, networks, encoder, card.stop_ids, mesh, scorer, gold)
    improve = make_improve(
        networks,
        learners,
        config.update,
        temperature=config.response.temperature,
        microbatch=config.microbatch,
        ema=config.ema,
        loss_chunk=config.execution.loss_chunk,
    )

    # Only now is anything written, and read into memory.
    first_before_others(lambda: claim(folder, config))
    print_memory(config, networks, template, mesh)
    frozen = read_frozen(config, roles, networks, mesh)
    evaluations = ()
    if held_out is not None:
        settings = config.evaluation
        indices = held_out.batch(config.seed, 0, config.batch.size)
        measure = HeldOut(player, held_out, indices, frozen, settings.samples)
        evaluations = (Evaluation("held_out", settings.every, measure),)
    peak, cost = peak_of_devices(), flops_per_token(config, networks)
    facts = facts_of(mesh, peak, parameter_count(card.spec).total, cost)
    bell = AlarmBell(config, folder, facts)
    stage = Stage(
        name="ppo",
        initialize=functools.partial(begin, config, roles, networks, learners, template, mesh),
        template=template,
        step=Iteration(player, improve, template),
        frozen=frozen,
        inputs=make_inputs(config, prompts, pretraining, player, mesh),
        start={"prompt": 0, "row": 0},
        lineage=functools.partial(describe_lineage, config, roles, encoder, data),
        observe=lambda position: {"epoch/prompts": position["prompt"] / len(prompts)},
        flops_per_token=cost,
        peak=peak,
        evaluations=evaluations,
        on_start=bell.on_start,
        finish=finish,
        watch=bell.watch,
        card=card.to_json(),
    )
    return conduct(stage, config, folder)


# --- Its parts ----------------------------------------------------------------------------------


def open_prompts(config: PpoConfig, encoder: CompletionEncoder, name: str) -> PromptSet | None:
    """The prompts that a field of `config.prompts` names; None where it names none."""
    path, field = getattr(config.prompts, name), f"prompts.{name}"
    if path is None:
        return None
    prompts = PromptSet.open(path, encoder, config.prompts.max_length, field)
    tell_left_out(field, prompts.facts, prompts.skipped)
    return prompts


def check_pretraining_rows(config: PpoConfig, mesh: Mesh) -> None:
    """Raises UserError where the rows of an update do not divide over microbatches and mesh."""
    if config.ptx is None:
        return
    shards, microbatches = rules.batch_shards(mesh), config.update.minibatch // config.microbatch
    if config.ptx.rows % (microbatches * shards):
        raise UserError(
            f"ptx.rows ({config.ptx.rows}) cannot be split evenly over the {microbatches} "
            f"microbatches of an update and {rules.axes_told(mesh, rules.RULES['batch'])} = "
            f"{shards}: make ptx.rows a multiple of {microbatches * shards}"
        )


def open_pretraining(
    config: PpoConfig, encoder: CompletionEncoder, spec: ModelSpec
) -> TrainingRows | None:
    """The rows whose gradient each update adds. Raises UserError where they do not fit."""
    if config.ptx is None:
        return None
    data = config.ptx.data
    dataset = TokenDataset.open(data.path)
    if dataset.tokenizer.digest != encoder.tokenizer.digest:
        raise UserError(
            f"ptx.data {data.path} was prepared with another tokenizer than that of parent "
            f"{config.parent}"
        )
    if data.sequence_length > spec.max_positions:
        raise UserError(
            f"ptx.data.sequence_length ({data.sequence_length}) exceeds the {spec.max_positions} "
            f"positions of parent {config.parent}"
        )
    check_dataset(spec, dataset, data)
    return TrainingRows(
        dataset, sequence_length=data.sequence_length, weights=data.weights, seed=config.seed
    )


def make_inputs(
    config: PpoConfig,
    prompts: PromptSet,
    pretraining: TrainingRows | None,
    player: Player,
    mesh: Mesh,
) -> Callable[[int, Position], Iterator[tuple[dict, Position]]]:
    """The function (step, position) -> prompts, and rows of pretraining text, from there on."""
    size = config.batch.size

    def inputs(step: int, position: Position) -> Iterator[tuple[dict, Position]]:
        prompt, row = position["prompt"], position["row"]
        while True:
            indices = prompts.batch(config.seed, prompt, size)
            ptx, count = None, 0
            if pretraining is not None:
                count = config.updates * config.ptx.rows
                rows = pretraining.rows(row + np.arange(count))
                ptx = place_updates(mesh, rows, config.updates)
            prompt, row = prompt + size, row + count
            given = {
                "prompts": [prompts.prompts[index] for index in indices],
                "placed": player.place(prompts, indices),
                "ptx": ptx,
            }
            yield given, {"prompt": prompt, "row": row}

    return inputs


def place_updates(mesh: Mesh, rows: dict[str, np.ndarray], updates: int) -> dict[str, jax.Array]:
    """Rows of text [updates * rows, sequence] as arrays [updates, rows, sequence] on the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(None, rules.RULES["batch"]))

    def array(values: np.ndarray) -> jax.Array:
        values = values.reshape(updates, -1, *values.shape[1:])
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return {name: array(values) for name, values in rows.items()}


def flops_per_token(config: PpoConfig, networks: Networks) -> float:
    """Model FLOP of an iteration for each of its tokens: what each role reads, and how often.

    The policy reads a response as it draws it and once more, and, like the critic, at the cost of
    three passes in each epoch; every other role reads it once. So, by three passes of the policy,
    are the rows of pretraining text that go with each update, which are no tokens of an iteration.
    """
    length = config.prompts.max_length + config.response.max_new_tokens
    trained = 3 * config.update.epochs

    def cost(model: LanguageModel | RewardModel | None) -> float:
        return 0.0 if model is None else forward_flops_per_token(model.spec, length)

    members, pretraining = networks.reward.members if networks.reward else 0, 0.0
    if config.ptx is not None:
        sequence = config.ptx.data.sequence_length
        read = config.updates * config.ptx.rows * sequence / (config.batch.size * length)
        pretraining = 3 * read * forward_flops_per_token(networks.policy.spec, sequence)
    return (
        cost(networks.policy) * (2 + trained)
        + cost(networks.critic) * (1 + trained)
        + cost(networks.reference)
        + cost(networks.reward) * members
        + cost(networks.base)
        + pretraining
    )


def describe_lineage(
    config: PpoConfig,
    roles: Roles,
    encoder: CompletionEncoder,
    data: dict[str, str],
    position: Position,
) -> dict:
    """Where a checkpoint comes from: its parent, its data, and the models that judged it."""
    others = {"reward": roles.reward, "critic": roles.critic, "base": roles.base}
    length = config.prompts.max_length + config.response.max_new_tokens
    judged = {name: opened.lineage for name, opened in others.items() if opened is not None}
    return judged | {
        "parent": roles.parent.lineage,
        "tokenizer": encoder.tokenizer.digest,
        "data": data,
        "tokens": position["prompt"] * length,
        "instar": metadata.version("instar"),
    }


class AlarmBell:
    """Rings where an iteration's scalars are alarming; a resumed run knows of those before."""

    def __init__(self, config: PpoConfig, folder: epath.Path, facts: dict):
        self._config, self._folder, self._facts = config.alarms, folder, facts
        self._alarms = Alarms(config.alarms)

    def on_start(self, step: int) -> None:
        """Records the start, and goes through what the log says of earlier iterations."""
        record_start(self._folder, step, facts=self._facts)
        self._alarms = Alarms(self._config)
        for line in read_metrics(self._folder):
            if "score" in line and line["step"] <= step:
                self._alarms.update(int(line["step"]), line)

    def watch(self, step: int, scalars: Scalars) -> list[str]:
        """The alarms of an iteration, which are also marked in its scalars."""
        rung = self._alarms.update(step, scalars)
        scalars |= {f"alarm/{alarm.name}": 1.0 for alarm in rung}
        return [alarm.sentence for alarm in rung]
