"""Patterns between our parameters and other programs' tensors, both ways, against NumPy."""

import numpy as np
import pytest

from instar.families import llama
from instar.families.layout import Tensor, linear, sizes_of
from instar.families.registry import FAMILIES
from instar.interchange.parameters import flatten
from instar.models.language_model import LanguageModel

SPEC = llama.llama(
    depth=2, width=7, heads=8, kv_heads=4, head_dim=6, mlp_width=5, vocab_size=11, max_positions=9
)
SIZES = sizes_of(SPEC, SPEC.each_layer()[0])
D, H, K, N = 7, 8, 4, 6  # width, heads, kv_heads, head_dim


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


Q, KEY, V = random(D, H, N), random(D, K, N), random(D, K, N)


def torch_linear() -> tuple:
    return linear("x", "q", "embed", "heads head_dim")[0], [Q], Q.reshape(D, H * N).T


def side_by_side() -> tuple:
    """GPT-2's: [in, q | k | v]."""
    parts = {
        "q": "embed heads head_dim -> embed (heads head_dim)",
        "k": "embed kv_heads head_dim -> embed (kv_heads head_dim)",
        "v": "embed kv_heads head_dim -> embed (kv_heads head_dim)",
    }
    expected = np.concatenate([x.reshape(D, -1) for x in (Q, KEY, V)], axis=1)
    return Tensor("x", parts, join=1), [Q, KEY, V], expected


def by_head() -> tuple:
    """BLOOM's: rows are [head, (q, k, v), head_dim]; here with as many keys as queries."""
    pattern = "embed heads head_dim -> heads 1 head_dim embed"
    tensor = Tensor(
        "x",
        {"q": pattern, "k": pattern, "v": pattern},
        join=1,
        fold="heads slots head_dim embed -> (heads slots head_dim) embed",
    )
    arrays = [Q, Q + 1, Q + 2]
    expected = np.stack([x.transpose(1, 2, 0) for x in arrays], axis=1).reshape(-1, D)
    return tensor, arrays, expected


def by_group() -> tuple:
    """Falcon's: for each key its queries, then the key, then the value."""
    tensor = Tensor(
        "x",
        {
            "q": "embed (kv_heads group) head_dim -> kv_heads group head_dim embed",
            "k": "embed kv_heads head_dim -> kv_heads 1 head_dim embed",
            "v": "embed kv_heads head_dim -> kv_heads 1 head_dim embed",
        },
        join=1,
        fold="kv_heads slots head_dim embed -> (kv_heads slots head_dim) embed",
    )
    rows = []
    for group in range(K):
        heads = [Q[:, 2 * group], Q[:, 2 * group + 1], KEY[:, group], V[:, group]]
        rows += [head.T for head in heads]
    return tensor, [Q, KEY, V], np.concatenate(rows)


def paired() -> tuple:
    """llama.cpp's: element i of a head stands beside element i + head_dim/2."""
    tensor = Tensor("x", {"q": "embed heads (two half) -> (heads half two) embed"})
    order = [0, 3, 1, 4, 2, 5]
    return tensor, [Q], Q[:, :, order].reshape(D, -1).T


@pytest.mark.parametrize("case", [torch_linear, side_by_side, by_head, by_group, paired])
def test_a_pattern_is_what_numpy_says_in_both_directions(case):
    tensor, ours, expected = case()
    assert tensor.shape(SIZES) == expected.shape
    written = tensor.write(ours, SIZES)
    np.testing.assert_array_equal(written, expected)
    for path, array in zip(tensor.parts, ours, strict=True):
        np.testing.assert_array_equal(tensor.read(written, path, SIZES), array)


SMALL = {"depth": 2, "width": 32, "heads": 4, "mlp_width": 10, "vocab_size": 13}


@pytest.mark.parametrize("form", ["hub", "gguf"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layout_places_every_parameter_once(name, form):
    family = FAMILIES[name]
    if getattr(family, form) is None:
        pytest.skip(f"{name} has no {form} format")
    spec = family.build(**SMALL, tied=False)
    placed = list(getattr(family, form).layout.tensors(spec))
    assert len({each.name for each in placed}) == len(placed)
    found = sorted((each.stem + part, each.index) for each in placed for part in each.tensor.parts)
    expected, model = [], LanguageModel(spec)
    axes = flatten(model.axes)
    for path, leaf in flatten(model.shapes).items():
        stacked = sum(name in ("layers", "experts") for name in axes[path].names)
        expected += [(path, index) for index in np.ndindex(leaf.shape[:stacked])]
    assert found == sorted(expected)
