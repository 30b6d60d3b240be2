"""Transformers' GPT-2 and Llama with the same weights give the same logits."""

import jax
import numpy as np
import pytest

from instar.families import gpt3, llama
from instar.models.language_model import LanguageModel
from instar.models.spec import ModelSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

VOCAB, LENGTHS = 61, [17, 5, 1, 11]


def randomised(model):
    """Every parameter random: a bias of 0 or a scale of 1 would hide where it goes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.copy_(1 + 0.4 * noise if is_scale else 0.35 * noise)
    return model.eval()


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def stacked(layers: list[dict]) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def norm(weights: dict, name: str) -> dict:
    found = {"scale": weights[f"{name}.weight"]}
    if f"{name}.bias" in weights:
        found["bias"] = weights[f"{name}.bias"]
    return found


def gpt2_params(weights: dict, spec: ModelSpec) -> dict:
    """GPT-2 stores [in, out], and queries, keys and values side by side."""
    heads, head_dim = spec.each_layer()[0].mixer.heads, spec.each_layer()[0].mixer.head_dim

    def affine(name: str) -> dict:
        return {"kernel": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def layer(i: int) -> dict:
        h = f"transformer.h.{i}"
        joined = affine(f"{h}.attn.c_attn")
        mixer = {
            name: {
                "kernel": kernel.reshape(spec.width, heads, head_dim),
                "bias": bias.reshape(heads, head_dim),
            }
            for name, kernel, bias in zip(
                ("query", "key", "value"),
                np.split(joined["kernel"], 3, axis=1),
                np.split(joined["bias"], 3),
                strict=True,
            )
        }
        out = affine(f"{h}.attn.c_proj")
        mixer["out"] = out | {"kernel": out["kernel"].reshape(heads, head_dim, spec.width)}
        return {
            "mixer_norm": norm(weights, f"{h}.ln_1"),
            "mixer": mixer,
            "mlp_norm": norm(weights, f"{h}.ln_2"),
            "mlp": {"up": affine(f"{h}.mlp.c_fc"), "down": affine(f"{h}.mlp.c_proj")},
        }

    return {
        "embedding": weights["transformer.wte.weight"],
        "position_embedding": weights["transformer.wpe.weight"],
        "group_0": {"layer_0": stacked([layer(i) for i in range(spec.depth)])},
        "final_norm": norm(weights, "transformer.ln_f"),
    }


def llama_params(weights: dict, spec: ModelSpec) -> dict:
    """Llama stores [out, in]; rotary elements lie in halves, as the spec's style says."""
    head_dim = spec.each_layer()[0].mixer.head_dim

    def kernel(name: str) -> np.ndarray:
        return weights[f"{name}.weight"].T

    def layer(i: int) -> dict:
        h = f"model.layers.{i}"
        into = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
        mixer = {
            ours: {"kernel": kernel(f"{h}.self_attn.{theirs}").reshape(spec.width, -1, head_dim)}
            for ours, theirs in into.items()
        }
        out = kernel(f"{h}.self_attn.o_proj").reshape(-1, head_dim, spec.width)
        mixer["out"] = {"kernel": out}
        return {
            "mixer_norm": norm(weights, f"{h}.input_layernorm"),
            "mixer": mixer,
            "mlp_norm": norm(weights, f"{h}.post_attention_layernorm"),
            "mlp": {
                name: {"kernel": kernel(f"{h}.mlp.{name}_proj")} for name in ("gate", "up", "down")
            },
        }

    return {
        "embedding": weights["model.embed_tokens.weight"],
        "group_0": {"layer_0": stacked([layer(i) for i in range(spec.depth)])},
        "final_norm": norm(weights, "model.norm"),
        "head": {"kernel": kernel("lm_head")},
    }


def compare(theirs, spec: ModelSpec, params: dict) -> None:
    """Rows of unequal lengths, padded on the right."""
    model = LanguageModel(spec)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, model.shapes)
    rng = np.random.default_rng(1)
    real = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    tokens = np.where(real, rng.integers(0, VOCAB, real.shape), 0)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(real.astype(int))
        ).logits.numpy()
    found = jax.jit(model.logits)(params, tokens, segment_ids=real.astype(np.int32))
    assert expected[real].std() > 0.5
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=0, atol=1e-4)


def test_gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=19,
        n_embd=21,
        n_layer=3,
        n_head=3,
        n_inner=35,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        attn_implementation="eager",
    )
    theirs = randomised(transformers.GPT2LMHeadModel(config))
    spec = gpt3.gpt3(depth=3, width=21, heads=3, mlp_width=35, vocab_size=VOCAB, max_positions=19)
    compare(theirs, spec, gpt2_params(weights_of(theirs), spec))


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_llama(theta):
    """Grouped queries, and heads that do not multiply to the width."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=theta,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = randomised(transformers.LlamaForCausalLM(config))
    spec = llama.llama(
        depth=3,
        width=24,
        heads=6,
        kv_heads=2,
        head_dim=10,
        mlp_width=37,
        vocab_size=VOCAB,
        rope_theta=theta,
    )
    compare(theirs, spec, llama_params(weights_of(theirs), spec))
