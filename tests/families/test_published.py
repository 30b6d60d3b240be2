"""The named sizes have the published numbers of parameters, counted without making any."""

import math

import jax
import pytest

from instar.families import gpt3, llama
from instar.families.registry import ModelConfig, build_spec
from instar.models.language_model import LanguageModel
from instar.training.flops import parameter_count


def count(config: ModelConfig, vocab_size: int) -> int:
    model = LanguageModel(build_spec(config, vocab_size=vocab_size, max_positions=2048))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))


# Brown et al. 2020, table 2.1; for 1.3b and 13b the paper's FLOP column / (6 x 300e9 tokens).
GPT3 = {
    "125m": (125e6, 0.01),
    "350m": (356e6, 0.01),
    "760m": (760e6, 0.01),
    "1.3b": (1.3157e9, 1e-4),
    "2.7b": (2.65e9, 0.01),
    "6.7b": (6.66e9, 0.01),
    "13b": (12.853e9, 1e-4),
    "175b": (174.6e9, 1e-3),
}
# Touvron et al. 2023, table 2, and for 7b the exact count of its released weights.
LLAMA = {
    "7b": (6_738_415_616, 0),
    "13b": (13.0e9, 0.01),
    "33b": (32.5e9, 0.01),
    "65b": (65.2e9, 0.01),
}


@pytest.mark.parametrize("size", gpt3.SIZES)
def test_gpt3(size):
    published, tolerance = GPT3[size]
    found = count(ModelConfig("gpt3", size=size), 50257)
    assert found == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize("size", llama.SIZES)
def test_llama(size):
    published, tolerance = LLAMA[size]
    found = count(ModelConfig("llama", size=size), 32000)
    assert found == pytest.approx(published, rel=tolerance, abs=0)


def test_gpt3_175b_to_the_last_parameter():
    """12 d^2 + 13 d in a layer (biases and norms are the 13 d), two tables, and the last norm."""
    depth, width = 96, 12288
    layers = depth * (12 * width**2 + 13 * width)
    expected = layers + (50257 + 2048) * width + 2 * width
    assert count(ModelConfig("gpt3", size="175b"), 50257) == expected


# To the last parameter where the weights are public, and else as far as a name says it.
OTHERS = {
    ("bloom", "176b", 250_880): (176_247_271_424, 0),
    ("baichuan", "7b", 64_000): (7_000_559_616, 0),
    ("baichuan", "13b", 64_000): (13_264_901_120, 0),
    ("baichuan", "2-13b", 125_696): (13_896_668_160, 0),
    ("moss", "16b", 107_008): (16_717_980_160, 0),
    ("opt", "125m", 50_272): (125e6, 0.01),
    ("opt", "350m", 50_272): (331e6, 0.01),  # the name is that of GPT-3's, whose tables are wider
    ("opt", "66b", 50_272): (66e9, 0.02),
    ("opt", "175b", 50_272): (175e9, 0.01),
    ("bloom", "560m", 250_880): (559e6, 0.01),
    ("bloom", "7.1b", 250_880): (7.07e9, 0.01),
    ("falcon", "7b", 65_024): (6_921_720_704, 0),
    ("falcon", "rw-1b", 50_304): (1_311_625_216, 0),
    ("falcon", "rw-7b", 65_024): (7.5e9, 0.01),
    ("falcon", "40b", 65_024): (41e9, 0.03),
    ("falcon", "180b", 65_024): (179.5e9, 0.01),
    ("gpt_neox", "20b", 50_432): (20.6e9, 0.01),
    ("gptj", "6b", 50_400): (6.05e9, 0.01),
    ("gpt_neo", "2.7b", 50_257): (2.65e9, 0.01),
    ("chatglm", "3-6b", 65_024): (6.24e9, 0.01),
}


@pytest.mark.parametrize(("family", "size", "vocabulary"), OTHERS)
def test_others(family, size, vocabulary):
    published, tolerance = OTHERS[family, size, vocabulary]
    spec = build_spec(ModelConfig(family, size=size), vocab_size=vocabulary, max_positions=2048)
    shapes = jax.tree.leaves(LanguageModel(spec).shapes)
    found = sum(math.prod(leaf.shape) for leaf in shapes)
    assert found == pytest.approx(published, rel=tolerance, abs=0)
    assert parameter_count(spec).total == found


def test_chatglm_6b_with_the_head_that_its_code_ties():
    spec = build_spec(
        ModelConfig("chatglm1", size="6b", tied=True), vocab_size=130_528, max_positions=2048
    )
    assert parameter_count(spec).total == pytest.approx(6.17e9, rel=2e-3)


def test_baichuan_7b_is_a_llama_with_a_larger_vocabulary():
    """Its exact published count, and so a check of the family's form from another model."""
    config = ModelConfig("llama", size="7b", max_positions=4096)
    assert count(config, 64000) == 7_000_559_616
