"""The run that all stages share which learn from batches: one compiled step, again and again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from instar.config import to_dict
from instar.evaluation.report import write_report
from instar.interchange.card import ModelCard
from instar.interchange.parents import check_data
from instar.models.language_model import LanguageModel, Params
from instar.models.parameters import Initialization
from instar.models.reward_model import RewardModel
from instar.models.transformer import Execution
from instar.sharding import rules
from instar.sharding.attention import choose_attention
from instar.sharding.execution import on_mesh
from instar.sharding.inputs import BatchLayout
from instar.stages.config import RunConfig
from instar.training.agreement import first_before_others
from instar.training.batch import BatchConfig
from instar.training.hardware import Peak, describe_hardware, peak_of_devices
from instar.training.loop import Evaluation, LoopConfig, Position, Stage, train
from instar.training.optimizer import make_optimizer, make_schedule
from instar.training.state import (
    TrainState,
    initialize_state,
    make_initializer,
    state_of,
    state_template,
)
from instar.training.step import LossSums, Settle, compile_step, make_step
from instar.workdir import claim, record_start


@dataclass(frozen=True)
class Recipe:
    """What a stage gives to its run.

    Attributes:
      name: of the stage.
      card: what its checkpoints say of their model.
      model: what is trained.
      loss: what is minimised, summed over a microbatch.
      inputs, start, lineage, observe, evaluations, finish: see `instar.training.loop.Stage`.
      parameters: how many there are; `flops_per_token`, those of training on one token.
      initialization: how fresh parameters are drawn, where `params` gives none.
      params: reads those that the run begins with, in the layout of its own.
      settle: what a step does besides following the gradient, see `instar.training.step.Settle`.
      conclude: called with the last state before the report is written.
    """

    name: str
    card: ModelCard
    model: LanguageModel | RewardModel
    loss: LossSums
    inputs: Callable[[int, Position], Iterator[tuple[dict, Position]]]
    start: Position
    lineage: Callable[[Position], dict]
    observe: Callable[[Position], dict[str, float]]
    evaluations: tuple[Evaluation, ...]
    parameters: int
    flops_per_token: float
    initialization: Initialization = field(default_factory=Initialization)
    params: Callable[[], Params] | None = None
    settle: Settle = lambda params, counts: (params, {})
    finish: Callable[[TrainState], TrainState] = lambda state: state
    conclude: Callable[[TrainState], None] = lambda state: None


def run(config: RunConfig, folder: epath.Path, mesh: Mesh, recipe: Recipe) -> TrainState:
    """Trains as `recipe` says and writes a report; resumes where it was stopped.

    Raises:
      UserError: the workdir or the schedule does not fit; nothing is overwritten.
      RunError: the run cannot go on.
    """
    # What is trained, and from where.
    optimizer = make_optimizer(config.optimizer, recipe.model.axes)
    initialize = make_initializer(recipe.model, optimizer, recipe.initialization)
    template = state_template(initialize, mesh, recipe.model.axes)

    def initial_state() -> TrainState:
        if recipe.params is None:
            return initialize_state(initialize, template, config.seed)
        return state_of(recipe.params(), optimizer, template, config.seed)

    # How: one compiled step.
    step = make_step(
        recipe.loss,
        optimizer,
        make_schedule(config.schedule, config.steps, config.batch),
        learning_rate=config.optimizer.learning_rate,
        clip_norm=config.optimizer.clip_norm,
        settle=recipe.settle,
    )

    # Only now is anything written.
    first_before_others(lambda: claim(folder, config))
    peak = peak_of_devices()
    facts = facts_of(mesh, peak, recipe.parameters, recipe.flops_per_token)

    def on_start(step: int) -> None:
        record_start(folder, step, facts=facts)

    stage = Stage(
        name=recipe.name,
        initialize=initial_state,
        template=template,
        step=compile_step(step, template),
        frozen=None,
        inputs=recipe.inputs,
        start=recipe.start,
        lineage=recipe.lineage,
        observe=recipe.observe,
        flops_per_token=recipe.flops_per_token,
        peak=peak,
        evaluations=recipe.evaluations,
        finish=recipe.finish,
        on_start=on_start,
        card=recipe.card.to_json(),
    )
    return conduct(stage, config, folder, recipe.conclude)


def conduct(
    stage: Stage,
    config: RunConfig,
    folder: epath.Path,
    conclude: Callable[[TrainState], None] = lambda state: None,
) -> TrainState:
    """Runs a stage to its end in a claimed folder, concludes, and writes the report.

    Raises:
      UserError: the run began with other data.
      RunError: the run cannot go on.
    """
    check_data(folder, stage.lineage(stage.start)["data"])
    loop = LoopConfig(config.steps, config.checkpoint, config.failure, config.logging)
    state = train(stage, loop, folder, to_dict(config))
    conclude(state)
    if jax.process_index() == 0:
        write_report(folder)
    return state


def facts_of(mesh: Mesh, peak: Peak, parameters: int, flops_per_token: float) -> dict:
    """What a run's folder says of the machine and of the cost of a token."""
    return {
        "hardware": describe_hardware(),
        "mesh": dict(mesh.shape),
        "peak": to_dict(peak),
        "parameters": parameters,
        "flops_per_token": flops_per_token,
    }


def make_layout(config: BatchConfig, mesh: Mesh) -> BatchLayout:
    """How a step's rows lie on the mesh."""
    micro = config.microbatch or config.size
    layout = BatchLayout(mesh, config.size // micro, micro)
    layout.check()
    return layout


def make_execution(config: RunConfig, mesh: Mesh) -> Execution:
    """How the step of a run is computed."""
    execution = Execution(
        dtype=jnp.dtype(config.compute_dtype),
        remat=config.execution.remat,
        unroll=config.execution.unroll,
        attend=choose_attention(mesh, config.execution.attention),
    )
    return on_mesh(mesh, execution)


def check_attention(model: LanguageModel, mesh: Mesh, length: int) -> None:
    """Raises UserError where attention over rows of `length` tokens cannot be as asked for."""
    tokens = jax.ShapeDtypeStruct((rules.batch_shards(mesh), length), jnp.int32)
    jax.eval_shape(model.apply, model.shapes, tokens)
