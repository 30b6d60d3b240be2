"""The train step of `instar pretrain` for a config, without data, tokenizer or workdir."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from instar.families.registry import build_spec
from instar.models.language_model import LanguageModel
from instar.models.spec import ModelSpec
from instar.sharding import rules
from instar.sharding.inputs import BatchLayout
from instar.stages.language import make_loss
from instar.stages.pretrain import PretrainConfig
from instar.stages.run import make_execution, make_layout
from instar.training.balance import Balance
from instar.training.optimizer import make_optimizer, make_schedule
from instar.training.state import TrainState, initialize_state, make_initializer, state_template
from instar.training.step import Step, compile_step, make_step

INTEGERS = ("tokens", "targets", "positions", "segment_ids")


@dataclass(frozen=True)
class TrainStep:
    """A step on a mesh, what it starts from, and what it reads."""

    config: PretrainConfig
    spec: ModelSpec
    step: Step
    initialize: Callable[[jax.Array], TrainState]
    template: TrainState
    layout: BatchLayout

    def compile(self, platform: str | None = None) -> jax.stages.Compiled:
        """The program, for which no array is made.

        With a `platform` the step is written as for that one, and compiled for the devices of the
        mesh all the same.
        """
        layout, length = self.layout, self.config.data.sequence_length
        shape = (layout.microbatches, layout.microbatch, length)
        sharding = rules.row_sharding(layout.mesh, leading=1)
        inputs = {n: jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding) for n in INTEGERS}
        inputs["weights"] = jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        whole = rules.replicated(layout.mesh)
        inputs["microbatches"] = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
        platforms = None if platform is None else (platform,)
        traced = self.step.trace(self.template, None, inputs)
        return traced.lower(lowering_platforms=platforms).compile()

    def state(self) -> TrainState:
        """Fresh parameters and an optimiser that has done nothing."""
        return initialize_state(self.initialize, self.template, self.config.seed)

    def batch(self) -> dict[str, jax.Array]:
        """Rows of one document each, of tokens that mean nothing."""
        count, length = self.config.batch.size, self.config.data.sequence_length
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.spec.vocab_size, (count, length + 1), np.int32)
        rows = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (count, length)),
            "segment_ids": np.ones((count, length), np.int32),
            "weights": np.ones((count, length), np.float32),
        }
        offsets = self.layout.local_offsets(count)
        return self.layout.place({name: values[offsets] for name, values in rows.items()}, count)


def make_train_step(config: PretrainConfig, mesh: Mesh) -> TrainStep:
    """The step that `config`, whose `data.path` is not opened, trains by on `mesh`."""
    length = config.data.sequence_length
    spec = build_spec(config.model, vocab_size=32_000, max_positions=length)
    model = LanguageModel(spec, make_execution(config, mesh))
    rules.check_divisible(mesh, model.axes, model.shapes)
    optimizer = make_optimizer(config.optimizer, model.axes)
    initialize = make_initializer(model, optimizer, config.initialization)
    template = state_template(initialize, mesh, model.axes)
    balance = Balance(config.router, spec)
    step = make_step(
        make_loss(model, config, balance),
        optimizer,
        make_schedule(config.schedule, config.steps, config.batch),
        learning_rate=config.optimizer.learning_rate,
        clip_norm=config.optimizer.clip_norm,
        settle=balance.settle,
    )
    layout = make_layout(config.batch, mesh)
    return TrainStep(config, spec, compile_step(step, template), initialize, template, layout)
