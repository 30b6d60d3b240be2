"""OPT (Zhang et al. 2022, 2205.01068): GPT-3 with ReLU, and positions from the third row on.

The model of 350M parameters norms after each branch, and its tables are half as wide as it is.
"""

from typing import Any

from instar.families.family import Family, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import Layout, Tensor, linear, norm, table
from instar.models.spec import Activation, Attention, Layer, Mlp, ModelSpec, Norm

# Layers, width, heads (table 1).
SIZES: dict[str, tuple[int, int, int]] = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "1.3b": (24, 2048, 32),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "66b": (64, 9216, 72),
    "175b": (96, 12288, 96),
}
VARIANTS = {"350m": {"post_norm": True, "embedding_width": 512}}
OFFSET = 2  # the rows of the table of positions that no position has


def opt(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 50272,
    max_positions: int = 2048,
    tied: bool = True,
    activation: Activation = "relu",
    post_norm: bool = False,
    final_norm: bool | None = None,
    embedding_width: int | None = None,
) -> ModelSpec:
    """An OPT of any size; the last norm is there where the others come before the branches."""
    layer_norm = Norm("layer", 1e-5, bias=True)
    mixer = Attention(heads, heads, head_dim or width // heads, bias=True, out_bias=True)
    mlp = Mlp(mlp_width or 4 * width, activation, bias=True)
    layer = Layer(mixer, mlp, layer_norm, "post_norm" if post_norm else "pre_norm")
    has_final_norm = not post_norm if final_norm is None else final_norm
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=((depth, (layer,)),),
        final_norm=layer_norm if has_final_norm else None,
        learned_positions=True,
        position_offset=OFFSET,
        embedding_width=embedding_width,
        tied=tied,
    )


ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of an OPTForCausalLM."""
    config.expect(enable_bias=True, layer_norm_elementwise_affine=True)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if width % heads:
        raise config.error("hidden_size", f"({width}) is not a multiple of {heads} heads")
    before = config.flag("do_layer_norm_before", True)
    narrow = config.integer("word_embed_proj_dim", width)
    return opt(
        depth=config.integer("num_hidden_layers", most=MOST_LAYERS),
        width=width,
        heads=heads,
        mlp_width=config.integer("ffn_dim"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings"),
        tied=config.flag("tie_word_embeddings", True),
        activation=config.choice("activation_function", ACTIVATIONS, "relu"),
        post_norm=not before,
        final_norm=before and not config.flag("_remove_final_layer_norm", False),
        embedding_width=None if narrow == width else narrow,
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of an OPTForCausalLM's config.json."""
    layer = spec.each_layer()[0]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    before = layer.arrangement == "pre_norm"
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": layer.mixer.heads,
        "ffn_dim": layer.mlp.width,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "word_embed_proj_dim": spec.table_width,
        "activation_function": names[layer.mlp.activation],
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and spec.final_norm is None,
        "tie_word_embeddings": spec.tied,
    }


def outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Both tables, what lies beside narrow ones, final norm and head."""
    stem, axis = "model.decoder.", "embed" if spec.embedding_width is None else "narrow"
    tensors = [
        table(f"{stem}embed_tokens.weight", "embedding", f"vocab {axis}"),
        table(f"{stem}embed_positions.weight", "position_embedding", "positions embed"),
    ]
    if spec.embedding_width is not None:
        tensors += linear(f"{stem}project_in", "widen", "narrow", "embed")
        tensors += linear(f"{stem}project_out", "narrow", "embed", "narrow")
    if spec.final_norm is not None:
        tensors += norm(f"{stem}final_layer_norm", "final_norm", spec.final_norm)
    return tensors + ([] if spec.tied else linear("lm_head", "head", axis, "vocab"))


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem, (first, second) = "model.decoder.layers.{layer}.", layer.norms
    return [
        *linear(f"{stem}self_attn.q_proj", "mixer.query", "embed", "heads head_dim", bias=True),
        *linear(f"{stem}self_attn.k_proj", "mixer.key", "embed", "kv_heads head_dim", bias=True),
        *linear(f"{stem}self_attn.v_proj", "mixer.value", "embed", "kv_heads head_dim", bias=True),
        *linear(f"{stem}self_attn.out_proj", "mixer.out", "heads head_dim", "embed", bias=True),
        *norm(f"{stem}self_attn_layer_norm", first, layer.norm),
        *linear(f"{stem}fc1", "mlp.up", "embed", "mlp", bias=True),
        *linear(f"{stem}fc2", "mlp.down", "mlp", "embed", bias=True),
        *norm(f"{stem}final_layer_norm", second, layer.norm),
    ]


LAYOUT = Layout(outer_tensors, layer_tensors, ignored=(r"lm_head\.weight",), prefix="model.")
FAMILY = Family(
    "opt",
    opt,
    SIZES,
    VARIANTS,
    hub=HubFormat(
        ("opt",),
        "OPTForCausalLM",
        read_config,
        write_config,
        LAYOUT,
        scorer="OPTForSequenceClassification",
    ),
)
