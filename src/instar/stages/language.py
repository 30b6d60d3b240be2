"""The run that all stages share which learn to predict tokens."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from instar.config import to_dict
from instar.data.dataset import TokenDataset
from instar.data.loader import batches
from instar.data.rows import HeldOutRows, TrainingRows
from instar.errors import UserError
from instar.evaluation.perplexity import evaluate, make_evaluation_step
from instar.evaluation.report import write_report
from instar.generation.engine import Engine
from instar.interchange.card import ModelCard
from instar.interchange.model import Model, Prompt
from instar.models.language_model import LanguageModel, Params
from instar.models.parameters import Initialization
from instar.models.spec import ModelSpec
from instar.models.transformer import Execution
from instar.objectives.language import next_token_sums
from instar.sharding import rules
from instar.sharding.inputs import BatchLayout, place_rows
from instar.stages.config import BatchConfig, LanguageConfig
from instar.training.flops import parameter_count, train_flops_per_token
from instar.training.hardware import describe_hardware, peak_of_devices
from instar.training.loop import Evaluation, LoopConfig, Position, Stage, train
from instar.training.optimizer import make_optimizer, make_schedule
from instar.training.state import (
    TrainState,
    initialize_state,
    make_initializer,
    state_of,
    state_template,
)
from instar.training.step import LossSums, compile_step, make_step
from instar.workdir import claim, record_start

# --- The run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """What a stage begins with.

    Attributes:
      name: of the stage.
      card: what its checkpoints say of their model.
      initialization: how fresh parameters are drawn, where `params` gives none.
      params: reads those of the parent, in the layout of a run's own.
      parent: what checkpoints say of the parent; None for none.
      as_prompt: what a prompt of the evaluation, a text, is to the model.
    """

    name: str
    card: ModelCard
    initialization: Initialization = field(default_factory=Initialization)
    params: Callable[[], Params] | None = None
    parent: dict | None = None
    as_prompt: Callable[[str], Prompt] = lambda text: text


def run_stage(
    config: LanguageConfig,
    folder: epath.Path,
    dataset: TokenDataset,
    model: LanguageModel,
    mesh: Mesh,
    start: Start,
) -> TrainState:
    """Trains `model` on `dataset` and writes a report; resumes where it was stopped.

    Raises:
      UserError: the data, the workdir or the sizes do not fit; nothing is overwritten.
      RunError: the run cannot go on.
    """
    run_config = to_dict(config)

    # What is trained on, and what is trained.
    rows = TrainingRows(
        dataset,
        sequence_length=config.data.sequence_length,
        weights=config.data.weights,
        seed=config.seed,
    )
    layout = make_layout(config.batch, mesh)
    optimizer = make_optimizer(config.optimizer, model.axes)
    initialize = make_initializer(model, optimizer, start.initialization)
    template = state_template(initialize, mesh, model.axes)

    def initial_state() -> TrainState:
        if start.params is None:
            return initialize_state(initialize, template, config.seed)
        return state_of(start.params(), optimizer, template, config.seed)

    # How: one compiled step.
    step = make_step(
        make_loss(model, config),
        optimizer,
        make_schedule(config.schedule, config.steps),
        learning_rate=config.optimizer.learning_rate,
        clip_norm=config.optimizer.clip_norm,
    )

    # By what it is judged.
    evaluations = make_evaluations(config, model, dataset, mesh, start)

    # Only now is anything written.
    claim(folder, run_config)
    peak = peak_of_devices()
    flops_per_token = train_flops_per_token(model.spec, config.data.sequence_length)
    facts = {
        "hardware": describe_hardware(),
        "mesh": dict(mesh.shape),
        "peak": to_dict(peak),
        "parameters": parameter_count(model.spec).total,
        "flops_per_token": flops_per_token,
    }
    stage = Stage(
        name=start.name,
        initialize=initial_state,
        template=template,
        step=compile_step(step, template),
        frozen=None,
        inputs=make_inputs(config, rows, layout),
        start={"row": 0},
        lineage=functools.partial(describe_lineage, config, dataset, start.parent),
        observe=lambda position: describe_position(rows, position),
        flops_per_token=flops_per_token,
        peak=peak,
        evaluations=evaluations,
        on_start=functools.partial(record_start, folder, facts=facts),
        card=start.card.to_json(),
    )
    loop = LoopConfig(config.steps, config.checkpoint, config.failure, config.logging)
    state = train(stage, loop, folder, run_config)
    if jax.process_index() == 0:
        write_report(folder)
    return state


# --- Its parts ----------------------------------------------------------------------------------


def make_model(
    config: LanguageConfig, spec: ModelSpec, dataset: TokenDataset, mesh: Mesh
) -> LanguageModel:
    """The model, checked against the tokenizer, the rows and the mesh."""
    length, tokenizer = config.data.sequence_length, dataset.tokenizer
    if spec.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the model's vocabulary ({spec.vocab_size}) is smaller than the tokenizer's "
            f"({tokenizer.vocab_size}): make model.vocab_size at least that, or leave it out"
        )
    if spec.max_positions < length:
        raise UserError(
            f"data.sequence_length ({length}) exceeds the model's {spec.max_positions} positions"
        )
    execution = Execution(
        dtype=jnp.dtype(config.compute_dtype),
        remat=config.execution.remat,
        unroll=config.execution.unroll,
        constrain=rules.constrain(mesh),
    )
    model = LanguageModel(spec, execution)
    rules.check_divisible(mesh, model.axes, model.shapes)
    return model


def make_layout(config: BatchConfig, mesh: Mesh) -> BatchLayout:
    """How a step's rows lie on the mesh."""
    micro = config.microbatch or config.size
    layout = BatchLayout(mesh, config.size // micro, micro)
    layout.check()
    return layout


def make_loss(model: LanguageModel, config: LanguageConfig) -> LossSums:
    """Sum over a microbatch of -log p(target) + z_loss * (log Z)^2."""

    def loss_sums(params: dict, frozen: None, batch: dict, key: jax.Array) -> tuple:
        hidden, _ = model.apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            dropout=config.dropout,
            key=key,
        )
        sums = next_token_sums(
            hidden,
            model.head(params),
            batch["targets"],
            batch["weights"],
            config.execution.loss_chunk,
        )
        loss = sums["nats"] + config.z_loss * sums["log_z_squared"]
        return loss, {"loss": sums["nats"], "weight": sums["weight"]}

    return loss_sums


