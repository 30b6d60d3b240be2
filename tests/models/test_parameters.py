"""What each parameter is, and how fresh ones are drawn."""

import collections
import functools
import itertools
import math

import jax
import numpy as np
import pytest
from examples import GPT, LATENT, LLAMA, MIXED, SPECS

from instar.models.language_model import LanguageModel
from instar.models.parameters import Axes, Initialization
from instar.models.spec import ModelSpec

ATTENTION = {
    "query.kernel": ("layers", "embed", "heads", "head_dim"),
    "key.kernel": ("layers", "embed", "kv_heads", "head_dim"),
    "value.kernel": ("layers", "embed", "kv_heads", "head_dim"),
    "out.kernel": ("layers", "heads", "head_dim", "embed"),
}
MATRICES = {f"mixer.{name}": names for name, names in ATTENTION.items()} | {
    "mlp.up.kernel": ("layers", "embed", "mlp"),
    "mlp.down.kernel": ("layers", "mlp", "embed"),
}
BIASES = {
    "mixer.query.bias": ("layers", "heads", "head_dim"),
    "mixer.key.bias": ("layers", "kv_heads", "head_dim"),
    "mixer.value.bias": ("layers", "kv_heads", "head_dim"),
    "mixer.out.bias": ("layers", "embed"),
    "mlp.up.bias": ("layers", "mlp"),
    "mlp.down.bias": ("layers", "embed"),
}
SCALES = {"mixer_norm.scale": ("layers", "norm"), "mlp_norm.scale": ("layers", "norm")}


def by_name(tree: dict) -> dict:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(key.key for key in path): leaf for path, leaf in paths}


@functools.cache
def initializer(spec: ModelSpec, initialization: Initialization):
    model = LanguageModel(spec)
    return jax.jit(lambda key: model.init(key, initialization)).lower(jax.random.key(0)).compile()


def fresh(spec: ModelSpec, seed: int, initialization: Initialization | None = None) -> dict:
    return by_name(initializer(spec, initialization or Initialization())(jax.random.key(seed)))


def in_layer(names: dict) -> dict:
    return {f"group_0.layer_0.{name}": axes for name, axes in names.items()}


def test_every_parameter_of_gpt3():
    expected = in_layer(MATRICES | BIASES | SCALES) | {
        "group_0.layer_0.mixer_norm.bias": ("layers", "norm"),
        "group_0.layer_0.mlp_norm.bias": ("layers", "norm"),
        "final_norm.scale": ("norm",),
        "final_norm.bias": ("norm",),
        "embedding": ("vocab", "embed"),
        "position_embedding": ("positions", "embed"),
    }
    axes = by_name(LanguageModel(GPT).axes)
    assert {name: a.names for name, a in axes.items()} == expected


def test_every_parameter_of_llama():
    gate = {"mlp.gate.kernel": ("layers", "embed", "mlp")}
    qk_norm = {
        "mixer.query_norm.scale": ("layers", "head_dim"),
        "mixer.key_norm.scale": ("layers", "head_dim"),
    }
    expected = in_layer(MATRICES | gate | SCALES | qk_norm) | {
        "final_norm.scale": ("norm",),
        "embedding": ("vocab", "embed"),
        "head.kernel": ("embed", "vocab"),
    }
    axes = by_name(LanguageModel(LLAMA).axes)
    assert {name: a.names for name, a in axes.items()} == expected


