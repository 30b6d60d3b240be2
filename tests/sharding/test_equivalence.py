"""Eight devices compute what one device computes, however the mesh is laid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import packed_batch, random_params, with_mixer

from instar.families import deepseek_v3, gpt3, llama, mixtral
from instar.models.language_model import LanguageModel
from instar.models.transformer import Execution
from instar.objectives.language import next_token_sums
from instar.sharding import rules
from instar.sharding.attention import choose_attention
from instar.sharding.execution import on_mesh
from instar.sharding.inputs import BatchLayout
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.training.balance import Balance, RouterConfig
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
        depth=2, width=16, heads=8, head_dim=6, mlp_width=24, vocab_size=41, max_positions=16
    ),
    # On most meshes fewer heads of keys and values than devices that share them.
    "llama": llama.llama(
        depth=2,
        width=16,
        heads=8,
        kv_heads=2,
        head_dim=6,
        mlp_width=24,
        vocab_size=43,
        qk_norm=True,
    ),
    "mixtral": mixtral.mixtral(
        depth=2,
        width=16,
        heads=8,
        kv_heads=2,
        head_dim=6,
        mlp_width=16,
        vocab_size=40,
        experts=8,
        router_bias=True,
    ),
}
SPECS["deepseek"] = deepseek_v3.deepseek_v3(
    depth=2,
    width=16,
    heads=8,
    head_dim=6,
    rotary_dim=4,
    value_dim=5,
    rank=8,
    query_rank=16,
    mlp_width=16,
    expert_width=8,
    vocab_size=40,
    experts=8,
    experts_per_token=2,
    groups=4,
    top_groups=2,
    scale=1.5,
)
# A device along `context` has tokens of both ends of a row, and a window goes past its pieces.
SPECS["windowed"] = with_mixer(SPECS["llama"], window=5)
OPTIMIZERS = {"gpt3": "adamw", "llama": "muon", "windowed": "muon", "mixtral": "muon"}
OPTIMIZERS["deepseek"] = "muon"
ONE = MeshConfig(1, 1, 1)
MESHES = {
    "slice": MeshConfig(slice=8),
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "expert": MeshConfig(fsdp=1, expert=8),
    "tensor": MeshConfig(tensor=8),
    "context": MeshConfig(fsdp=1, context=8),
    "slice-fsdp": MeshConfig(slice=2, fsdp=4),
    "slice-data-tensor": MeshConfig(slice=2, data=2, tensor=2),
    "data-tensor": MeshConfig(data=2, tensor=4),
    "fsdp-tensor": MeshConfig(fsdp=2, tensor=4),
    "data-fsdp-tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp-context": MeshConfig(fsdp=2, context=4),
    "data-context": MeshConfig(data=2, fsdp=1, context=4),
    "fsdp-context-tensor": MeshConfig(fsdp=2, context=2, tensor=2),
    "fsdp-expert": MeshConfig(fsdp=2, expert=4),
    "data-expert": MeshConfig(data=2, fsdp=1, expert=4),
    "fsdp-expert-tensor": MeshConfig(fsdp=2, expert=2, tensor=2),
    "expert-context-tensor": MeshConfig(fsdp=1, expert=2, context=2, tensor=2),
}
# Axes that split the batch and nothing else are the same program: one family each.
ALIKE = {"slice": "gpt3", "data": "llama"}


def families_on(mesh: str) -> list[str]:
    """The families about which a mesh tells what no other mesh does."""
    if mesh in ALIKE:
        return [ALIKE[mesh]]
    axes = mesh.split("-")
    # Where experts lie apart, other models lay out their batch as elsewhere.
    found = ["mixtral"] if "expert" in axes else ["gpt3", "llama"]
    if "expert" in axes and "tensor" in axes:
        found.append("deepseek")
    return found + ["windowed"] * ("context" in axes and "fsdp" in axes)


# Each axis alone, with one of its families in turns, and three axes at once trained; all others
# are exhaustive.
ALONE = [
    (mesh, families_on(mesh)[turn % len(families_on(mesh))])
    for turn, mesh in enumerate(MESHES)
    if "-" not in mesh
]
TRAINED = [("fsdp-context-tensor", "llama"), ("fsdp-expert-tensor", "mixtral")]
EVERYWHERE = ("gpt3", "llama", "mixtral")
ALL = [
    (mesh, family)
    for mesh in MESHES
    for family in SPECS
    if family in EVERYWHERE or family in families_on(mesh)
]


def first(cases: list[tuple[str, str]]) -> list:
    """All cases, of which only a run of `-m exhaustive` takes others than `cases`."""
    others = [case for case in ALL if case not in cases]
    return cases + [pytest.param(*case, marks=pytest.mark.exhaustive) for case in others]


MICROBATCHES, MICROBATCH, LENGTH = 2, 8, 16
Z_LOSS, STEPS = 1e-2, 5
# Large, so that what they contribute is seen.
ROUTER = RouterConfig(balance_loss=0.3, z_loss=0.1, bias_rate=0.05)


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
        attention = choose_attention(self.mesh)
        execution = on_mesh(self.mesh, Execution(jnp.dtype(dtype), attend=attention))
        self.balance = Balance(ROUTER, SPECS[family])
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
        hidden, aux = self.model.apply(params, batch["tokens"], **inputs)
        head = self.model.head(params)
        sums = next_token_sums(hidden, head, batch["targets"], batch["weights"], chunk=8)
        routers, reported = self.balance.losses(aux, sums["weight"])
        loss = sums["nats"] + Z_LOSS * sums["log_z_squared"] + routers
        return loss, {"loss": sums["nats"], "weight": sums["weight"]} | reported

    def gradients(self) -> tuple[dict, dict]:
        shardings = rules.param_shardings(self.mesh, self.model.axes, self.model.shapes)
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
        step = make_step(
            self.loss_sums,
            update,
            schedule,
            learning_rate=0.01,
            clip_norm=0.5,
            settle=self.balance.settle,
        )
        step, log = compile_step(step, template), []
        for batch in batches(STEPS):
            state, metrics = step(state, None, self.place(batch))
            log.append({name: float(value) for name, value in metrics.items()})
        return state, log


@functools.cache
def on_one_device(family: str, optimizer: str | None):
    if optimizer is None:
        return jax.device_get(Setup(family, ONE, np.float32).gradients())
    with jax.enable_x64(True):
        return jax.device_get(Setup(family, ONE, np.float64).train(optimizer))


def assert_split(tree: dict, axes: dict, mesh: jax.sharding.Mesh) -> None:
    """Every array is held in as many parts as there are devices along the axes of its names."""
    for a, array in zip(jax.tree.leaves(axes), jax.tree.leaves(tree), strict=True):
        parts = np.prod([rules.parts(mesh, name) for name in a.names], dtype=int)
        assert {shard.data.size * parts for shard in array.addressable_shards} == {array.size}, a


@pytest.mark.parametrize(("mesh", "family"), first(ALONE))
def test_loss_and_gradients_in_float32(mesh, family):
    expected, expected_sums = on_one_device(family, None)
    setup = Setup(family, MESHES[mesh], np.float32)
    found, sums = setup.gradients()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), sums, expected_sums)

    # Without rotary positions a bias of the keys shifts all logits of a query alike, so that its
    # true gradient is zero and only rounding is left: compare that to the gradients around it.
    floor = 1e-6 * max(np.abs(x).max() for x in jax.tree.leaves(expected))

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=max(floor, 1e-5 * np.abs(b).max()))

    jax.tree.map(close, found, expected)


@pytest.mark.parametrize(("mesh", "family"), first(TRAINED))
def test_five_steps_in_float64(mesh, family):
    """Accumulation over two microbatches of packed rows, clipping, decay and warm-up are in it."""
    optimizer = OPTIMIZERS[family]
    expected, expected_log = on_one_device(family, optimizer)
    with jax.enable_x64(True):
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
