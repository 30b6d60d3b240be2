"""The optimiser: a direction by Optax, and a learning rate that follows the step alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from instar.errors import UserError
from instar.models.parameters import Axes
from instar.training.batch import BatchConfig, count_rows, rows_before

Schedule = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a run, as a share of its peak.

    Linear warm-up over `warmup_steps`, then `cosine` or `linear` decay to `final_fraction` at step
    `decay_steps` (None: at the end of the run); `wsd` stays at the peak and decays linearly over
    the last `decay_fraction` of the steps (Hu et al. 2024, section 4); `constant` stays.

    Published schedules often count tokens or samples instead, of which the steps of a growing batch
    read ever more: `warmup_rows` and `decay_rows` count rows, by which the rate then moves. Or
    `warmup_fraction` of the steps are the warm-up.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    warmup_rows: int | None = None
    decay_rows: int | None = None
    warmup_fraction: float | None = None

    @property
    def by_rows(self) -> bool:
        """Whether the rate moves by rows, not by steps."""
        return self.warmup_rows is not None or self.decay_rows is not None

    def check(self) -> None:
        for name in ("warmup_steps", "warmup_rows"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"schedule.{name} must not be negative ({getattr(self, name)})")
        fraction = self.warmup_fraction
        if fraction is not None and not 0 <= fraction < 1:
            raise UserError(f"schedule.warmup_fraction ({fraction}) must be in [0, 1)")
        by_steps = self.warmup_steps or self.decay_steps is not None or fraction is not None
        if self.by_rows and by_steps:
            raise UserError(
                "schedule.warmup_rows and schedule.decay_rows go with neither "
                "schedule.warmup_steps, schedule.decay_steps nor schedule.warmup_fraction: count "
                "all in rows or all in steps"
            )
        if self.warmup_steps and fraction is not None:
            raise UserError("schedule.warmup_steps and schedule.warmup_fraction exclude each other")
        for unit in ("steps", "rows"):
            warmup, decay = getattr(self, f"warmup_{unit}"), getattr(self, f"decay_{unit}")
            if decay is not None and decay <= (warmup or 0):
                raise UserError(
                    f"schedule.decay_{unit} ({decay}) must be greater than "
                    f"schedule.warmup_{unit} ({warmup})"
                )
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"schedule.final_fraction ({self.final_fraction}) must be in [0, 1]")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"schedule.decay_fraction ({self.decay_fraction}) must be in (0, 1]")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan et al. 2024) on matrices beside AdamW.

    Muon takes the matrices inside the layers with `muon_learning_rate` and `momentum`; embeddings,
    the head and vectors stay with AdamW and `learning_rate`. `decay` names the kinds of parameters
    that weight decay shrinks. Gradients are clipped to the global norm `clip_norm`.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay: tuple[Literal["matrix", "embedding", "vector"], ...] = ("matrix", "embedding")
    clip_norm: float | None = 1.0
    muon_learning_rate: float = 0.02
    momentum: float = 0.95

    def check(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"optimizer.{name} must be positive, not {getattr(self, name)}")
        for name in ("b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} must be in [0, 1), not {getattr(self, name)}")
        if self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay must not be negative ({self.weight_decay})")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm must be positive or None, not {self.clip_norm}")


def make_schedule(config: ScheduleConfig, steps: int, batch: BatchConfig | None = None) -> Schedule:
    """step (int, from 0) -> share of the peak learning rate, in float32.

    Step s of the warm-up has the share (s + 1) / warmup_steps, so that no step is lost at 0; of one
    in rows, the share of its rows that are read when the step is done.

    Args:
      batch: the rows of each step, by which a schedule in rows goes; None: one.

    Raises:
      UserError: the warm-up does not end before the decay does (`wsd`: before it starts).
    """
    batch = batch or BatchConfig(1)
    if config.by_rows:
        unit, clock = "rows", rows_before(batch)
        warmup = config.warmup_rows or 0
        end = config.decay_rows or count_rows(batch, steps)
    else:
        unit, clock = "steps", lambda step: step.astype(jnp.float32)
        fraction = config.warmup_fraction
        warmup = config.warmup_steps if fraction is None else math.ceil(fraction * steps)
        end = config.decay_steps or steps
    start = warmup if config.kind != "wsd" else end - math.ceil(config.decay_fraction * end)
    if config.kind != "constant" and end <= start:
        raise UserError(f"schedule.warmup_{unit} ({warmup}) must be smaller than {unit} ({end})")
    if config.kind == "wsd" and warmup > start:
        raise UserError(
            f"schedule.warmup_{unit} ({warmup}) must not reach into the decay from "
            f"{unit.removesuffix('s')} {start} on"
        )

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        rise = jnp.minimum(clock(step + 1) / max(warmup, 1), 1.0)
        if config.kind == "constant":
            return rise
        done = jnp.clip((clock(step) - start) / (end - start), 0.0, 1.0)
        shape = 0.5 * (1 + jnp.cos(jnp.pi * done)) if config.kind == "cosine" else 1 - done
        return rise * (config.final_fraction + (1 - config.final_fraction) * shape)

    return schedule


def make_optimizer(config: OptimizerConfig, axes: dict) -> optax.GradientTransformation:
    """The update for the peak learning rate; `axes` is the tree of `Axes` of the parameters.

    The step multiplies the update by the schedule's value, so that a dropped step does not shift
    the schedule. Parameters are grouped by what their logical axes say they are.
    """
    decayed = config.weight_decay if "matrix" in config.decay else 0.0
    transforms = {
        "decayed": _adamw(config, config.weight_decay),
        "plain": _adamw(config, 0.0),
        "fixed": optax.set_to_zero(),
        "muon": muon(
            config.muon_learning_rate,
            beta=config.momentum,
            weight_decay=decayed,
            muon_weight_dimension_numbers=lambda params: _muon_dimensions(params, axes),
        ),
    }

    def label(axes: Axes) -> str:
        if not axes.trained:
            return "fixed"
        if config.name == "muon" and axes.kind == "matrix":
            return "muon"
        return "decayed" if axes.kind in config.decay else "plain"

    labels = jax.tree.map(label, axes)
    used = set(jax.tree.leaves(labels))
    return optax.partition({name: transforms[name] for name in sorted(used)}, labels)


def _adamw(config: OptimizerConfig, weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(
        config.learning_rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=weight_decay,
    )


def _muon_dimensions(params: dict, axes: dict) -> dict:
    """Which dimensions are a matrix's two sides, for the parameters that the partition left in."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(axes))

    def dimensions(path: tuple, _: jax.Array) -> MuonDimensionNumbers:
        return MuonDimensionNumbers(by_path[path].reduction_dims, by_path[path].output_dims)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def clip_by_norm(tree: dict, norm: jax.Array, limit: float | None) -> dict:
    """`tree`, whose global norm is `norm`, scaled down to the norm `limit` where it exceeds it."""
    if limit is None:
        return tree
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda x: (x * scale).astype(x.dtype), tree)
