"""The named sizes have the published numbers of parameters, counted without making any."""

import math

import jax
import pytest

from instar.families import gpt3, llama
from instar.families.registry import ModelConfig, build_spec
from instar.models.language_model import LanguageModel


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


def test_baichuan_7b_is_a_llama_with_a_larger_vocabulary():
    """Its exact published count, and so a check of the family's form from another model."""
    config = ModelConfig("llama", size="7b", max_positions=4096)
    assert count(config, 64000) == 7_000_559_616
