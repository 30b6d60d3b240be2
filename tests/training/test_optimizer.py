"""Optimisers and schedules, against NumPy, Optax's two-dimensional Muon and closed forms."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import random_params

from instar.errors import UserError
from instar.families import gpt3, llama
from instar.models.language_model import LanguageModel
from instar.training.batch import BatchConfig, RampConfig, rows_of_steps
from instar.training.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    clip_by_norm,
    make_optimizer,
    make_schedule,
)

GPT = LanguageModel(
    gpt3.gpt3(depth=3, width=10, heads=3, head_dim=5, mlp_width=14, vocab_size=17, max_positions=7)
)
LLAMA = LanguageModel(
    llama.llama(
        depth=3,
        width=12,
        heads=4,
        kv_heads=2,
        head_dim=4,
        mlp_width=20,
        vocab_size=17,
        qk_norm=True,
    )
)


def named(tree: dict) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def gradients(model: LanguageModel, seed: int) -> dict:
    """As random as parameters, and of very different sizes."""
    rng = np.random.default_rng(100 + seed)
    return jax.tree.map(
        lambda s: rng.standard_normal(s.shape) * 10.0 ** rng.uniform(-3, 1, s.shape), model.shapes
    )


def updates(model: LanguageModel, config: OptimizerConfig, params: dict, steps: int) -> list[dict]:
    """What the optimiser adds in each of `steps` steps; its inputs are float64."""
    optimizer = make_optimizer(config, model.axes)
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    found = []
    for i in range(steps):
        update, state = step(gradients(model, i), state, params)
        params = optax.apply_updates(params, update)
        found.append(named(jax.device_get(update)))
    return found


# --- AdamW --------------------------------------------------------------------------------------


def adamw_by_hand(gradient, moments, param, step, config, decayed):
    """Loshchilov & Hutter 2019, algorithm 2, with the learning rate on the decay."""
    first, second = moments
    first = config.b1 * first + (1 - config.b1) * gradient
    second = config.b2 * second + (1 - config.b2) * gradient**2
    unbiased = first / (1 - config.b1**step), second / (1 - config.b2**step)
    direction = unbiased[0] / (np.sqrt(unbiased[1]) + config.epsilon)
    if decayed:
        direction = direction + config.weight_decay * param
    return -config.learning_rate * direction, (first, second)


@pytest.mark.parametrize("decay", [("matrix", "embedding"), ("matrix",), ("vector",), ()])
def test_adamw_equals_numpy_over_ten_steps(decay):
    config = OptimizerConfig(
        learning_rate=0.03, b1=0.8, b2=0.93, epsilon=1e-3, weight_decay=0.2, decay=decay
    )
    with jax.enable_x64(True):
        params = random_params(GPT, 1, np.float64)
        found = updates(GPT, config, params, 10)
    kinds = {name: axes.kind for name, axes in named(GPT.axes).items()}
    assert set(kinds.values()) == {"matrix", "embedding", "vector"}
    params, moments = named(params), {name: (0.0, 0.0) for name in kinds}
    for step, update in enumerate(found, start=1):
        gradient = named(gradients(GPT, step - 1))
        for name, kind in kinds.items():
            expected, moments[name] = adamw_by_hand(
                gradient[name], moments[name], params[name], step, config, kind in decay
            )
            np.testing.assert_allclose(update[name], expected, rtol=1e-9, atol=1e-12)
            params[name] = params[name] + update[name]


# --- Muon ---------------------------------------------------------------------------------------


def sides(model: LanguageModel, name: str) -> tuple[int, int]:
    """The two sides of a matrix of a layer, from what it does."""
    mixer = model.spec.each_layer()[0].mixer
    width, mlp = model.spec.width, model.spec.each_layer()[0].mlp.width
    heads, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    return {
        "query": (width, heads),
        "key": (width, kv),
        "value": (width, kv),
        "out": (heads, width),
        "up": (width, mlp),
        "gate": (width, mlp),
        "down": (mlp, width),
    }[name.split(".")[-2]]


def in_layers(model: LanguageModel) -> list[str]:
    return [name for name, axes in named(model.axes).items() if axes.kind == "matrix"]


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_muon_makes_each_layer_s_matrix_orthogonal(model):
    """Singular values near 1, times sqrt(max(1, out / in)): Newton-Schulz gives 0.7 to 1.2."""
    config = OptimizerConfig("muon", muon_learning_rate=1.0, weight_decay=0.0)
    params = random_params(model, 2)
    (update,) = updates(model, config, params, 1)
    assert len(in_layers(model)) == (6 if model is GPT else 7)
    for name in in_layers(model):
        rows, columns = sides(model, name)
        for layer in update[name]:
            singular = np.linalg.svd(layer.reshape(rows, columns), compute_uv=False)
            singular /= math.sqrt(max(1, columns / rows))
            assert singular.min() > 0.6 and singular.max() < 1.3, name


def test_muon_equals_optax_s_layer_by_layer():
    """Three steps, so that momentum and decay are in it; embeddings and vectors are AdamW's."""
    config = OptimizerConfig("muon", muon_learning_rate=0.05, momentum=0.9, weight_decay=0.3)
    with jax.enable_x64(True):
        params = random_params(LLAMA, 3, np.float64)
        found = updates(LLAMA, config, params, 3)
        plain = optax.contrib.muon(0.05, beta=0.9, weight_decay=0.3)
        step = jax.jit(plain.update)
        matrices = {
            f"{name}/{layer}": values.reshape(sides(LLAMA, name))
            for name in in_layers(LLAMA)
            for layer, values in enumerate(named(params)[name])
        }
        state = plain.init(matrices)
        for i, update in enumerate(found):
            gradient = named(gradients(LLAMA, i))
            flat = {}
            for key in matrices:
                name, layer = key.split("/")
                flat[key] = gradient[name][int(layer)].reshape(matrices[key].shape)
            expected, state = step(flat, state, matrices)
            matrices = optax.apply_updates(matrices, expected)
            for key, value in expected.items():
                name, layer = key.split("/")
                same = update[name][int(layer)].reshape(value.shape)
                np.testing.assert_allclose(same, value, rtol=1e-8, atol=1e-11)
        adamw = updates(LLAMA, OptimizerConfig("adamw", weight_decay=0.3), params, 1)[0]
        for name, axes in named(LLAMA.axes).items():
            if axes.kind != "matrix":
                np.testing.assert_allclose(found[0][name], adamw[name], rtol=1e-9)


