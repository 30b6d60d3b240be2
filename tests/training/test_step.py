"""The train step: accumulation, dropped steps, donation, one compilation."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from examples import packed_batch

from instar.families import gpt3
from instar.models.language_model import LanguageModel
from instar.models.parameters import Initialization
from instar.models.transformer import Execution, dropout
from instar.objectives.language import next_token_sums
from instar.sharding.execution import on_mesh
from instar.sharding.inputs import BatchLayout
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.training.checkpoint import CheckpointConfig, Checkpointer
from instar.training.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    make_optimizer,
    make_schedule,
)
from instar.training.state import (
    TrainState,
    initialize_state,
    make_initializer,
    state_template,
    step_key,
)
from instar.training.step import accumulate, compile_step, make_step

pytestmark = pytest.mark.smoke

SPEC = gpt3.gpt3(
    depth=2, width=8, heads=2, head_dim=3, mlp_width=10, vocab_size=19, max_positions=9
)
LENGTH, MICROBATCH, MICROBATCHES, RATE, CLIP = 9, 4, 3, 0.02, 0.2
# Rows of very different weight, so that a mean of means is not the mean.
DOCUMENTS = [[9], [4, 5], [8], [6, 3], [2], [1], [], [2, 2], [3], [5], [2, 3, 4], [9]]


def loss_of(model: LanguageModel, dropout: float = 0.0):
    def loss_sums(params, frozen, batch, key):
        hidden, _ = model.apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            dropout=dropout,
            key=key,
        )
        sums = next_token_sums(hidden, model.head(params), batch["targets"], batch["weights"])
        return sums["nats"], {"loss": sums["nats"], "weight": sums["weight"]}

    return loss_sums


class Run:
    """A small model on a mesh, with everything that a stage makes for it."""

    def __init__(
        self,
        mesh: MeshConfig | None = None,
        microbatches: int = MICROBATCHES,
        dropout: float = 0.0,
        name: str = "adamw",
        dtype: type = np.float32,
    ):
        mesh = mesh or MeshConfig(1, 1, 1)
        devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
        self.mesh = make_mesh(mesh, devices)
        execution = on_mesh(self.mesh, Execution(dtype=jnp.dtype(dtype)))
        self.model = LanguageModel(SPEC, execution)
        self.config = OptimizerConfig(name, learning_rate=RATE, clip_norm=CLIP)
        self.optimizer = make_optimizer(self.config, self.model.axes)
        self.initialize = make_initializer(self.model, self.optimizer, Initialization(std=0.3))
        self.template = state_template(self.initialize, self.mesh, self.model.axes)
        self.layout = BatchLayout(self.mesh, microbatches, MICROBATCH)
        self.loss_sums = loss_of(self.model, dropout)
        self.schedule = make_schedule(ScheduleConfig(warmup_steps=2), 20)
        self.pure = make_step(
            self.loss_sums,
            self.optimizer,
            self.schedule,
            learning_rate=RATE,
            clip_norm=CLIP,
        )
        self.step = compile_step(self.pure, self.template)

    def fresh(self, seed: int = 0) -> TrainState:
        return initialize_state(self.initialize, self.template, seed)

    def inputs(self, seed: int, count: int | None = None) -> dict:
        """A step of `count` rows, placed."""
        count = count or self.layout.microbatches * MICROBATCH
        return self.layout.place(rows(seed, count), count)


def rows(seed: int, count: int) -> dict:
    return packed_batch(seed, (DOCUMENTS * 2)[:count], LENGTH, SPEC.vocab_size)


@functools.cache
def shared(dtype: type = np.float32) -> Run:
    """One run for all tests, so that its step compiles once."""
    return Run(dtype=dtype)


def host(tree):
    """A copy on the host, since a step takes its state's memory."""
    return jax.tree.map(np.array, tree)


def equal(a, b) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


# --- Gradients ----------------------------------------------------------------------------------


def double_precision(tree):
    return jax.tree.map(lambda x: np.float64(x) if x.dtype == np.float32 else np.array(x), tree)


def test_accumulation_is_one_large_batch():
    """Sums over microbatches, then one division: uneven weights do not matter."""
    count, key = MICROBATCHES * MICROBATCH, jax.random.key(0)
    weights = rows(1, count)["weights"].reshape(MICROBATCHES, -1).sum(1)
    assert weights.max() > 3 * weights.min()
    with jax.enable_x64(True):
        run = shared(np.float64)
        params = double_precision(run.fresh().params)
        whole = {name: values[None] for name, values in rows(1, count).items()}
        whole |= {"microbatches": jnp.int32(1)}
        total = jax.jit(functools.partial(accumulate, run.loss_sums))
        expected = total(params, None, whole, key)
        found = total(params, None, run.inputs(1), key)
        assert float(found[1]["weight"]) == pytest.approx(weights.sum(), rel=1e-6)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), found[1], expected[1]
        )
        close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
        jax.tree.map(close, found[0], expected[0])


