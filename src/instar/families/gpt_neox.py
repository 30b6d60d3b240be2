"""GPT-NeoX (Black et al. 2022, 2204.06745): attention and MLP side by side, a norm for each."""

from typing import Any

from instar.families.family import Family, HubFormat
from instar.families.gpt3 import ACTIVATIONS
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
from instar.models.spec import Activation, Attention, Layer, Mlp, ModelSpec, Norm, Rotary

# Layers, width, heads (table 1).
SIZES: dict[str, tuple[int, int, int]] = {"20b": (44, 6144, 64)}


def gpt_neox(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 50432,
    max_positions: int = 2048,
    tied: bool = False,
    parallel: bool = True,
    bias: bool = True,
    rotary_fraction: float = 0.25,
    rope_theta: float = 10_000.0,
    activation: Activation = "gelu",
    norm_epsilon: float = 1e-5,
) -> ModelSpec:
    """A GPT-NeoX (or Pythia) of any size."""
    layer_norm = Norm("layer", norm_epsilon, bias=True)
    head_dim = head_dim or width // heads
    rotated = int(head_dim * rotary_fraction)
    rotary = Rotary(rope_theta, rotated / head_dim)
    mixer = Attention(heads, heads, head_dim, bias, bias, rotary)
    mlp = Mlp(mlp_width or 4 * width, activation, bias=True)
    layer = Layer(mixer, mlp, layer_norm, "parallel" if parallel else "pre_norm")
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=((depth, (layer,)),),
        final_norm=layer_norm,
        tied=tied,
    )


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a GPTNeoXForCausalLM, as transformers 4 or 5 states it."""
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if width % heads:
        raise config.error("hidden_size", f"({width}) is not a multiple of {heads} heads")
    config.expect(rope_scaling=None)
    stated = config.section("rope_parameters") if config.has("rope_parameters") else None
    if stated is not None:
        stated.expect(rope_type="default")
    fraction, theta = config.number("rotary_pct", 0.25), config.number("rotary_emb_base", 10_000.0)
    if stated is not None:
        fraction = stated.number("partial_rotary_factor", fraction)
        theta = stated.number("rope_theta", theta)
    rotated = int(width // heads * fraction)
    if fraction > 1 or rotated < 2 or rotated % 2:
        raise config.error("rotary_pct", f"({fraction}) turns {rotated} elements of a head")
    return gpt_neox(
        depth=config.integer("num_hidden_layers", most=MOST_LAYERS),
        width=width,
        heads=heads,
        mlp_width=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings", 2048),
        tied=config.flag("tie_word_embeddings", False),
        parallel=config.flag("use_parallel_residual", True),
        bias=config.flag("attention_bias", True),
        rotary_fraction=fraction,
        rope_theta=theta,
        activation=config.choice("hidden_act", ACTIVATIONS, "gelu"),
        norm_epsilon=config.number("layer_norm_eps", 1e-5),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a GPTNeoXForCausalLM's config.json."""
    layer = spec.each_layer()[0]
    mixer, rotary = layer.mixer, layer.mixer.rotary
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": mixer.heads,
        "intermediate_size": layer.mlp.width,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "rotary_pct": rotary.fraction,
        "rotary_emb_base": rotary.theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rotary.theta,
            "partial_rotary_factor": rotary.fraction,
        },
        "use_parallel_residual": layer.arrangement == "parallel",
        "attention_bias": mixer.bias,
        "hidden_act": names[layer.mlp.activation],
        "layer_norm_eps": layer.norm.epsilon,
        "tie_word_embeddings": spec.tied,
    }


def outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Embeddings, final norm and head."""
    return [
        table("gpt_neox.embed_in.weight", "embedding", "vocab embed"),
        *norm("gpt_neox.final_layer_norm", "final_norm", spec.final_norm),
        *([] if spec.tied else linear("embed_out", "head", "embed", "vocab")),
    ]


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem, bias = "gpt_neox.layers.{layer}.", layer.mixer.bias
    return [
        *norm(f"{stem}input_layernorm", "mixer_norm", layer.norm),
        *norm(f"{stem}post_attention_layernorm", "mlp_norm", layer.norm),
        *fused(f"{stem}attention.query_key_value", BY_HEAD, bias, BY_HEAD_FOLD),
        *linear(f"{stem}attention.dense", "mixer.out", "heads head_dim", "embed", bias),
        *linear(f"{stem}mlp.dense_h_to_4h", "mlp.up", "embed", "mlp", bias=True),
        *linear(f"{stem}mlp.dense_4h_to_h", "mlp.down", "mlp", "embed", bias=True),
    ]


LAYOUT = Layout(
    outer_tensors,
    layer_tensors,
    ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", r"embed_out\.weight"),
    prefix="gpt_neox.",
)
FAMILY = Family(
    "gpt_neox",
    gpt_neox,
    SIZES,
    hub=HubFormat(
        ("gpt_neox",),
        "GPTNeoXForCausalLM",
        read_config,
        write_config,
        LAYOUT,
        scorer="GPTNeoXForSequenceClassification",
    ),
)
