"""Transformers and Instar read each other's folders, and compute the same logits from them."""

import dataclasses

import jax
import numpy as np
import pytest
import readme_family
from examples import packed_batch, with_mixer
from interchange_examples import SPECS, TEXTS, make_model

import instar
from instar.generation.sampling import SamplingConfig
from instar.interchange.card import ModelCard
from instar.interchange.convert import (
    ExportOptions,
    ImportOptions,
    export_model,
    import_model,
    write_hub_folder,
)
from instar.interchange.parameters import flatten
from instar.models.language_model import LanguageModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

VOCAB = 61
# Of the texts in each row of a packed batch.
LENGTHS = [[17, 5, 1], [28], [3, 11, 9]]

GPT2 = {"vocab_size": VOCAB, "n_positions": 29, "n_embd": 24, "n_layer": 3, "n_head": 4}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 42,
    "intermediate_size": 55,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
# Torch's products of experts want rows of whole 16 bytes.
_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 3}
MIXTRAL = LLAMA | _EXPERTS | {"hidden_size": 44, "intermediate_size": 56}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
_HEADS = {"num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": VOCAB}
OPT = _HEADS | {"hidden_size": 42, "ffn_dim": 55, "max_position_embeddings": 29}
OPT |= {"word_embed_proj_dim": 42, "pad_token_id": 1}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 60, "n_layer": 3, "n_head": 6}
FALCON = _HEADS | {"hidden_size": 48, "ffn_hidden_size": 55, "alibi": False}
FALCON_RW = FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
GROUPED = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3}
NEOX = _HEADS | {"hidden_size": 60, "intermediate_size": 55, "rotary_pct": 0.4}
GPTJ = {"vocab_size": VOCAB, "n_positions": 29, "n_embd": 48, "n_layer": 3, "n_head": 4}
GEMMA = LLAMA | {"num_hidden_layers": 8, "query_pre_attn_scalar": 7, "sliding_window": 5}
QWEN = {name: value for name, value in LLAMA.items() if name != "head_dim"} | {"hidden_size": 60}
GLM = LLAMA | {"head_dim": 12, "pad_token_id": None, "attention_bias": True}
QWEN_MOE = LLAMA | {"hidden_size": 44, "moe_intermediate_size": 24, "num_experts": 5}
QWEN_MOE |= {"num_experts_per_tok": 3, "decoder_sparse_step": 1, "mlp_only_layers": []}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "beta_fast": 3.0}
YARN |= {"beta_slow": 0.5, "original_max_position_embeddings": 16}
DEEPSEEK = {
    "vocab_size": VOCAB,
    "hidden_size": 44,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 14,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 8,
    "v_head_dim": 9,
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 64,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "rms_norm_eps": 1e-4,
}
CASES = {
    "deepseek-v3": ("DeepseekV3", DEEPSEEK),
    "deepseek-v3, all that may be otherwise": (
        "DeepseekV3",
        DEEPSEEK
        | {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False, "n_group": 1}
        | {"topk_group": 1, "norm_topk_prob": False, "rope_parameters": {"rope_type": "default"}}
        | {"first_k_dense_replace": 0, "num_hidden_layers": 2, "tie_word_embeddings": True},
    ),
    "opt": ("OPT", OPT),
    "opt-350m": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt without a last norm": ("OPT", OPT | {"_remove_final_layer_norm": True}),
    "bloom": ("Bloom", BLOOM),
    "bloom of ten heads": ("Bloom", BLOOM | {"n_head": 10, "layer_norm_epsilon": 1e-3}),
    "bloom, branches on what they read": (
        "Bloom",
        BLOOM | {"apply_residual_connection_post_layernorm": True},
    ),
    "falcon-7b": ("Falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("Falcon", GROUPED),
    "falcon-40b, with biases": ("Falcon", GROUPED | {"bias": True, "rope_theta": 300.0}),
    "falcon 2": ("Falcon", GROUPED | {"num_ln_in_parallel_attn": 1}),
    "gpt-neox": ("GPTNeoX", NEOX),
    "gpt-neox, one branch after the other": (
        "GPTNeoX",
        NEOX | {"use_parallel_residual": False, "attention_bias": False},
    ),
    "gpt-j": ("GPTJ", GPTJ | {"rotary_dim": 8}),
    "codegen": ("CodeGen", GPTJ | {"n_embd": 96, "n_head": 8, "rotary_dim": 6}),
    "gpt-neo": (
        "GPTNeo",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_layers": 3,
            "num_heads": 6,
            "max_position_embeddings": 29,
            "attention_types": [[["global", "local"], 1], [["local"], 1]],
            "window_size": 5,
        },
    ),
    "qwen2": ("Qwen2", QWEN | {"tie_word_embeddings": True}),
    "qwen2, stretched": ("Qwen2", QWEN | {"rope_parameters": YARN}),
    "qwen3 with experts": ("Qwen3Moe", QWEN_MOE),
    "qwen3 with experts, normalised": ("Qwen3Moe", QWEN_MOE | {"norm_topk_prob": True}),
    "gemma2": ("Gemma2", GEMMA | {"num_hidden_layers": 3}),
    "gemma2 without caps": (
        "Gemma2",
        GEMMA
        | {"num_hidden_layers": 2}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3Text", GEMMA),
    "olmo2": ("Olmo2", QWEN | {"rms_norm_eps": 1e-4}),
    "olmo2, a key for each query": ("Olmo2", QWEN | {"num_key_value_heads": 6}),
    "glm": ("Glm", GLM),
    "glm4": ("Glm4", GLM | {"partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2", GPT2),
    "gpt2, another inner width and activation": (
        "GPT2",
        GPT2 | {"n_inner": 31, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ),
    "gpt2, untied": ("GPT2", GPT2 | {"tie_word_embeddings": False}),
    "llama": ("Llama", LLAMA | {"rope_theta": 500.0}),
    "llama, tied, with biases": (
        "Llama",
        LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, linear scaling": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 200.0, "factor": 3.0}},
    ),
    "llama 3.1": ("Llama", LLAMA | {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-4}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 5}),
    "mistral without a window": ("Mistral", LLAMA | {"sliding_window": None}),
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral with a window": ("Mixtral", MIXTRAL | {"num_experts_per_tok": 1, "sliding_window": 5}),
    "qwen3": ("Qwen3", LLAMA | {"attention_bias": True}),
}
HEADS = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def randomised(model):
    """Every parameter random: a bias of 0 or a scale of 1 would hide where it goes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = ("norm" in name or "ln_" in name) and name.endswith("weight")
            parameter.copy_(1 + 0.4 * noise if is_scale else 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def build(family: str, options: dict, attention: str = "eager"):
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, HEADS.get(family, f"{family}ForCausalLM"))
    return randomised(model._from_config(config, attn_implementation=attention))


def tokens_of(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCAB, (2, length))


def theirs(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.asarray(tokens)).logits.numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def assert_same_logits(ours, model, tolerance: float = 1e-4) -> None:
    """Of two texts as a user asks for them, and of texts of unequal lengths in packed rows."""
    tokens = tokens_of(17)
    assert np.abs(np.asarray(ours(tokens)) - theirs(model, tokens)).max() < tolerance
    batch = packed_batch(0, LENGTHS, 29, VOCAB)
    inputs = {name: batch[name] for name in ("positions", "segment_ids")}
    packed = jax.jit(LanguageModel(ours.spec).logits)(ours.params, batch["tokens"], **inputs)
    for row, lengths in enumerate(LENGTHS):
        for segment in range(1, len(lengths) + 1):
            there = batch["segment_ids"][row] == segment
            found = np.asarray(packed)[row, there]
            expected = theirs(model, batch["tokens"][row, there][None])[0]
            assert np.abs(found - expected).max() < tolerance, (row, segment)
            p, q = log_softmax(expected), log_softmax(found)
            assert (np.exp(p) * (p - q)).sum(-1).max() < 1e-6, (row, segment)


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES.keys())
def test_a_folder_of_transformers_gives_the_same_logits_and_comes_back(family, options, tmp_path):
    model = build(family, options)
    model.save_pretrained(tmp_path / "theirs")
    assert_same_logits(instar.load(tmp_path / "theirs"), model)

    # In, out, and in again: every parameter is the one that it was.
    import_model(ImportOptions(from_=str(tmp_path / "theirs"), to=str(tmp_path / "ours")))
    export_model(ExportOptions(checkpoint=str(tmp_path / "ours"), to=str(tmp_path / "back")))
    automatic = transformers.AutoModelForCausalLM
    again = automatic.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    # CodeGen is GPT-J laid out otherwise, and is written as that.
    for name, tensor in model.state_dict().items() if family != "CodeGen" else ():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert theirs(again, tokens_of(17)).tobytes() == theirs(model, tokens_of(17)).tobytes()


@pytest.mark.parametrize(("heads", "width"), [(6, 48), (10, 60)])
def test_falcon_rw(heads, width, tmp_path):
    """Where its biases are rounded: from 256 tokens on, or at once where slopes are.

    The reference is its code for scaled_dot_product_attention; the eager one adds the biases twice.
    """
    options = {"num_attention_heads": heads, "hidden_size": width, "max_position_embeddings": 400}
    model = build("Falcon", FALCON_RW | options, "sdpa")
    model.save_pretrained(tmp_path / "theirs")
    ours, tokens = instar.load(tmp_path / "theirs"), tokens_of(340)
    assert_same_logits(ours, model)
    expected = theirs(model, tokens)
    assert np.abs(np.asarray(ours(tokens)) - expected).max() < 2e-4
    by_distance = with_mixer(ours.spec, alibi_rounded=False)
    other = dataclasses.replace(ours, language_model=LanguageModel(by_distance))
    assert np.abs(np.asarray(other(tokens)) - expected).max() > 1e-3

    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)
    (completion,) = ours.generate([tokens[0].tolist()], sampling=sampling)
    whole = np.asarray([[*tokens[0], *completion.tokens]])
    assert completion.tokens == theirs(model, whole)[0, 339:-1].argmax(-1).tolist()

    import_model(ImportOptions(from_=str(tmp_path / "theirs"), to=str(tmp_path / "ours")))
    export_model(ExportOptions(checkpoint=str(tmp_path / "ours"), to=str(tmp_path / "back")))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert theirs(again, tokens).tobytes() == expected.tobytes()


def test_the_family_that_the_readme_adds(monkeypatch, tmp_path):
    (tmp_path / "families").mkdir()
    readme_family.added(monkeypatch, tmp_path / "families")
    options = QWEN | {"hidden_size": 96, "layer_norm_eps": 1e-4, "partial_rotary_factor": 0.25}
    model = build("StableLm", options)
    model.save_pretrained(tmp_path / "theirs")
    assert_same_logits(instar.load(tmp_path / "theirs"), model)


def test_a_model_without_a_tokenizer_ends_at_no_token_that_transformers_assumes(tmp_path):
    model = make_model("llama")
    read = flatten(model.params).__getitem__
    card = ModelCard(model.spec)
    write_hub_folder(card, lambda path: np.asarray(read(path)), tmp_path, np.dtype("f4"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.eos_token_id is None
    assert again.config.eos_token_id is None and again.config.bos_token_id is None


def test_sharded_and_half_precision_folders(tmp_path):
    model = build("Llama", LLAMA).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(instar.load(tmp_path), again.eval())


@pytest.mark.parametrize("name", SPECS)
def test_a_model_of_ours_in_transformers(name, tmp_path):
    """With its tokenizer: the same ids, the same special tokens, the same logits."""
    model = make_model(name)
    read = flatten(model.params).__getitem__
    write_hub_folder(model.card, lambda path: np.asarray(read(path)), tmp_path, np.dtype("f4"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = model.tokenizer.encode(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        whole = np.asarray([[model.tokenizer.bos_id, *ids]])[:, :29]
        np.testing.assert_allclose(model(whole), theirs(again, whole), atol=1e-4)
    assert tokenizer.eos_token_id == model.tokenizer.eos_id
    assert again.generation_config.eos_token_id == [model.tokenizer.eos_id]
    messages = [{"role": "user", "content": "hello"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = getattr(rendered, "input_ids", rendered)
    assert ids == model.encode_chat(messages, model.chat_template())[-len(ids) :]


# --- A real model -------------------------------------------------------------------------------

PROMPTS = [
    "The capital of France is Paris. The capital of Germany is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 =",
]


def test_smollm2_is_what_transformers_reads_from_the_same_file(smollm2):
    model = instar.load(smollm2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        assert ids == tokenizer(prompt)["input_ids"]
        difference = np.abs(np.asarray(model([ids])) - theirs(reference, np.asarray([ids]))).max()
        assert difference < 2e-3
    sampling = SamplingConfig(max_new_tokens=64, temperature=0.0)
    completions = model.generate(PROMPTS, sampling=sampling)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.asarray([model.tokenizer.encode(prompt)])
        greedy = reference.generate(ids, max_new_tokens=64, do_sample=False)
        assert completion.tokens == greedy[0, ids.shape[1] :].tolist()
    assert jax.tree.leaves(model.params)[0].dtype == np.float32
