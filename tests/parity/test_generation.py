"""Transformers' greedy tokens, and its filters, are ours."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import instar
from instar.generation import filters
from instar.generation.sampling import SamplingConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SHAPE = {"depth": 2, "width": 24, "heads": 4, "kv_heads": 2, "mlp_width": 40, "vocab_size": 61}
NEW = 12


@functools.cache
def pair():
    """Transformers' model and ours, with the same weights."""
    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["width"],
        intermediate_size=SHAPE["mlp_width"],
        num_hidden_layers=SHAPE["depth"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, instar.load(folder)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_tokens(penalty):
    """Each prompt of theirs alone, without padding; ours together, with it."""
    theirs, model = pair()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, SHAPE["vocab_size"], n).tolist() for n in (7, 1, 19, 4)]
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        options = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW}
        found = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            repetition_penalty=penalty,
            **options,
        )
        expected.append(found[0, len(prompt) :].tolist())
    greedy = SamplingConfig(NEW, temperature=0.0, repetition_penalty=penalty)
    done = model.generate(prompts, sampling=greedy)
    assert [completion.tokens for completion in done] == expected


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (filters.top_k, transformers.TopKLogitsWarper, (1, 5, 300, 1000)),
        (filters.top_p, transformers.TopPLogitsWarper, (0.05, 0.5, 0.9)),
        (filters.min_p, transformers.MinPLogitsWarper, (0.02, 0.3)),
    ],
)
def test_filters_keep_the_same_tokens(ours, theirs, values):
    scores = np.random.default_rng(2).standard_normal((5, 1000)).astype(np.float32) * 2
    for value in values:
        expected = theirs(value)(None, torch.tensor(scores)).isfinite().numpy()
        found = jax.jit(ours)(scores, jnp.full(5, value))
        np.testing.assert_array_equal(found, expected)
