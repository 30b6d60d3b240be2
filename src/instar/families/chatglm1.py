"""ChatGLM-6B (THUDM 2023), after GLM (Du et al. 2022, 2103.10360): all of a text sees its prefix.

A token has two positions, by which the halves of its heads turn. What a branch adds to is what it
read, scaled as in DeepNorm.
"""

from typing import Any

from instar.errors import UserError
from instar.families.family import Family, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import BY_HEAD, BY_HEAD_FOLD, Layout, Tensor, fused, linear, norm, table
from instar.models.spec import Attention, Layer, Mlp, ModelSpec, Norm, Prefix, Rotary

# Layers, width, heads.
SIZES: dict[str, tuple[int, int, int]] = {"6b": (28, 4096, 32)}


def chatglm1(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 130_528,
    max_positions: int = 2048,
    tied: bool = False,
    start_id: int = 130_004,
    mask_ids: tuple[int, ...] = (130_001, 130_000),
    residual_scale: float = 56**0.5,
    norm_epsilon: float = 1e-5,
) -> ModelSpec:
    """A ChatGLM of the first generation, of any size.

    `start_id` is <sop>; `mask_ids` are [gMASK] and [MASK], the first of which that a text has
    counts. `residual_scale` is that of its 28 layers, sqrt(2 * 28), whatever the depth, as its own
    code has it.
    """
    layer_norm = Norm("layer", norm_epsilon, bias=True)
    rotary = Rotary(planes=2, rounded=True)
    mixer = Attention(heads, heads, head_dim or width // heads, True, True, rotary)
    mlp = Mlp(mlp_width or 4 * width, "gelu_tanh", bias=True)
    layer = Layer(mixer, mlp, layer_norm, "normed", residual_scale)
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=((depth, (layer,)),),
        final_norm=layer_norm,
        prefix=Prefix(start_id, tuple(mask_ids)),
        tied=tied,
    )


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a ChatGLMModel of the first generation."""
    config.expect(position_encoding_2d=True, quantization_bit=0, pre_seq_len=None)
    config.flag("tie_word_embeddings", False)  # whatever it says, the head is its own
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if width % heads:
        raise config.error("hidden_size", f"({width}) is not a multiple of {heads} heads")
    return chatglm1(
        depth=config.integer("num_layers", most=MOST_LAYERS),
        width=width,
        heads=heads,
        mlp_width=config.integer("inner_hidden_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_sequence_length"),
        start_id=config.integer("bos_token_id"),
        mask_ids=(config.integer("gmask_token_id"), config.integer("mask_token_id")),
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
    gmask, mask = spec.prefix.mask_ids
    return {
        "num_layers": spec.depth,
        "hidden_size": spec.width,
        "num_attention_heads": layer.mixer.heads,
        "inner_hidden_size": layer.mlp.width,
        "vocab_size": spec.vocab_size,
        "max_sequence_length": spec.max_positions,
        "layernorm_epsilon": layer.norm.epsilon,
        "position_encoding_2d": True,
        "bos_token_id": spec.prefix.start_id,
        "gmask_token_id": gmask,
        "mask_token_id": mask,
        "tie_word_embeddings": False,
    }


def outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Embeddings, final norm and head."""
    return [
        table("transformer.word_embeddings.weight", "embedding", "vocab embed"),
        *norm("transformer.final_layernorm", "final_norm", spec.final_norm),
        *([] if spec.tied else linear("lm_head", "head", "embed", "vocab")),
    ]


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem = "transformer.layers.{layer}."
    return [
        *norm(f"{stem}input_layernorm", "mixer_norm", layer.norm),
        *fused(f"{stem}attention.query_key_value", BY_HEAD, True, BY_HEAD_FOLD),
        *linear(f"{stem}attention.dense", "mixer.out", "heads head_dim", "embed", bias=True),
        *norm(f"{stem}post_attention_layernorm", "mlp_norm", layer.norm),
        *linear(f"{stem}mlp.dense_h_to_4h", "mlp.up", "embed", "mlp", bias=True),
        *linear(f"{stem}mlp.dense_4h_to_h", "mlp.down", "mlp", "embed", bias=True),
    ]


LAYOUT = Layout(
    outer_tensors,
    layer_tensors,
    ignored=(r".*rotary_emb\.inv_freq",),
    prefix="transformer.",
)
FAMILY = Family(
    "chatglm1",
    chatglm1,
    SIZES,
    hub=HubFormat(
        ("chatglm",),
        "ChatGLMModel",
        read_config,
        write_config,
        LAYOUT,
        marked_by="position_encoding_2d",
        own_code=True,
    ),
)