def test_muon_decays_matrices_only_where_they_are_decayed():
    with jax.enable_x64(True):
        params = random_params(GPT, 4, np.float64)
        all_kinds, none, off = (
            updates(GPT, OptimizerConfig("muon", weight_decay=wd, decay=decay), params, 1)[0]
            for wd, decay in (
                (0.5, ("matrix", "embedding")),
                (0.0, ("matrix", "embedding")),
                (0.5, ("embedding",)),
            )
        )
    for name, axes in named(GPT.axes).items():
        rate = 0.02 if axes.kind == "matrix" else 3e-4
        decayed = 0.5 * rate * named(params)[name] * (axes.kind != "vector")
        np.testing.assert_allclose(none[name] - all_kinds[name], decayed, rtol=1e-7, atol=1e-12)
        if axes.kind == "matrix":
            np.testing.assert_array_equal(off[name], none[name])


# --- Schedules ----------------------------------------------------------------------------------


def closed_form(config: ScheduleConfig, steps: int, step: int) -> float:
    """The share of the peak, written again and piece by piece."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    end = steps if config.decay_steps is None else config.decay_steps
    final = config.final_fraction
    if config.kind == "constant":
        return 1.0
    if config.kind == "wsd":
        length = math.ceil(config.decay_fraction * end)
        return 1 - (1 - final) * min(max(step - (end - length), 0) / length, 1)
    done = min((step - config.warmup_steps) / (end - config.warmup_steps), 1)
    if config.kind == "linear":
        return 1 - (1 - final) * done
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("decay_steps", [None, 20])
def test_schedules_at_every_step(kind, warmup, decay_steps):
    config = ScheduleConfig(kind, warmup, decay_steps, final_fraction=0.05, decay_fraction=0.3)
    config.check()
    steps = 31
    schedule = jax.jit(make_schedule(config, steps))
    found = [float(schedule(jnp.int32(step))) for step in range(steps + 4)]
    expected = [closed_form(config, steps, step) for step in range(steps + 4)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[max(warmup - 1, 0)] == 1.0 and max(found) == 1.0 and min(found) > 0
    if warmup:
        assert found[0] == pytest.approx(1 / warmup)
    if kind != "constant":
        end = decay_steps or steps
        np.testing.assert_allclose(found[end:], 0.05, rtol=1e-5)
        assert found[end - 1] > 0.05


def by_megatron(peak, low, warmup, decay, kind, rows_before, rows_after) -> float:
    """Megatron-LM's learning rate in samples; of its warm-up, the value that a step ends with."""
    if rows_before < warmup:
        return peak * min(rows_after / warmup, 1)
    if rows_before > decay:
        return low
    ratio = (rows_before - warmup) / (decay - warmup)
    shape = (math.cos(math.pi * ratio) + 1) / 2 if kind == "cosine" else 1 - ratio
    return low + shape * (peak - low)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("ramp", [None, RampConfig(2, 2, 60)])
