"""LLaMA (Touvron et al. 2023, section 2.2): RMSNorm, rotary positions, SwiGLU, no biases."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from instar.errors import UserError
from instar.families.family import Family, GgufFormat, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import Layout, Tensor, linear, norm, table
from instar.models.rotary import LinearScaling, Llama3Scaling, Rotary, Yarn, frequencies_of
from instar.models.spec import Attention, Layer, Mlp, ModelSpec, Norm

# Layers, width, heads, width of the MLP. "2-" is LLaMA 2 (Touvron et al. 2023, 2307.09288; the one
# of 34B was published as Code Llama's, 2308.12950), "3-" Llama 3 (2407.21783, table 3).
SIZES: dict[str, tuple[int, int, int, int]] = {
    "7b": (32, 4096, 32, 11008),
    "13b": (40, 5120, 40, 13824),
    "33b": (60, 6656, 52, 17920),
    "65b": (80, 8192, 64, 22016),
    "2-7b": (32, 4096, 32, 11008),
    "2-13b": (40, 5120, 40, 13824),
    "2-34b": (48, 8192, 64, 22016),
    "2-70b": (80, 8192, 64, 28672),
    "3-8b": (32, 4096, 32, 14336),
    "3-70b": (80, 8192, 64, 28672),
    "3-405b": (126, 16384, 128, 53248),
}
_SECOND = {"norm_epsilon": 1e-5}
_THIRD = _SECOND | {"kv_heads": 8, "rope_theta": 500_000.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "2-7b": _SECOND,
    "2-13b": _SECOND,
    "2-34b": _SECOND | {"kv_heads": 8},
    "2-70b": _SECOND | {"kv_heads": 8},
    "3-8b": _THIRD,
    "3-70b": _THIRD,
    "3-405b": _THIRD,
}


def llama(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 32000,
    max_positions: int = 2048,
    tied: bool = False,
    qk_norm: bool = False,
    rope_theta: float = 10_000.0,
    norm_epsilon: float = 1e-6,
) -> ModelSpec:
    """A LLaMA of any size; the MLP is 8/3 as wide as the model, rounded up to 64, unless stated."""
    rms = Norm("rms", norm_epsilon)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or width // heads,
        rotary=Rotary(theta=rope_theta),
        qk_norm=rms if qk_norm else None,
    )
    mlp = Mlp(mlp_width or -(-8 * width // (3 * 64)) * 64, "silu", gated=True)
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=((depth, (Layer(mixer, mlp, rms),)),),
        final_norm=rms,
        tied=tied,
    )


# --- As transformers stores it ------------------------------------------------------------------

ACTIVATIONS = {"silu": "silu", "swish": "silu"}


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a LlamaForCausalLM."""
    config.expect(pretraining_tp=1, partial_rotary_factor=1.0)
    depth = config.integer("num_hidden_layers", most=MOST_LAYERS)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", None)
    if head_dim is None and width % heads:
        raise config.error("hidden_size", f"({width}) is not a multiple of {heads} heads")
    positions = config.integer("max_position_embeddings", 2048)
    rms = Norm("rms", config.number("rms_norm_eps", 1e-6))
    bias = config.flag("attention_bias", False)
    mixer = Attention(
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim or width // heads,
        bias=bias,
        out_bias=bias,
        rotary=read_rotary(config, positions),
    )
    mlp = Mlp(
        config.integer("intermediate_size"),
        config.choice("hidden_act", ACTIVATIONS, "silu"),
        gated=True,
        bias=config.flag("mlp_bias", False),
    )
    return ModelSpec(
        vocab_size=config.integer("vocab_size"),
        width=width,
        max_positions=positions,
        layers=((depth, (Layer(mixer, mlp, rms),)),),
        final_norm=rms,
        tied=config.flag("tie_word_embeddings", False),
    )


def read_plain_rotary(config: HubConfig, fraction: float = 1.0) -> tuple[float, float]:
    """theta, and which part of a head turns, of rotary positions that nothing stretches."""
    theta = config.number("rope_theta", 10_000.0)
    fraction = config.number("partial_rotary_factor", fraction)
    config.expect(rope_scaling=None)
    if config.has("rope_parameters"):
        section = config.section("rope_parameters")
        section.expect(rope_type="default")
        theta = section.number("rope_theta", theta)
        fraction = section.number("partial_rotary_factor", fraction)
    return theta, fraction