def rows_of_steps(config: BatchConfig) -> Iterator[int]:
    """The rows of step 0, 1, ...: a function of the config alone."""
    if config.ramp is not None:
        ramp, done = config.ramp, 0
        levels = (config.size - ramp.start) // ramp.increment + 1
        while done < ramp.rows:
            level = done * levels // ramp.rows
            count = min(ramp.start + level * ramp.increment, config.size)
            yield count
            done += count
    yield from itertools.repeat(config.size)


def make_inputs(
    config: LanguageConfig, rows: TrainingRows, layout: BatchLayout
) -> Callable[[int, Position], Iterator[tuple[dict, Position]]]:
    """The function (step, position) -> the batches from there on, on the mesh."""

    def inputs(step: int, position: Position) -> Iterator[tuple[dict, Position]]:
        counts = itertools.islice(rows_of_steps(config.batch), step, None)
        loaded = batches(rows, counts, position["row"], layout.local_offsets, config.loader)
        for batch, count, next_row in loaded:
            yield layout.place(batch, count), {"row": next_row}

    return inputs


def describe_position(rows: TrainingRows, position: Position) -> dict[str, float]:
    """The epochs of each source that the rows before a position make up."""
    return {f"epoch/{name}": value for name, value in rows.epochs(position["row"]).items()}


def describe_lineage(
    config: LanguageConfig, dataset: TokenDataset, parent: dict | None, position: Position
) -> dict:
    """Where a checkpoint comes from."""
    return {
        "parent": parent,
        "tokenizer": dataset.tokenizer.digest,
        "data": dataset.digest,
        "tokens": position["row"] * config.data.sequence_length,
        "instar": metadata.version("instar"),
    }


def make_evaluations(
    config: LanguageConfig, model: LanguageModel, dataset: TokenDataset, mesh: Mesh, start: Start
) -> tuple[Evaluation, ...]:
    """Held-out loss, and continuations of the config's prompts."""
    settings = config.evaluation
    size = settings.batch or config.batch.microbatch or config.batch.size
    add = make_evaluation_step(model, config.execution.loss_chunk)
    held_out = HeldOutRows(
        dataset, sequence_length=config.data.sequence_length, batch=size, limit=settings.rows
    )

    def measure(state: TrainState) -> tuple[dict, list]:
        placed = (place_rows(mesh, batch) for batch in held_out)
        return evaluate(add, state.params, placed, held_out.tokens_per_byte), []

    evaluations = [Evaluation("eval", settings.every, measure)]
    if settings.prompts:
        described = Model(start.card, model, {}, mesh)
        engine = Engine(model, dataset.tokenizer.decode, mesh=mesh)
        requests = [
            described.request(
                start.as_prompt(prompt), settings.sampling, (config.seed + index) % 2**32
            )
            for index, prompt in enumerate(settings.prompts)
        ]
        engine.check(requests, "evaluation.prompts")

        def continue_prompts(state: TrainState) -> tuple[dict, list]:
            completions = engine.generate(state.params, requests)
            pairs = zip(settings.prompts, completions, strict=True)
            return {}, [{"prompt": prompt, "completion": done.text} for prompt, done in pairs]

        evaluations.append(Evaluation("samples", settings.every, continue_prompts))
    return tuple(evaluations)