@pytest.mark.parametrize(("warmup", "decay"), [(20, 150), (None, 90), (30, None)])
def test_a_schedule_in_rows_follows_what_a_growing_batch_has_read(kind, ramp, warmup, decay):
    batch, steps = BatchConfig(8, None, ramp), 30
    config = ScheduleConfig(kind, warmup_rows=warmup, decay_rows=decay)
    config.check()
    schedule = make_schedule(config, steps, batch)
    read = [0, *itertools.accumulate(itertools.islice(rows_of_steps(batch), steps))]
    end = decay or read[-1]
    expected = [by_megatron(1, 0.1, warmup or 0, end, kind, *read[s : s + 2]) for s in range(steps)]
    np.testing.assert_allclose(schedule(jnp.arange(steps)), expected, rtol=1e-5)


def test_a_warm_up_by_a_share_of_the_steps_is_rounded_up():
    found = make_schedule(ScheduleConfig("cosine", warmup_fraction=0.03), 110)
    expected = make_schedule(ScheduleConfig("cosine", warmup_steps=4), 110)
    np.testing.assert_array_equal(found(jnp.arange(110)), expected(jnp.arange(110)))


def test_schedules_do_not_lose_precision_in_a_long_run():
    schedule = make_schedule(ScheduleConfig("linear", warmup_steps=2000), 10_000_000)
    for step in (0, 1999, 2000, 5_000_000, 9_999_999):
        expected = closed_form(ScheduleConfig("linear", warmup_steps=2000), 10_000_000, step)
        assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (ScheduleConfig("cosine", warmup_steps=10), 10),
        (ScheduleConfig("linear", warmup_steps=11), 10),
        (ScheduleConfig("wsd", warmup_steps=9), 10),
        (ScheduleConfig("wsd", warmup_steps=1000), 10),
    ],
)
def test_a_warm_up_that_leaves_no_room_is_refused(config, steps):
    with pytest.raises(UserError, match="warmup_steps"):
        make_schedule(config, steps)


def test_a_warm_up_in_rows_that_leaves_no_room_is_refused():
    with pytest.raises(UserError, match=r"warmup_rows \(80\) must be smaller than rows \(80\)"):
        make_schedule(ScheduleConfig("cosine", warmup_rows=80), 10, BatchConfig(8))


def test_a_warm_up_up_to_the_decay_is_accepted():
    make_schedule(ScheduleConfig("wsd", warmup_steps=8), 10)
    make_schedule(ScheduleConfig("cosine", warmup_steps=9), 10)


# --- Clipping, and values that make no sense ----------------------------------------------------


@pytest.mark.parametrize(("limit", "factor"), [(None, 1), (100.0, 1), (13.0, 1), (6.5, 0.5)])
def test_clip_by_norm(limit, factor):
    tree = {"a": jnp.asarray([3.0, 4.0]), "b": jnp.asarray([[12.0]])}
    found = clip_by_norm(tree, jnp.float32(13.0), limit)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        found,
        jax.tree.map(lambda x: x * factor, tree),
    )


def test_clipping_a_zero_gradient_keeps_it_zero():
    assert clip_by_norm({"a": jnp.zeros(3)}, jnp.float32(0), 1.0)["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(learning_rate=0.0), "optimizer.learning_rate must be positive"),
        (OptimizerConfig(learning_rate=math.nan), "optimizer.learning_rate must be positive"),
        (OptimizerConfig(b2=1.0), r"optimizer.b2 must be in \[0, 1\)"),
        (OptimizerConfig(momentum=-0.1), "optimizer.momentum"),
        (OptimizerConfig(weight_decay=-0.1), "optimizer.weight_decay"),
        (OptimizerConfig(clip_norm=0.0), "optimizer.clip_norm"),
        (ScheduleConfig(warmup_steps=-1), "schedule.warmup_steps must not be negative"),
        (ScheduleConfig(warmup_steps=5, decay_steps=5), r"schedule.decay_steps \(5\) must be"),
        (ScheduleConfig(warmup_rows=-1), "schedule.warmup_rows must not be negative"),
        (ScheduleConfig(warmup_rows=5, decay_rows=5), r"schedule.decay_rows \(5\) must be"),
        (ScheduleConfig(warmup_rows=5, decay_steps=9), "all in rows or all in steps"),
        (ScheduleConfig(warmup_steps=5, decay_rows=9), "all in rows or all in steps"),
        (ScheduleConfig(decay_rows=9, warmup_fraction=0.1), "all in rows or all in steps"),
        (ScheduleConfig(warmup_steps=1, warmup_fraction=0.1), "exclude each other"),
        (ScheduleConfig(warmup_fraction=1.0), "schedule.warmup_fraction"),
        (ScheduleConfig(final_fraction=1.5), "schedule.final_fraction"),
        (ScheduleConfig("wsd", decay_fraction=0.0), "schedule.decay_fraction"),
    ],
)
def test_values_that_make_no_sense(config, message):
    with pytest.raises(UserError, match=message):
        config.check()
