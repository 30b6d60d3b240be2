"""The analytic counts, against published numbers and against the program that runs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from instar.families import deepseek_v3, gpt3, llama, mixtral
from instar.models.language_model import LanguageModel
from instar.models.spec import ModelSpec
from instar.training.flops import (
    forward_flops_per_token,
    mfu,
    parameter_count,
    train_flops_per_token,
    visible_keys,
)


def gpt(size: str) -> ModelSpec:
    depth, width, heads = gpt3.SIZES[size]
    return gpt3.gpt3(depth=depth, width=width, heads=heads)


def windowed(spec: ModelSpec, window: int) -> ModelSpec:
    """`spec` with a window on every second layer."""
    ((repeat, (layer,)),) = spec.layers
    local = dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=window))
    return spec.replace(layers=((repeat // 2, (local, layer)),))


TINY_GPT = gpt3.gpt3(depth=2, width=24, heads=3, vocab_size=50, max_positions=16)
TINY_LLAMA = llama.llama(depth=2, width=32, heads=4, kv_heads=2, mlp_width=56, vocab_size=50)
_TINY = {"depth": 2, "width": 32, "heads": 4, "mlp_width": 18, "experts": 4, "vocab_size": 50}
_TINY |= {"experts_per_token": 2}
TINY_DENSE_DEEPSEEK = deepseek_v3.deepseek_v3(**_TINY, dense_layers=2, value_dim=6)
TINY_DEEPSEEK = deepseek_v3.deepseek_v3(**_TINY, value_dim=6, query_rank=12)
VARIANTS = [
    pytest.param(TINY_GPT, id="gpt"),
    pytest.param(TINY_LLAMA, id="llama-gqa"),
    pytest.param(
        gpt3.gpt3(
            depth=2,
            width=24,
            heads=4,
            head_dim=16,
            kv_heads=1,
            vocab_size=50,
            tied=False,
            max_positions=16,
            qk_norm=True,
        ),
        id="gpt-mqa-qk-norm-untied",
    ),
    pytest.param(
        llama.llama(depth=2, width=32, heads=4, vocab_size=50, tied=True, qk_norm=True),
        id="llama-tied-qk-norm",
    ),
    pytest.param(TINY_GPT.replace(final_norm=None), id="no-final-norm"),
    pytest.param(windowed(TINY_GPT, 4), id="alternating-window"),
    pytest.param(
        mixtral.mixtral(depth=2, width=32, heads=4, mlp_width=9, vocab_size=50, router_bias=True),
        id="experts",
    ),
    pytest.param(TINY_DEEPSEEK, id="latents"),
    pytest.param(deepseek_v3.deepseek_v3(**_TINY, bias=True), id="latents-biased"),
]


@pytest.mark.parametrize(
    ("size", "published"),
    # The FLOP column of GPT-3's table D.1 divided by 6 x 300e9 tokens.
    [
        ("125m", 2.25e20),
        ("350m", 6.41e20),
        ("760m", 1.37e21),
        ("1.3b", 2.38e21),
        ("2.7b", 4.77e21),
        ("6.7b", 1.20e22),
        ("13b", 2.31e22),
        ("175b", 3.14e23),
    ],
)
def test_gpt3_sizes(size: str, published: float):
    assert parameter_count(gpt(size)).total == pytest.approx(published / 6 / 300e9, rel=6e-3)


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [
        (32_000, 6_738_415_616),  # LLaMA-7B
        (64_000, 7_000_559_616),  # Baichuan-7B, the same shape with twice the vocabulary
    ],
)
def test_llama_7b_is_exact(vocab_size: int, expected: int):
    depth, width, heads, mlp_width = llama.SIZES["7b"]
    spec = llama.llama(
        depth=depth, width=width, heads=heads, mlp_width=mlp_width, vocab_size=vocab_size
    )
    assert parameter_count(spec).total == expected


def test_mixtral_8x7b():
    """46.7 billion parameters, of which a token uses 12.9 (Jiang et al. 2024, section 1)."""
    shape = {"depth": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336}
    count = parameter_count(mixtral.mixtral(**shape, vocab_size=32_000))
    assert count.total == 46_702_792_704
    idle = 32 * 6 * 3 * 4096 * 14336
    assert count.total - idle == pytest.approx(12.88e9, rel=1e-3)
    # All of those but the table of embeddings and the norms.
    assert count.matmul == count.total - idle - 32_000 * 4096 - 65 * 4096


@pytest.mark.parametrize("spec", VARIANTS)
def test_count_is_that_of_the_real_parameters(spec: ModelSpec):
    model = LanguageModel(spec)
    kinds = {"embedding": 0, "matrix": 0, "vector": 0}
    for shape, axes in zip(jax.tree.leaves(model.shapes), jax.tree.leaves(model.axes), strict=True):
        kinds[axes.kind] += shape.size
    count = parameter_count(spec)
    assert count.total == sum(kinds.values())
    assert count.vectors == kinds["vector"]
    assert count.matrices + count.embedding + count.head == kinds["embedding"] + kinds["matrix"]


def dot_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
    """2 FLOP for each multiply-add of every matrix product, those inside loops included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            summed = math.prod(left[i] for i in contracted)
            total += 2 * summed * equation.outvars[0].aval.size
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                total += equation.params.get("length", 1) * dot_flops(inner.jaxpr)
    return total


@pytest.mark.parametrize("spec", [TINY_GPT, TINY_LLAMA, TINY_DENSE_DEEPSEEK])
def test_formula_is_what_the_program_multiplies(spec: ModelSpec):
    """The program computes every score and masks half of them; the formula counts the half."""
    length = 16
    model = LanguageModel(spec)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    jaxpr = jax.make_jaxpr(model.logits)(model.shapes, tokens)
    matrices = 2 * parameter_count(spec).matmul
    attention = forward_flops_per_token(spec, length) - matrices
    assert attention > 0
    assert dot_flops(jaxpr.jaxpr) == length * (matrices + 2 * attention)


@pytest.mark.parametrize("window", [None, 1, 7, 64, 1000])
def test_visible_keys_is_the_mean_but_for_half_a_key(window: int | None):
    length = 64
    exact = sum(min(i + 1, window or length) for i in range(length)) / length
    assert 0 <= exact - visible_keys(length, window) <= 0.5


def test_windows_count_only_the_keys_they_show():
    spec = windowed(TINY_GPT, 4)
    saved = forward_flops_per_token(TINY_GPT, 16) - forward_flops_per_token(spec, 16)
    # One of two layers has 4 x (1 - 4/32) = 3.5 keys in place of 8.
    assert saved == 4 * 24 * (8 - 3.5)


def test_gpt3_training_budget():
    """Table D.1 gives 3.14e23 FLOP for 300B tokens: 6 N without attention."""
    spec = gpt("175b")
    total = 300e9 * train_flops_per_token(spec, 2048)
    assert total == pytest.approx(3.14e23 + 300e9 * 6 * 96 * 12288 * 2048, rel=5e-3)


def test_mfu_of_a_published_run():
    """LLaMA-65B: 380 tokens/s on an A100; 6 N alone is 47.6 % of its peak, attention adds 2 %."""
    depth, width, heads, mlp_width = llama.SIZES["65b"]
    spec = llama.llama(depth=depth, width=width, heads=heads, mlp_width=mlp_width)
    assert mfu(6 * parameter_count(spec).total, 380, 312e12) == pytest.approx(0.476, abs=2e-3)
    assert mfu(train_flops_per_token(spec, 2048), 380, 312e12) == pytest.approx(0.486, abs=3e-3)