def test_steps_by_hand():
    """Mean gradient, its norm, the clip, the optimiser, the schedule, in this order."""

    def by_hand(state, inputs, share):
        grads, sums = total(state.params, None, inputs, jax.random.key(0))
        grads = jax.tree.map(lambda g: np.asarray(g) / np.float64(sums["weight"]), grads)
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * min(1.0, CLIP / norm), grads)
        update, opt_state = direction(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + share * np.asarray(u), state.params, update)
        state = dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=host(opt_state)
        )
        metrics = {
            "loss": float(sums["loss"] / sums["weight"]),
            "tokens": float(sums["weight"]),
            "grad_norm": float(norm),
            "learning_rate": RATE * share,
            "skipped": 0.0,
        }
        return state, metrics

    with jax.enable_x64(True):
        run = shared(np.float64)
        total = jax.jit(functools.partial(accumulate, run.loss_sums))
        direction = jax.jit(run.optimizer.update)
        state = double_precision(run.fresh())
        expected = host(state)
        for number, share in enumerate([0.5, 1.0, 1.0]):
            inputs = run.inputs(number)
            expected, metrics = by_hand(expected, inputs, share)
            assert metrics["grad_norm"] > CLIP
            state, found = run.step(state, None, inputs)
            assert {k: float(v) for k, v in found.items()} == pytest.approx(metrics, rel=1e-6)
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-8)
        jax.tree.map(close, host(state), expected)


def test_fewer_microbatches_read_only_those_and_compile_nothing_new():
    run = shared()
    state, compiled = run.fresh(), None
    evaluate = jax.jit(lambda params, batch: run.loss_sums(params, None, batch, None)[0])
    for count in (4, 12, 8):
        inputs = run.inputs(2, count)
        # What lies beyond the count must not be read: poison it.
        filled = count // MICROBATCH
        inputs["weights"] = inputs["weights"].at[filled:].set(jnp.nan)
        before = host(state.params)
        state, metrics = run.step(state, None, inputs)
        compiled = compiled or run.step._cache_size()
        assert run.step._cache_size() == compiled
        assert float(metrics["tokens"]) == pytest.approx(rows(2, count)["weights"].sum())
        batches = [{n: x[i] for n, x in inputs.items() if x.ndim} for i in range(filled)]
        nats = sum(float(evaluate(before, batch)) for batch in batches)
        expected = nats / rows(2, count)["weights"].sum()
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss():
    for run in (shared(), Run(name="muon", microbatches=1)):
        state, losses = run.fresh(), []
        for _ in range(12):
            state, metrics = run.step(state, None, run.inputs(4))
            losses.append(float(metrics["loss"]))
        assert losses[-1] < 0.8 * losses[0]


# --- Steps that are dropped ---------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_a_non_finite_step_changes_the_step_count_and_nothing_else(poison):
    """3e38 is finite: the gradient's norm is what overflows."""
    run = shared()
    state, _ = run.step(run.fresh(), None, run.inputs(5))
    before = host(state)
    inputs = run.inputs(6)
    inputs["weights"] = inputs["weights"].at[0, 0, 0].set(poison)
    state, metrics = run.step(state, None, inputs)
    assert float(metrics["skipped"]) == 1
    assert int(state.step) == int(before.step) + 1 == 2
    after = host(state)
    assert equal(dataclasses.replace(after, step=before.step), before)
    # The next one goes on as if the dropped one had only cost its batch.
    state, metrics = run.step(state, None, run.inputs(7))
    assert float(metrics["skipped"]) == 0 and not equal(state.params, before.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(host(state.params)))


def test_a_batch_without_weight_moves_nothing_but_decay():
    run = shared()
    state = run.fresh()
    before = host(state.params)
    inputs = run.inputs(5)
    inputs["weights"] = jnp.zeros_like(inputs["weights"])
    state, metrics = run.step(state, None, inputs)
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    shrink = 1 - RATE * 0.5 * run.config.weight_decay
    np.testing.assert_allclose(state.params["embedding"], shrink * before["embedding"], rtol=1e-6)
    assert equal(state.params["final_norm"], before["final_norm"])


