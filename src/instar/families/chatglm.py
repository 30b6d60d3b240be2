"""ChatGLM 2 and 3 (THUDM 2023), as their own code stores them; see `instar.families.glm`."""

from typing import Any

from instar.errors import UserError
from instar.families import glm
from instar.families.family import Family, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import CHAINED, GATE_UP, Layout, Tensor, fused, linear, norm, table
from instar.models.spec import Layer, ModelSpec

# Layers, width, heads, width of the MLP: 2-6b and 3-6b are of the same size.
SIZES = {"2-6b": (28, 4096, 32, 13696), "3-6b": (28, 4096, 32, 13696)}
VARIANTS = {"2-6b": {"kv_heads": 2}, "3-6b": {"kv_heads": 2}}


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a ChatGLMModel of the second or third generation."""
    config.expect(
        rmsnorm=True,
        apply_residual_connection_post_layernorm=False,
        post_layer_norm=True,
        add_bias_linear=False,
        original_rope=True,
        rope_ratio=1,
        quantization_bit=0,
        pre_seq_len=None,
    )
    config.flag("tie_word_embeddings", False)  # whatever it says, the head is its own
    heads = config.integer("num_attention_heads")
    multi_query = config.flag("multi_query_attention", False)
    return glm.glm(
        bias=config.flag("add_qkv_bias", False),
        depth=config.integer("num_layers", most=MOST_LAYERS),
        width=config.integer("hidden_size"),
        heads=heads,
        kv_heads=config.integer("multi_query_group_num", 1) if multi_query else heads,
        head_dim=config.integer("kv_channels", 128),
        mlp_width=config.integer("ffn_hidden_size"),
        vocab_size=config.integer("padded_vocab_size"),
        max_positions=config.integer("seq_length"),
        norm_epsilon=config.number("layernorm_epsilon", 1e-5),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of such a model's config.json.

    Raises:
      UserError: the head is the table of tokens, which that class cannot say.
    """
    if spec.tied:
        raise UserError("ChatGLMModel has a head of its own")
    layer = spec.each_layer()[0]
    mixer = layer.mixer
    return {
        "num_layers": spec.depth,
        "hidden_size": spec.width,
        "num_attention_heads": mixer.heads,
        "multi_query_attention": True,
        "multi_query_group_num": mixer.kv_heads,
        "kv_channels": mixer.head_dim,
        "ffn_hidden_size": layer.mlp.width,
        "padded_vocab_size": spec.vocab_size,
        "seq_length": spec.max_positions,
        "layernorm_epsilon": layer.norm.epsilon,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_bias_linear": False,
        "add_qkv_bias": mixer.bias,
        "original_rope": True,
        "tie_word_embeddings": False,
    }


def outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Embeddings, final norm and head."""
    return [
        table("transformer.embedding.word_embeddings.weight", "embedding", "vocab embed"),
        *norm("transformer.encoder.final_layernorm", "final_norm", spec.final_norm),
        *([] if spec.tied else linear("transformer.output_layer", "head", "embed", "vocab")),
    ]


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem, bias = "transformer.encoder.layers.{layer}.", layer.mixer.bias
    return [
        *norm(f"{stem}input_layernorm", "mixer_norm", layer.norm),
        *fused(f"{stem}self_attention.query_key_value", CHAINED, bias),
        *linear(f"{stem}self_attention.dense", "mixer.out", "heads head_dim", "embed"),
        *norm(f"{stem}post_attention_layernorm", "mlp_norm", layer.norm),
        *fused(f"{stem}mlp.dense_h_to_4h", GATE_UP, False),
        *linear(f"{stem}mlp.dense_4h_to_h", "mlp.down", "mlp", "embed"),
    ]


LAYOUT = Layout(
    outer_tensors,
    layer_tensors,
    ignored=(r"transformer\.rotary_pos_emb\.inv_freq",),
    prefix="transformer.",
)
FAMILY = Family(
    "chatglm",
    glm.glm,
    SIZES,
    VARIANTS,
    hub=HubFormat(("chatglm",), "ChatGLMModel", read_config, write_config, LAYOUT, own_code=True),
)