def read_rotary(config: HubConfig, positions: int) -> Rotary:
    """Rotary positions, as transformers 4 (`rope_theta`, `rope_scaling`) or 5 states them."""
    theta = config.number("rope_theta", 10_000.0)
    name = next((n for n in ("rope_parameters", "rope_scaling") if config.has(n)), None)
    if name is None:
        return Rotary(theta)
    section = config.section(name)
    section.expect(partial_rotary_factor=1.0)
    kinds = {"default": None, "linear": _read_linear, "llama3": _read_llama3, "yarn": _read_yarn}
    read = section.choice("rope_type" if section.has("rope_type") else "type", kinds, "default")
    scaling = None if read is None else read(section, positions)
    return Rotary(section.number("rope_theta", theta), scaling=scaling)


def _read_linear(section: HubConfig, positions: int) -> LinearScaling:
    return LinearScaling(section.number("factor"))


def _read_llama3(section: HubConfig, positions: int) -> Llama3Scaling:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        raise section.error("low_freq_factor", f"({low}) must be below high_freq_factor ({high})")
    original = section.integer("original_max_position_embeddings", positions)
    return Llama3Scaling(section.number("factor"), low, high, original)


def _read_yarn(section: HubConfig, positions: int) -> Yarn:
    section.expect(truncate=True)
    fast, slow = section.number("beta_fast", 32.0), section.number("beta_slow", 1.0)
    if slow >= fast:
        raise section.error("beta_slow", f"({slow}) must be below beta_fast ({fast})")
    return Yarn(
        section.number("factor"),
        section.integer("original_max_position_embeddings"),
        fast=fast,
        slow=slow,
        mscale=section.number("mscale", 0.0, zero=True),
        mscale_all_dim=section.number("mscale_all_dim", 0.0, zero=True),
        attention_factor=section.number("attention_factor", None),
    )


def write_llama_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a LlamaForCausalLM's config.json.

    Raises:
      UserError: the width is no multiple of the heads, which that class refuses. (Mistral's does
        not, and is the same model.)
    """
    heads = spec.each_layer()[0].mixer.heads
    if spec.width % heads:
        raise UserError(f"LlamaForCausalLM needs a width ({spec.width}) divisible by {heads} heads")
    return write_config(spec)


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields that the families after LLaMA have in common with it."""
    layer = spec.each_layer()[0]
    mixer, mlp = layer.mixer, layer.mlp
    return {
        "hidden_size": spec.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": mlp.activation,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": layer.norm.epsilon,
        "attention_bias": mixer.bias,
        "mlp_bias": mlp.bias,
        "tie_word_embeddings": spec.tied,
        "vocab_size": spec.vocab_size,
    } | write_rotary(mixer.rotary or Rotary())


def write_rotary(rotary: Rotary) -> dict[str, Any]:
    """The fields by which `read_rotary` finds this again: for transformers 4 and for 5."""
    scaling = rotary.scaling
    parameters: dict[str, Any] = {"rope_type": "default"}
    if isinstance(scaling, LinearScaling):
        parameters = {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        parameters = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.positions,
        }
    if isinstance(scaling, Yarn):
        parameters = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.positions,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
        }
        stated = ("mscale", "mscale_all_dim", "attention_factor")
        parameters |= {name: getattr(scaling, name) for name in stated if getattr(scaling, name)}
    return {
        "rope_theta": rotary.theta,
        "rope_scaling": None if scaling is None else parameters,
        "rope_parameters": {"rope_theta": rotary.theta, **parameters},
    }


def outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Embeddings, final norm and head."""
    embedding = table("model.embed_tokens.weight", "embedding", "vocab embed")
    head = [] if spec.tied else linear("lm_head", "head", "embed", "vocab")
    return [embedding, *norm("model.norm", "final_norm", spec.final_norm), *head]


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer; with norms of queries and keys where it has them (Qwen 3's addition)."""
    stem, mixer, mlp = "model.layers.{layer}.", layer.mixer, layer.mlp
    tensors = [
        *norm(f"{stem}input_layernorm", "mixer_norm", layer.norm),
        *linear(f"{stem}self_attn.q_proj", "mixer.query", "embed", "heads head_dim", mixer.bias),
        *linear(f"{stem}self_attn.k_proj", "mixer.key", "embed", "kv_heads head_dim", mixer.bias),
        *linear(f"{stem}self_attn.v_proj", "mixer.value", "embed", "kv_heads head_dim", mixer.bias),
        *linear(f"{stem}self_attn.o_proj", "mixer.out", "heads head_dim", "embed", mixer.out_bias),
        *norm(f"{stem}post_attention_layernorm", "mlp_norm", layer.norm),
        *mlp_tensors(f"{stem}mlp.", "mlp", mlp.bias),
    ]
    if mixer.qk_norm is not None:
        tensors += norm(f"{stem}self_attn.q_norm", "mixer.query_norm", mixer.qk_norm, "head_dim")
        tensors += norm(f"{stem}self_attn.k_norm", "mixer.key_norm", mixer.qk_norm, "head_dim")
    return tensors