# --- One program --------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 1)], ids=["one", "four"])
def test_one_compilation_in_a_run_and_in_one_that_resumes(mesh, tmp_path):
    run = Run(mesh)
    state = run.fresh()
    for number in range(4):
        state, _ = run.step(state, None, run.inputs(number))
    assert run.step._cache_size() == 1
    expected_shardings = jax.tree.map(lambda x: x.sharding, run.template)
    assert jax.tree.map(lambda x: x.sharding, state) == expected_shardings

    saver = Checkpointer(epath.Path(tmp_path), CheckpointConfig())
    saver.save(4, state, input={}, config={}, lineage={})
    saver.close()
    uninterrupted, _ = run.step(state, None, run.inputs(4))
    loader = Checkpointer(epath.Path(tmp_path), CheckpointConfig())
    restored = loader.restore(run.template).state
    loader.close()
    resumed, _ = run.step(restored, None, run.inputs(4))
    assert run.step._cache_size() == 1
    assert equal(resumed, uninterrupted)


def test_the_state_is_donated():
    run = shared()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # JAX warns of a donated array that it could not use.
        state = run.fresh()
        after, _ = run.step(state, None, run.inputs(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(after))


def test_the_step_moves_nothing_between_host_and_device():
    run = shared()
    state, inputs = run.fresh(), [run.inputs(number) for number in range(3)]
    state, _ = run.step(state, None, inputs[0])
    with jax.transfer_guard("disallow"):
        for batch in inputs[1:]:
            state, metrics = run.step(state, None, batch)
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            run.step(state, None, host(inputs[0]))
    assert np.isfinite(float(metrics["loss"]))


# --- Dropout ------------------------------------------------------------------------------------


def test_dropout_differs_by_step_microbatch_and_seed_and_reproduces():
    run = Run(dropout=0.3, microbatches=2)
    same_rows = rows(8, MICROBATCH)
    doubled = {name: np.concatenate([x, x]) for name, x in same_rows.items()}
    inputs = run.layout.place(doubled, 2 * MICROBATCH)
    evaluate = jax.jit(lambda params, batch, key: run.loss_sums(params, None, batch, key)[0])

    def two_steps(seed):
        state, losses = run.fresh(seed), []
        for _ in range(2):
            state, metrics = run.step(state, None, inputs)
            losses.append(float(metrics["loss"]))
        return host(state), losses

    first, losses = two_steps(0)
    again, losses_again = two_steps(0)
    assert losses == losses_again and equal(first, again)

    state = run.fresh(0)
    batch = {name: value[0] for name, value in inputs.items() if name != "microbatches"}
    keys = [jax.random.fold_in(step_key(state), index) for index in range(2)]
    next_step = dataclasses.replace(state, step=state.step + 1)
    keys.append(jax.random.fold_in(step_key(next_step), 0))
    other_seed = run.fresh(1)
    keys.append(jax.random.fold_in(step_key(other_seed), 0))
    drawn = [float(evaluate(state.params, batch, key)) for key in keys]
    assert len(set(drawn)) == len(drawn)
    # The step's loss is the mean over its microbatches, each with the key of its index.
    assert losses[0] * 2 * same_rows["weights"].sum() == pytest.approx(sum(drawn[:2]), rel=1e-5)


def test_dropout_keeps_the_mean_and_its_rate():
    x = jnp.ones((1000, 201))
    out = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.7)}
    assert (out == 0).mean() == pytest.approx(0.3, abs=0.005)
    # Neighbours do not know of each other.
    both = (out[:, :-1] == 0) & (out[:, 1:] == 0)
    assert both.mean(axis=0) == pytest.approx(0.09, abs=0.045)
    assert both[:, ::2].mean() == pytest.approx(0.09, abs=0.004)
    assert dropout(x, 0.0, None) is x


def test_embeddings_may_have_a_dropout_of_their_own():
    """Where the branches write nothing, a model is its embeddings alone."""
    model, params = shared().model, shared().fresh().params
    layer = params["group_0"]["layer_0"]
    silent = {
        "mixer": {"out": jax.tree.map(jnp.zeros_like, layer["mixer"]["out"])},
        "mlp": {"down": jax.tree.map(jnp.zeros_like, layer["mlp"]["down"])},
    }
    layer = layer | {name: layer[name] | parts for name, parts in silent.items()}
    params = params | {"group_0": {"layer_0": layer}}

    def hidden(params: dict, dropout: float, embedding_dropout: float | None) -> np.ndarray:
        rates = {"dropout": dropout, "embedding_dropout": embedding_dropout}
        return model.apply(params, rows(0, 2)["tokens"], key=jax.random.key(0), **rates)[0]

    whole = hidden(params, 0.0, None)
    assert equal(hidden(params, 0.5, 0.0), whole)
    assert not equal(hidden(params, 0.5, None), whole)
    assert equal(hidden(params, 0.0, 0.5), hidden(params, 0.5, None))


def test_evaluation_has_no_dropout():
    model, params = shared().model, shared().fresh().params
    apply = jax.jit(lambda key: model.apply(params, rows(0, 2)["tokens"], key=key)[0])
    assert equal(apply(jax.random.key(0)), apply(jax.random.key(1)))
