"""The run that all stages share which learn to predict tokens."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from importlib import metadata

import jax
from etils import epath
from jax.sharding import Mesh

from instar.data.dataset import TokenDataset
from instar.data.loader import batches
from instar.data.rows import HeldOutRows, TrainingRows
from instar.errors import UserError
from instar.evaluation.perplexity import evaluate, make_evaluation_step
from instar.generation.engine import Engine
from instar.interchange.card import ModelCard
from instar.interchange.model import Model, Prompt
from instar.models.language_model import LanguageModel, Params
from instar.models.parameters import Initialization
from instar.models.spec import ModelSpec
from instar.objectives.language import next_token_sums
from instar.sharding import rules
from instar.sharding.inputs import BatchLayout, check_row_length, place_rows
from instar.stages.config import LanguageConfig
from instar.stages.prefix import check_dataset
from instar.stages.run import (
    Recipe,
    check_attention,
    make_execution,
    make_layout,
    run,
)
from instar.training.balance import Balance
from instar.training.batch import rows_of_steps
from instar.training.flops import parameter_count, train_flops_per_token
from instar.training.loop import Evaluation, Position
from instar.training.state import TrainState
from instar.training.step import LossSums

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
      judged: the sources whose held-out loss tells how good the model is; none: all it reads.
      as_prompt: what a prompt of the evaluation, a text, is to the model.
    """

    name: str
    card: ModelCard
    initialization: Initialization = field(default_factory=Initialization)
    params: Callable[[], Params] | None = None
    parent: dict | None = None
    judged: Collection[str] = ()
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
    rows = TrainingRows(
        dataset,
        sequence_length=config.data.sequence_length,
        weights=config.data.weights,
        seed=config.seed,
    )
    balance = Balance(config.router, model.spec)
    recipe = Recipe(
        name=start.name,
        card=start.card,
        model=model,
        loss=make_loss(model, config, balance),
        settle=balance.settle,
        inputs=make_inputs(config, rows, make_layout(config.batch, mesh)),
        start={"row": 0},
        lineage=functools.partial(describe_lineage, config, dataset, start.parent),
        observe=lambda position: describe_position(rows, position),
        evaluations=make_evaluations(config, model, dataset, mesh, start),
        parameters=parameter_count(model.spec).total,
        flops_per_token=train_flops_per_token(model.spec, config.data.sequence_length),
        initialization=start.initialization,
        params=start.params,
    )
    return run(config, folder, mesh, recipe)


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
    check_row_length(mesh, length, "data.sequence_length")
    check_dataset(spec, dataset, config.data)
    chunk, parts = config.execution.loss_chunk, mesh.shape["context"]
    if chunk % parts:
        raise UserError(
            f"execution.loss_chunk ({chunk}) must be a multiple of mesh.context ({parts})"
        )
    model = LanguageModel(spec, make_execution(config, mesh))
    rules.check_divisible(mesh, model.axes, model.shapes)
    check_attention(model, mesh, length)
    return model


def make_loss(model: LanguageModel, config: LanguageConfig, balance: Balance) -> LossSums:
    """The function that sums the loss over the targets of a microbatch.

    Of a target it is -log p + z_loss * (log Z)^2 + max_z_loss * (the largest logit)^2, and what
    routers add.
    """

    def loss_sums(params: dict, frozen: None, batch: dict, key: jax.Array) -> tuple:
        hidden, aux = model.apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            dropout=config.dropout,
            embedding_dropout=config.embedding_dropout,
            key=key,
        )
        sums = next_token_sums(
            hidden,
            model.head(params),
            batch["targets"],
            batch["weights"],
            config.execution.loss_chunk,
        )
        routers, reported = balance.losses(aux, sums["weight"])
        loss = sums["nats"] + config.z_loss * sums["log_z_squared"] + routers
        if config.max_z_loss:  # its gradient costs a pass over the logits
            loss += config.max_z_loss * sums["max_logit_squared"]
        return loss, {"loss": sums["nats"], "weight": sums["weight"]} | reported

    return loss_sums


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
        dataset,
        sequence_length=config.data.sequence_length,
        weights=config.data.weights,
        batch=size,
        judged=start.judged,
        limit=settings.rows,
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
