"""The loop on a stage of one parameter, whose batches are numbers: its policies and its books."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from etils import epath

from instar.errors import RunError
from instar.training.checkpoint import CheckpointConfig
from instar.training.failure import FailureConfig
from instar.training.hardware import Peak
from instar.training.loop import Evaluation, LoopConfig, Stage, train
from instar.training.metrics import read_metrics
from instar.training.state import TrainState
from instar.training.step import compile_step, make_step

pytestmark = pytest.mark.smoke

STEPS = 10


def make_stage(targets, evaluations=(), step=None, seen=None) -> Stage:
    """Fits one number to `targets`; input i of the stream is targets(i)."""
    optimizer = optax.sgd(0.5)

    def initialize() -> TrainState:
        params = {"x": jnp.zeros(1)}
        key = jax.random.key_data(jax.random.key(0))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)

    def loss_sums(params, frozen, batch, key):
        loss = jnp.sum(jnp.square(params["x"] - batch["target"]))
        return loss, {"loss": loss, "weight": jnp.float32(1)}

    def inputs(step, position):
        for row in itertools.count(position["row"]):
            if seen is not None:
                seen.append((step, row))
            batch = {"target": jnp.full((1, 1), targets(row)), "microbatches": jnp.int32(1)}
            yield batch, {"row": row + 1}

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(initialize),
    )
    update = make_step(loss_sums, optimizer, lambda s: 0.5, learning_rate=0.5, clip_norm=None)
    return Stage(
        name="fit",
        initialize=initialize,
        template=template,
        step=step or compile_step(update, template),
        frozen=None,
        inputs=inputs,
        start={"row": 0},
        lineage=lambda position: {"rows": position["row"]},
        observe=lambda position: {"row": float(position["row"])},
        flops_per_token=1.0,
        peak=Peak(1.0, "measured", "float32", "cpu", 1),
        on_start=lambda step: None,
        evaluations=evaluations,
    )


def loop_config(policy="raise", steps=STEPS, keep=2, **failure) -> LoopConfig:
    return LoopConfig(
        steps,
        CheckpointConfig(minutes=None, keep_steps=keep),
        FailureConfig(non_finite=policy, **failure),
    )


def bad_at(*rows):
    return lambda row: math.nan if row in rows else 1.0 + row


def logged(folder: epath.Path) -> list[dict]:
    return [line for line in read_metrics(folder) if "loss" in line]


def final_x(state: TrainState) -> float:
    return float(state.params["x"][0])


def fit(rows) -> float:
    """The parameter after gradient steps of size 0.25 on the targets of `rows`, by hand."""
    x = 0.0
    for row in rows:
        x -= 0.25 * 2 * (x - (1.0 + row))
    return x


def test_each_step_is_logged_once_with_what_the_host_knows_of_it(tmp_path):
    folder = epath.Path(tmp_path)
    state = train(make_stage(bad_at()), loop_config(), folder, {})
    assert final_x(state) == pytest.approx(fit(range(STEPS)))
    lines = logged(folder)
    assert [(line["step"], line["row"]) for line in lines] == [
        (n, float(n)) for n in range(1, STEPS + 1)
    ]


def test_raise_names_the_step_and_leaves_the_checkpoints_before_it(tmp_path):
    folder = epath.Path(tmp_path)
    with pytest.raises(RunError, match=r"step 6: loss nan.*not finite"):
        train(make_stage(bad_at(5)), loop_config(), folder, {})
    # The policy is no part of the config that must stay: the same run goes on with another.
    state = train(make_stage(bad_at(5)), loop_config("skip"), folder, {})
    assert final_x(state) == pytest.approx(fit([r for r in range(STEPS) if r != 5]))


def test_skip_drops_the_step_and_says_so(tmp_path):
    folder = epath.Path(tmp_path)
    state = train(make_stage(bad_at(5)), loop_config("skip"), folder, {})
    assert final_x(state) == pytest.approx(fit([r for r in range(STEPS) if r != 5]))
    assert [line["step"] for line in logged(folder) if line["skipped"]] == [6]
    assert int(state.step) == STEPS


def test_rollback_goes_back_and_on_with_the_batches_after(tmp_path):
    folder = epath.Path(tmp_path)
    state = train(make_stage(bad_at(5)), loop_config("rollback"), folder, {})
    # Step 6 failed on row 5: from the checkpoint of step 4 (rows 0 to 3) on with row 6.
    assert final_x(state) == pytest.approx(fit([0, 1, 2, 3, *range(6, 12)]))
    lines = logged(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not any(line["skipped"] for line in lines)
    saved = json.loads((folder / f"checkpoints/{STEPS}/input/input.json").read_text())
    assert saved == {"row": 12}


def test_rollback_before_any_checkpoint_starts_anew_with_later_batches(tmp_path):
    state = train(make_stage(bad_at(0)), loop_config("rollback"), epath.Path(tmp_path), {})
    assert final_x(state) == pytest.approx(fit(range(1, STEPS + 1)))


def test_rollbacks_come_to_an_end(tmp_path):
    with pytest.raises(RunError, match="after 2 rollbacks"):
        bad = make_stage(lambda row: math.nan if row >= 4 else 1.0)
        train(bad, loop_config("rollback", max_rollbacks=2), epath.Path(tmp_path), {})


def test_resuming_reads_on_where_the_checkpoint_says(tmp_path):
    folder, seen = epath.Path(tmp_path), []
    train(make_stage(bad_at()), loop_config(steps=4), folder, {})
    state = train(make_stage(bad_at(), seen=seen), loop_config(), folder, {})
    assert seen[0] == (4, 4)
    assert final_x(state) == pytest.approx(fit(range(STEPS)))


def test_evaluations_run_on_their_steps_and_at_the_end(tmp_path):
    folder, steps = epath.Path(tmp_path), []

    def measure(state):
        steps.append(int(state.step))
        return {"x": final_x(state)}, [{"prompt": "p", "completion": "c"}]

    stage = make_stage(bad_at(), evaluations=(Evaluation("probe", 4, measure),))
    train(stage, loop_config(), folder, {})
    assert steps == [4, 8, 10]
    lines = [line for line in read_metrics(folder) if "probe/x" in line]
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert lines[0]["probe/x"] == pytest.approx(fit(range(4)))
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 3


def test_a_spike_is_flagged(tmp_path):
    folder = epath.Path(tmp_path)
    noise = [0.0, 0.01, -0.01, 0.02, -0.02]
    stage = make_stage(lambda row: 30.0 if row == 25 else noise[row % 5])
    train(stage, loop_config(steps=30, keep=30, spike_window=10), folder, {})
    assert next(line["step"] for line in logged(folder) if line["spike"]) == 26


def test_the_host_does_not_wait_for_the_step_that_it_gave(tmp_path):
    """Metrics are read late: when step n + 1 is given, step n has not been asked for."""
    stage, unread = make_stage(bad_at()), []

    class Late:
        """An array that notes when it is read."""

        def __init__(self, value, step):
            self.value, self.step = value, step

        def is_ready(self):
            return False

        def __array__(self, *args, **kwargs):
            unread.remove(self.step)
            return jax.device_get(self.value)

        def __float__(self):
            return float(self.__array__())

    numbers, most = itertools.count(1), []

    def step(state, frozen, batch):
        most.append(len(unread))
        state, metrics = stage.step(state, frozen, batch)
        number = next(numbers)
        unread.append(number)
        return state, metrics | {"loss": Late(metrics["loss"], number)}

    late = dataclasses.replace(stage, step=step)
    train(late, loop_config(keep=None), epath.Path(tmp_path), {})
    assert max(most) == 2
    assert not unread