SIDES = {
    "query": (["embed"], ["heads", "head_dim"]),
    "key": (["embed"], ["kv_heads", "head_dim"]),
    "value": (["embed"], ["kv_heads", "head_dim"]),
    "out": (["heads", "head_dim"], ["embed"]),
    "up": (["embed"], ["mlp"]),
    "gate": (["embed"], ["mlp"]),
    "down": (["mlp"], ["embed"]),
    "widen": (["narrow"], ["embed"]),
    "narrow": (["embed"], ["narrow"]),
    "router": (["embed"], ["router"]),
}
LATENT_SIDES = {
    "query_latent": (["embed"], ["latent"]),
    "latent": (["embed"], ["latent"]),
    "query": (["rank"], ["heads", "head_dim"]),
    "key": (["rank"], ["heads", "head_dim"]),
    "value": (["rank"], ["heads", "value_dim"]),
    "out": (["heads", "value_dim"], ["embed"]),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_kinds_and_sides_follow_the_names(spec):
    model = LanguageModel(spec)
    axes, shapes = by_name(model.axes), by_name(model.shapes)
    assert axes.keys() == shapes.keys()
    for name, a in axes.items():
        assert len(a.names) == len(shapes[name].shape)
        if name in ("embedding", "position_embedding", "head.kernel"):
            kind = "embedding"
        else:
            kind = "matrix" if name.endswith("kernel") else "vector"
        assert a.kind == kind, name
        if kind == "matrix":
            sides = [a.names[i] for i in a.reduction_dims], [a.names[i] for i in a.output_dims]
            expected = SIDES | (LATENT_SIDES if spec is LATENT else {})
            assert sides == expected[name.split(".")[-2]]


def test_experts_are_stacked_and_not_a_side():
    axes = Axes(("layers", "experts", "embed", "mlp"), ("embed",))
    assert (axes.kind, axes.reduction_dims, axes.output_dims) == ("matrix", (2,), (3,))


WRITERS = ("mixer.out.kernel", "mlp.down.kernel")
# Wide enough for a standard deviation to be sharp to about one per cent.
WIDE = MIXED.replace(vocab_size=400, width=150)


def deviations(spec, initialization) -> dict[str, tuple[np.ndarray, int, int]]:
    """Of each matrix and table: the standard deviation in each layer, fan-in, draws a layer."""
    params, axes = fresh(spec, 3, initialization), by_name(LanguageModel(spec).axes)
    found = {}
    for name, a in axes.items():
        values = np.asarray(params[name])
        assert values.dtype == np.float32
        if a.kind == "vector":
            assert (values == (1 if name.endswith("scale") else 0)).all()
            continue
        fan_in = math.prod(values.shape[i] for i in a.reduction_dims)
        stacked = values if a.names[0] == "layers" else values[None]
        flat = stacked.reshape(len(stacked), -1)
        # A hundred thousand draws of the mean: no drift.
        assert np.abs(flat.mean()) < 5 * flat.std() / math.sqrt(flat.size)
        found[name] = flat.std(axis=1), fan_in, flat.shape[1]
    return found


def layer_number(name: str, repeat: int) -> int:
    """The place among MIXED's five layers, from 1: a period of two, twice, and one more."""
    group, layer = (int(part.split("_")[1]) for part in name.split(".")[:2])
    return 4 * group + 2 * repeat + layer + 1


@pytest.mark.parametrize(
    ("scheme", "spec"), [("gpt3", WIDE), ("opt", GPT.replace(width=120)), ("depth_scaled", WIDE)]
)
def test_standard_deviations(scheme, spec):
    base = {"gpt3": 0.02, "opt": 0.006, "depth_scaled": 0.02}[scheme]
    for name, (found, fan_in, draws) in deviations(spec, Initialization(scheme)).items():
        for repeat, deviation in enumerate(found):
            if "embedding" in name:
                expected = base
            else:
                expected = 1 / math.sqrt(fan_in) if scheme == "depth_scaled" else base
            if name.endswith(WRITERS):
                number = layer_number(name, repeat) if scheme == "depth_scaled" else spec.depth
                expected /= math.sqrt(2 * number)
            # The standard error of a deviation of n normal draws is s / sqrt(2n).
            assert deviation == pytest.approx(expected, rel=5 / math.sqrt(2 * draws)), name


def test_a_given_std_replaces_the_scheme_s():
    found = deviations(GPT.replace(width=120), Initialization("opt", std=0.5))
    assert found["embedding"][0][0] == pytest.approx(0.5, rel=0.05)
    assert found["group_0.layer_0.mlp.up.kernel"][0] == pytest.approx([0.5] * 3, rel=0.1)


def test_no_two_layers_or_matrices_share_their_draws():
    params = fresh(WIDE, 0)
    vectors = []
    for name, axes in by_name(LanguageModel(WIDE).axes).items():
        if axes.kind != "vector":
            values = np.asarray(params[name])
            stacked = values if axes.names[0] == "layers" else values[None]
            # A common draw could hide behind another scale, so compare directions.
            vectors += [row.ravel()[:200] / np.linalg.norm(row.ravel()[:200]) for row in stacked]
    assert len(vectors) > 30
    for a, b in itertools.combinations(vectors, 2):
        size = min(len(a), len(b))
        assert abs(a[:size] @ b[:size]) < 0.9


def test_seeds_differ_and_reproduce():
    first, again, other = (fresh(WIDE, seed) for seed in (0, 0, 1))
    axes = by_name(LanguageModel(WIDE).axes)
    random = [name for name, a in axes.items() if a.kind != "vector"]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in random)


def test_shapes_are_those_of_fresh_parameters_and_hold_no_memory():
    for spec in SPECS.values():
        model = LanguageModel(spec)
        leaves = collections.Counter(type(x) for x in jax.tree.leaves(model.shapes))
        assert set(leaves) == {jax.ShapeDtypeStruct}
        drawn = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.tree.map(describe, drawn) == jax.tree.map(describe, model.shapes)


def describe(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}{leaf.shape}"
