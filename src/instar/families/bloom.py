"""BLOOM (BigScience 2022, 2211.05100, section 3.2): ALiBi, and a norm after the embeddings."""

from typing import Any

from instar.families.family import Family, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import (
    BY_HEAD,
    BY_HEAD_FOLD,
    Layout,
    Tensor,
    fused,
    linear,
    norm,
    table,
)
from instar.models.spec import Attention, Layer, Mlp, ModelSpec, Norm

# Layers, width, heads (table 3).
SIZES: dict[str, tuple[int, int, int]] = {
    "560m": (24, 1024, 16),
    "1.1b": (24, 1536, 16),
    "1.7b": (24, 2048, 16),
    "3b": (30, 2560, 32),
    "7.1b": (30, 4096, 32),
    "176b": (70, 14336, 112),
}


def bloom(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 250_880,
    max_positions: int = 2048,
    tied: bool = True,
    normed_residual: bool = False,
    norm_epsilon: float = 1e-5,
) -> ModelSpec:
    """A BLOOM of any size; with `normed_residual` a branch is added to what it reads."""
    layer_norm = Norm("layer", norm_epsilon, bias=True)
    mixer = Attention(
        heads, heads, head_dim or width // heads, bias=True, out_bias=True, alibi=True
    )
    mlp = Mlp(mlp_width or 4 * width, "gelu_tanh", bias=True)
    layer = Layer(mixer, mlp, layer_norm, "normed" if normed_residual else "pre_norm")
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=((depth, (layer,)),),
        final_norm=layer_norm,
        embedding_norm=layer_norm,
        tied=tied,
    )


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a BloomForCausalLM, whose MLP is always four times as wide as the model."""
    config.expect(slow_but_exact=False)
    width, heads = config.integer("hidden_size"), config.integer("n_head")
    if width % heads:
        raise config.error("hidden_size", f"({width}) is not a multiple of n_head ({heads})")
    return bloom(
        depth=config.integer("n_layer", most=MOST_LAYERS),
        width=width,
        heads=heads,
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("seq_length", 2048),
        tied=config.flag("tie_word_embeddings", True),
        normed_residual=config.flag("apply_residual_connection_post_layernorm", False),
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a BloomForCausalLM's config.json."""
    layer = spec.each_layer()[0]
    return {
        "hidden_size": spec.width,
        "n_layer": spec.depth,
        "n_head": layer.mixer.heads,
        "vocab_size": spec.vocab_size,
        "seq_length": spec.max_positions,
        "layer_norm_epsilon": layer.norm.epsilon,
        "apply_residual_connection_post_layernorm": layer.arrangement == "normed",
        "tie_word_embeddings": spec.tied,
    }


def outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Embeddings with their norm, final norm and head."""
    return [
        table("transformer.word_embeddings.weight", "embedding", "vocab embed"),
        *norm("transformer.word_embeddings_layernorm", "embedding_norm", spec.embedding_norm),
        *norm("transformer.ln_f", "final_norm", spec.final_norm),
        *([] if spec.tied else linear("lm_head", "head", "embed", "vocab")),
    ]


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem = "transformer.h.{layer}."
    return [
        *norm(f"{stem}input_layernorm", "mixer_norm", layer.norm),
        *fused(f"{stem}self_attention.query_key_value", BY_HEAD, True, BY_HEAD_FOLD),
        *linear(f"{stem}self_attention.dense", "mixer.out", "heads head_dim", "embed", bias=True),
        *norm(f"{stem}post_attention_layernorm", "mlp_norm", layer.norm),
        *linear(f"{stem}mlp.dense_h_to_4h", "mlp.up", "embed", "mlp", bias=True),
        *linear(f"{stem}mlp.dense_4h_to_h", "mlp.down", "mlp", "embed", bias=True),
    ]


LAYOUT = Layout(outer_tensors, layer_tensors, ignored=(r"lm_head\.weight",), prefix="transformer.")
FAMILY = Family(
    "bloom",
    bloom,
    SIZES,
    hub=HubFormat(
        ("bloom",),
        "BloomForCausalLM",
        read_config,
        write_config,
        LAYOUT,
        scorer="BloomForSequenceClassification",
    ),
)
