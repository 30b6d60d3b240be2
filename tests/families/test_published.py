"""The named sizes have the published numbers of parameters, counted without making any."""

import math

import jax
import pytest
from published import CHATGLM_6B_TIED, PUBLISHED

from instar.families.registry import FAMILIES, ModelConfig, build_spec
from instar.models.language_model import LanguageModel
from instar.training.flops import parameter_count


def count(config: ModelConfig, vocab_size: int) -> int:
    spec = build_spec(config, vocab_size=vocab_size, max_positions=2048)
    shapes = jax.tree.leaves(LanguageModel(spec).shapes)
    found = sum(math.prod(leaf.shape) for leaf in shapes)
    assert parameter_count(spec).total == found
    return found


@pytest.mark.parametrize(("family", "size", "vocabulary"), PUBLISHED)
def test_a_named_size_has_the_published_number_of_parameters(family, size, vocabulary):
    expected, tolerance = PUBLISHED[family, size, vocabulary]
    found = count(ModelConfig(family, size=size), vocabulary)
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


def test_every_size_of_these_is_published():
    """The others have sizes that no vocabulary or weights were published for."""
    named = {(family, size) for family, size, _ in PUBLISHED}
    for family in ("gpt3", "opt", "bloom", "llama", "baichuan", "moss"):
        assert {(family, size) for size in FAMILIES[family].sizes} <= named


def test_gpt3_175b_to_the_last_parameter():
    """12 d^2 + 13 d in a layer (biases and norms are the 13 d), two tables, and the last norm."""
    depth, width = 96, 12288
    layers = depth * (12 * width**2 + 13 * width)
    expected = layers + (50257 + 2048) * width + 2 * width
    assert count(ModelConfig("gpt3", size="175b"), 50257) == expected


def test_deepseek_v3_671b_by_hand_and_what_a_token_uses_of_it():
    """671B, of which a token uses 37B (DeepSeek-AI 2024, 2412.19437, section 4.2)."""
    width, heads, vocabulary = 7168, 128, 129_280
    latents = width * 1536 + 1536 + width * (512 + 64) + 512
    attention = latents + heads * (1536 * (128 + 64) + 512 * (128 + 128) + 128 * width)
    expert, router = 3 * width * 2048, 256 * width + 256
    layers = 61 * (attention + 2 * width) + 3 * 3 * width * 18432 + 58 * (257 * expert + router)
    config = ModelConfig("deepseek_v3", size="671b")
    assert count(config, vocabulary) == layers + 2 * vocabulary * width + width
    found = parameter_count(build_spec(config, vocab_size=vocabulary, max_positions=2048))
    idle = 58 * 248 * expert + found.embedding + found.vectors
    assert found.matmul == found.total - idle == pytest.approx(37e9, rel=0.02)


def test_chatglm_6b_with_the_head_that_its_code_ties():
    expected, tolerance = CHATGLM_6B_TIED
    found = count(ModelConfig("chatglm1", size="6b", tied=True), 130_528)
    assert found == pytest.approx(expected, rel=tolerance)


def test_baichuan_7b_is_a_llama_with_a_larger_vocabulary():
    """Its exact published count, and so a check of the family's form from another model."""
    config = ModelConfig("llama", size="7b", max_positions=4096)
    assert count(config, 64000) == 7_000_559_616