def mlp_tensors(stem: str, path: str, bias: bool = False, width: str = "mlp") -> list[Tensor]:
    """A gated MLP, whose axis between its matrices is called `width`."""
    return [
        *linear(f"{stem}gate_proj", f"{path}.gate", "embed", width, bias),
        *linear(f"{stem}up_proj", f"{path}.up", "embed", width, bias),
        *linear(f"{stem}down_proj", f"{path}.down", width, "embed", bias),
    ]


# A tied model may store its head as well.
LAYOUT = Layout(
    outer_tensors,
    layer_tensors,
    ignored=(r".*rotary_emb\.inv_freq", r"lm_head\.weight"),
    prefix="model.",
)


# --- As llama.cpp stores it ---------------------------------------------------------------------

GGUF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


def gguf_outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Embeddings, final norm and head."""
    embedding = table("token_embd.weight", "embedding", "vocab embed")
    head = [] if spec.tied else linear("output", "head", "embed", "vocab")
    return [embedding, *norm("output_norm", "final_norm", spec.final_norm), *head]


def gguf_layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer. Of queries and keys each element stands beside the one that it is rotated with."""
    stem = "blk.{layer}."

    def paired(name: str, path: str, heads: str) -> Tensor:
        pattern = f"embed {heads} (two half) -> ({heads} half two) embed"
        return Tensor(f"{stem}{name}.weight", {f"{path}.kernel": pattern})

    return [
        *norm(f"{stem}attn_norm", "mixer_norm", layer.norm),
        paired("attn_q", "mixer.query", "heads"),
        paired("attn_k", "mixer.key", "kv_heads"),
        *linear(f"{stem}attn_v", "mixer.value", "embed", "kv_heads head_dim"),
        *linear(f"{stem}attn_output", "mixer.out", "heads head_dim", "embed"),
        *norm(f"{stem}ffn_norm", "mlp_norm", layer.norm),
        *linear(f"{stem}ffn_gate", "mlp.gate", "embed", "mlp"),
        *linear(f"{stem}ffn_up", "mlp.up", "embed", "mlp"),
        *linear(f"{stem}ffn_down", "mlp.down", "mlp", "embed"),
    ]


# Llama 3.1 and 3.2: the scalings of which llama.cpp stores nothing but the divisors they come to.
PUBLISHED_SCALINGS = (Llama3Scaling(8.0, 1.0, 4.0, 8192), Llama3Scaling(32.0, 1.0, 4.0, 8192))


def gguf_adapt(
    metadata: Mapping[str, Any], stored: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """What llama.cpp says of the scaling of rotary positions."""
    config = {"rope_scaling": None}
    kind = metadata.get("llama.rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise UserError(f"{source}: rope.scaling.type {kind!r} is not supported")
    if kind == "linear":
        factor = metadata.get("llama.rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": kind, "factor": factor}
    if "rope_freqs.weight" in stored:
        theta = metadata.get("llama.rope.freq_base", 10_000.0)
        scaling = published_scaling(theta, stored["rope_freqs.weight"].read(), source)
        config = write_rotary(Rotary(theta, scaling=scaling))
    rotated, head_dim = (
        metadata.get(f"llama.{name}") for name in ("rope.dimension_count", "attention.key_length")
    )
    if rotated is not None and head_dim is not None and rotated != head_dim:
        raise UserError(f"{source}: rope.dimension_count {rotated} is not the {head_dim} of a head")
    return config


def published_scaling(theta: float, divisors: np.ndarray, source: str) -> Llama3Scaling:
    """The scaling that divides the frequencies by `divisors` [head_dim/2]."""
    plain = frequencies_of(Rotary(theta), 2 * len(divisors))
    for scaling in PUBLISHED_SCALINGS:
        scaled = frequencies_of(Rotary(theta, scaling=scaling), 2 * len(divisors))
        if np.allclose(plain / scaled, divisors, rtol=1e-4):
            return scaling
    raise UserError(f"{source}: rope_freqs.weight is no scaling that Llama 3 was published with")


FAMILY = Family(
    "llama",
    llama,
    SIZES,
    VARIANTS,
    hub=HubFormat(
        ("llama",),
        "LlamaForCausalLM",
        read_config,
        write_llama_config,
        LAYOUT,
        scorer="LlamaForSequenceClassification",
    ),
    gguf=GgufFormat(
        "llama",
        GGUF_FIELDS,
        Layout(gguf_outer_tensors, gguf_layer_tensors, ignored=(r"rope_freqs\.weight",)),
        gguf_adapt,
    ),
)
