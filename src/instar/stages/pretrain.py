"""Stage 1: next-token prediction on raw text."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from instar.config import to_dict
from instar.data.dataset import TokenDataset
from instar.data.loader import LoaderConfig, batches
from instar.data.rows import HeldOutRows, TrainingRows
from instar.errors import UserError
from instar.evaluation.perplexity import evaluate, make_evaluation_step
from instar.evaluation.report import write_report
from instar.families.registry import ModelConfig, build_spec
from instar.generation.engine import Engine
from instar.generation.requests import Request
from instar.generation.sampling import SamplingConfig
from instar.interchange.card import ModelCard
from instar.models.language_model import LanguageModel
from instar.models.parameters import Initialization
from instar.models.spec import ModelSpec
from instar.models.transformer import Execution, Remat
from instar.objectives.language import next_token_sums
from instar.sharding import rules
from instar.sharding.inputs import BatchLayout, place_rows
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.sharding.processes import join_processes
from instar.training.checkpoint import CheckpointConfig
from instar.training.failure import FailureConfig
from instar.training.flops import parameter_count, train_flops_per_token
from instar.training.hardware import describe_hardware, peak_of_devices
from instar.training.loop import Evaluation, LoopConfig, Position, Stage, train
from instar.training.metrics import LoggingConfig
from instar.training.optimizer import OptimizerConfig, ScheduleConfig, make_optimizer, make_schedule
from instar.training.state import TrainState, initialize_state, make_initializer, state_template
from instar.training.step import LossSums, compile_step, make_step
from instar.workdir import claim, record_start

# --- Configuration ------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """A prepared data set, the length of its rows, and the weight of each of its sources.

    Without `weights` each source counts by its tokens.
    """

    path: str
    sequence_length: int
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RampConfig:
    """A batch that grows linearly from `start` rows, by `increment`, over the first `rows` rows."""

    start: int
    increment: int
    rows: int


@dataclass(frozen=True)
class BatchConfig:
    """Rows of a step, and how many of them are on the mesh at once (None: all)."""

    size: int
    microbatch: int | None = None
    ramp: RampConfig | None = None

    def check(self) -> None:
        micro = self.microbatch or self.size
        if self.size < 1 or micro < 1 or self.size % micro:
            raise UserError(
                f"batch.size ({self.size}) must be a positive multiple of "
                f"batch.microbatch ({micro})"
            )
        ramp = self.ramp
        if ramp is None:
            return
        for name in ("start", "increment"):
            value = getattr(ramp, name)
            if value < 1 or value % micro:
                raise UserError(
                    f"batch.ramp.{name} ({value}) must be a positive multiple of "
                    f"batch.microbatch ({micro})"
                )
        if ramp.start > self.size or ramp.rows < 1:
            raise UserError(
                f"batch.ramp must start at no more than batch.size ({self.size}) rows and last "
                "for at least one row"
            )


@dataclass(frozen=True)
class ExecutionConfig:
    """How the step is computed; see `instar.models.transformer.Execution`.

    `loss_chunk` is how many positions of each row the head reads at a time (0: all).
    """

    remat: Remat = "none"
    unroll: int = 1
    loss_chunk: int = 0


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss and sample continuations, every `every` steps and at the end.

    `rows` bounds the held-out rows that are read (None: all of them).
    """

    every: int = 1000
    rows: int | None = None
    batch: int | None = None
    prompts: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def check(self) -> None:
        if self.every < 1:
            raise UserError(f"evaluation.every must be at least 1, not {self.every}")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that `instar pretrain` is told."""

    data: DataConfig
    model: ModelConfig
    batch: BatchConfig
    steps: int
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    initialization: Initialization = field(default_factory=Initialization)
    dropout: float = 0.0
    z_loss: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    failure: FailureConfig = field(default_factory=FailureConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def check(self) -> None:
        length, positions = self.data.sequence_length, self.model.max_positions
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}")
        if length < 1:
            raise UserError(f"data.sequence_length must be at least 1, not {length}")
        if positions is not None and length > positions:
            raise UserError(
                f"data.sequence_length ({length}) exceeds model.max_positions ({positions})"
            )
        chunk = self.execution.loss_chunk
        if chunk and length % chunk:
            raise UserError(
                f"execution.loss_chunk ({chunk}) must divide data.sequence_length ({length})"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.z_loss < 0:
            raise UserError(f"z_loss must not be negative ({self.z_loss})")
        make_schedule(self.schedule, self.steps)


# --- The stage ----------------------------------------------------------------------------------


def pretrain(config: PretrainConfig, workdir: str) -> TrainState:
    """Trains a model on a prepared data set and writes a report; resumes where it was stopped.

    Raises:
      UserError: the data, the mesh, the workdir or the sizes do not fit; nothing is overwritten.
      RunError: the run cannot go on.
    """
    join_processes()
    folder, run_config = epath.Path(workdir), to_dict(config)

    # What is trained on.
    dataset = TokenDataset.open(config.data.path)
    rows = TrainingRows(
        dataset,
        sequence_length=config.data.sequence_length,
        weights=config.data.weights,
        seed=config.seed,
    )

    # What is trained, and where.
    mesh = make_mesh(config.mesh)
    layout = make_layout(config.batch, mesh)
    model = make_model(config, dataset, mesh)
    optimizer = make_optimizer(config.optimizer, model.axes)
    initialize = make_initializer(model, optimizer, config.initialization)
    template = state_template(initialize, mesh, model.axes)

    # How: one compiled step.
    step = make_step(
        make_loss(model, config),
        optimizer,
        make_schedule(config.schedule, config.steps),
        learning_rate=config.optimizer.learning_rate,
        clip_norm=config.optimizer.clip_norm,
    )

    # By what it is judged.
    evaluations = make_evaluations(config, model, dataset, mesh)

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
        name="pretrain",
        initialize=functools.partial(initialize_state, initialize, template, config.seed),
        template=template,
        step=compile_step(step, template),
        frozen=None,
        inputs=make_inputs(config, rows, layout),
        start={"row": 0},
        lineage=functools.partial(describe_lineage, dataset, config.data.sequence_length),
        observe=lambda position: describe_position(rows, position),
        flops_per_token=flops_per_token,
        peak=peak,
        evaluations=evaluations,
        on_start=functools.partial(record_start, folder, facts=facts),
        card=ModelCard(
            model.spec, dataset.tokenizer, stop_ids=(dataset.tokenizer.eos_id,)
        ).to_json(),
    )
    loop = LoopConfig(config.steps, config.checkpoint, config.failure, config.logging)
    state = train(stage, loop, folder, run_config)
    if jax.process_index() == 0:
        write_report(folder)
    return state


# --- Its parts ----------------------------------------------------------------------------------


def make_model(config: PretrainConfig, dataset: TokenDataset, mesh: Mesh) -> LanguageModel:
    """The model, checked against the tokenizer and the mesh."""
    length, tokenizer = config.data.sequence_length, dataset.tokenizer
    spec: ModelSpec = build_spec(
        config.model, vocab_size=tokenizer.vocab_size, max_positions=length
    )
    if spec.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size ({spec.vocab_size}) is smaller than the tokenizer's "
            f"({tokenizer.vocab_size}): leave it out, or make it at least that"
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


def make_loss(model: LanguageModel, config: PretrainConfig) -> LossSums:
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
    config: PretrainConfig, rows: TrainingRows, layout: BatchLayout
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


def describe_lineage(dataset: TokenDataset, sequence_length: int, position: Position) -> dict:
    """Where a checkpoint comes from."""
    return {
        "parent": None,
        "tokenizer": dataset.tokenizer.digest,
        "data": dataset.digest,
        "tokens": position["row"] * sequence_length,
        "instar": metadata.version("instar"),
    }


def make_evaluations(
    config: PretrainConfig, model: LanguageModel, dataset: TokenDataset, mesh: Mesh
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
        tokenizer = dataset.tokenizer
        engine = Engine(model, tokenizer.decode, mesh=mesh)
        requests = [
            Request(
                [tokenizer.bos_id, *tokenizer.encode(prompt)],
                settings.sampling,
                seed=(config.seed + index) % 2**32,
                stop_ids=(tokenizer.eos_id,),
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
