"""Eight devices compute what one device computes, however the mesh is laid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import packed_batch, quick_compilation, random_params, with_mixer

from instar.families import gpt3, llama
from instar.models.language_model import LanguageModel
from instar.models.transformer import Execution
from instar.objectives.language import next_token_sums
from instar.sharding import rules
from instar.sharding.attention import choose_attention
from instar.sharding.inputs import BatchLayout
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.training.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    make_optimizer,
    make_schedule,
)
from instar.training.state import TrainState
from instar.training.step import accumulate, compile_step, make_step

SPECS = {
    "gpt3": gpt3.gpt3(
        depth=2, width=16, heads=4, head_dim=6, mlp_width=24, vocab_size=40, max_positions=16
    ),
    "llama": llama.llama(
        depth=2,
        width=16,
        heads=8,
        kv_heads=4,
        head_dim=6,
        mlp_width=24,
        vocab_size=40,
        qk_norm=True,
    ),
}
# One device of four holds tokens of both ends of a row, and a window that reaches past its pieces.
SPECS["windowed"] = with_mixer(SPECS["llama"], window=5)
ONE = MeshConfig(1, 1, 1)
MESHES = {
    "fsdp": MeshConfig(1, 8, 1),
    "data-tensor": MeshConfig(2, 1, 4),
    "data-fsdp-tensor": MeshConfig(2, 2, 2),
    "context-fsdp": MeshConfig(fsdp=2, context=4),
    "data-context": MeshConfig(data=2, fsdp=1, context=4),
    "context-tensor-fsdp": MeshConfig(fsdp=2, tensor=2, context=2),
}
CASES = [(mesh, family) for mesh in MESHES for family in ("gpt3", "llama")]
CASES += [("context-fsdp", "windowed"), ("context-tensor-fsdp", "windowed")]
MICROBATCHES, MICROBATCH, LENGTH = 2, 8, 16
Z_LOSS, STEPS = 1e-2, 10


def batches(steps: int) -> list[dict]:
    """Packed rows with uneven documents, padding and weights."""
    documents = [[16], [5, 4], [3, 3, 6], [7], [1, 15], [2, 2, 2], [8, 3], [4, 12]]
    lengths = [documents[(3 * i + i // 8) % 8] for i in range(MICROBATCHES * MICROBATCH)]
    return [packed_batch(seed, lengths, LENGTH, 40) for seed in range(steps)]


class Setup:
    """One family on one mesh."""

    def __init__(self, family: str, config: MeshConfig, dtype: type):
        self.dtype = dtype
        self.mesh = make_mesh(config, jax.devices()[:1] if config == ONE else None)
        execution = Execution(
            dtype=jnp.dtype(dtype),
            constrain=rules.constrain(self.mesh),
            attend=choose_attention(self.mesh),
        )
        self.model = LanguageModel(SPECS[family], execution)
        rules.check_divisible(self.mesh, self.model.axes, self.model.shapes)
        self.layout = BatchLayout(self.mesh, MICROBATCHES, MICROBATCH)
        self.params = random_params(self.model, 11, dtype)

    def place(self, batch: dict) -> dict:
        count = MICROBATCHES * MICROBATCH
        batch = batch | {"weights": batch["weights"].astype(self.dtype)}
        offsets = self.layout.local_offsets(count)
        return self.layout.place({name: x[offsets] for name, x in batch.items()}, count)

    def loss_sums(self, params, frozen, batch, key):
        inputs = {name: batch[name] for name in ("positions", "segment_ids")}
        hidden, _ = self.model.apply(params, batch["tokens"], **inputs)
        head = self.model.head(params)
        sums = next_token_sums(hidden, head, batch["targets"], batch["weights"], chunk=8)
        loss = sums["nats"] + Z_LOSS * sums["log_z_squared"]
        return loss, {"loss": sums["nats"], "weight": sums["weight"]}

    def gradients(self) -> tuple[dict, dict]:
        shardings = rules.param_shardings(self.mesh, self.model.axes)
        params = jax.device_put(self.params, shardings)
        run = jax.jit(
            functools.partial(accumulate, self.loss_sums), out_shardings=(shardings, None)
        )
        return run(params, None, self.place(batches(1)[0]), jax.random.key(0))

    def train(self, optimizer: str) -> tuple[TrainState, list[dict]]:
        config = OptimizerConfig(optimizer, learning_rate=0.01)
        update = make_optimizer(config, self.model.axes)
        key = jax.random.key_data(jax.random.key(0))
        state = TrainState(jnp.zeros((), jnp.int32), self.params, update.init(self.params), key)
        shapes = jax.eval_shape(lambda: state)
        template = jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            shapes,
            rules.state_shardings(self.mesh, shapes, self.model.axes),
        )
        state = jax.device_put(state, jax.tree.map(lambda t: t.sharding, template))
        schedule = make_schedule(ScheduleConfig(warmup_steps=3), STEPS)
        step = make_step(self.loss_sums, update, schedule, learning_rate=0.01, clip_norm=0.5)
        step, log = compile_step(step, template), []
        for batch in batches(STEPS):
            state, metrics = step(state, None, self.place(batch))
            log.append({name: float(value) for name, value in metrics.items()})
        return state, log


@functools.cache
def on_one_device(family: str, optimizer: str | None):
    with quick_compilation():
        if optimizer is None:
            return jax.device_get(Setup(family, ONE, np.float32).gradients())
        with jax.enable_x64(True):
            return jax.device_get(Setup(family, ONE, np.float64).train(optimizer))


def assert_split(tree: dict, axes: dict, mesh: jax.sharding.Mesh) -> None:
    """Every array is held in parts of the size that its axes say; matrices really, if any are."""
    split = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    for a, array in zip(jax.tree.leaves(axes), jax.tree.leaves(tree), strict=True):
        parts = [
            np.prod([mesh.shape[m] for m in rules.RULES.get(name, ())], dtype=int)
            for name in a.names
        ]
        local = tuple(size // part for size, part in zip(array.shape, parts, strict=True))
        assert {s.data.shape for s in array.addressable_shards} == {local}, a
        assert a.kind != "matrix" or local != array.shape or not split


@pytest.mark.parametrize(("mesh", "family"), CASES)
def test_loss_and_gradients_in_float32(mesh, family):
    expected, expected_sums = on_one_device(family, None)
    with quick_compilation():
        setup = Setup(family, MESHES[mesh], np.float32)
        found, sums = setup.gradients()
    for name, value in expected_sums.items():
        assert float(sums[name]) == pytest.approx(float(value), rel=1e-5)

    # Without rotary positions a bias of the keys shifts all logits of a query alike, so that its
    # true gradient is zero and only rounding is left: compare that to the gradients around it.
    floor = 1e-6 * max(np.abs(x).max() for x in jax.tree.leaves(expected))

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=max(floor, 1e-5 * np.abs(b).max()))

    jax.tree.map(close, found, expected)


@pytest.mark.parametrize(("family", "optimizer"), [("gpt3", "adamw"), ("llama", "muon")])
@pytest.mark.parametrize("mesh", MESHES)
def test_ten_steps_in_float64(mesh, family, optimizer):
    """Accumulation over two microbatches of packed rows, clipping, decay and warm-up are in it."""
    expected, expected_log = on_one_device(family, optimizer)
    with jax.enable_x64(True), quick_compilation():
        setup = Setup(family, MESHES[mesh], np.float64)
        state, log = setup.train(optimizer)
        assert_split(state.params, setup.model.axes, setup.mesh)
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9)
        jax.tree.map(close, jax.device_get(state.params), expected.params)
        for found, metrics in zip(log, expected_log, strict=True):
            assert found == pytest.approx(metrics, rel=1e-9)
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected.params, setup.params)
        # All but the key biases of a model without rotary positions, whose gradient is zero.
        assert sorted(jax.tree.leaves(moved))[1] > 1e-4
        assert int(state.step) == STEPS and log[0]["skipped"] == 0
