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

VOCAB, NEW = 61, 12
SHAPE = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
SHAPE |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = {
    "Llama": {"num_key_value_heads": 2},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
    },
}


@functools.cache
def pair(family: str):
    """Transformers' model and ours, with the same weights."""
    config = getattr(transformers, f"{family}Config")(**SHAPE, **FAMILIES[family])
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, instar.load(folder)


@pytest.mark.parametrize(
    ("family", "penalty"), [("Llama", 1.0), ("Llama", 1.4), ("DeepseekV3", 1.0)]
)
def test_greedy_tokens(family, penalty):
    """Each prompt of theirs alone, without padding; ours together, with it."""
    theirs, model = pair(family)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in (7, 1, 19, 4)]
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
