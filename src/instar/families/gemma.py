"""What Gemma 2 and 3 have in common: norms around both branches, scaled embeddings, windows."""

from collections.abc import Sequence
from typing import Any

from instar.families import llama
from instar.families.hub_config import HubConfig
from instar.families.layout import Layout, Tensor, norm
from instar.models.spec import Activation, Attention, Layer, Mlp, ModelSpec, Norm, in_groups

WINDOWED, WHOLE = "sliding_attention", "full_attention"
ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def gemma(
    mixers: Sequence[Attention],
    *,
    width: int,
    vocab_size: int,
    max_positions: int,
    mlp_width: int | None = None,
    tied: bool = True,
    activation: Activation = "gelu_tanh",
    norm_epsilon: float = 1e-6,
    logit_softcap: float | None = None,
) -> ModelSpec:
    """The spec of layers with these mixers, one each; MLPs are four times as wide unless stated."""
    rms = gemma_norm(norm_epsilon)
    mlp = Mlp(mlp_width or 4 * width, activation, gated=True)
    layers = [Layer(mixer, mlp, rms, "sandwich") for mixer in mixers]
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=in_groups(layers),
        final_norm=rms,
        embedding_scale=width**0.5,
        tied=tied,
        logit_softcap=logit_softcap,
    )


def gemma_norm(epsilon: float) -> Norm:
    """An RMSNorm that multiplies by one plus its parameter."""
    return Norm("rms", epsilon, offset=1.0)


def read_shape(config: HubConfig) -> dict[str, Any]:
    """The arguments of `gemma` that both read alike."""
    config.expect(attention_bias=False, use_bidirectional_attention=False)
    return {
        "width": config.integer("hidden_size"),
        "mlp_width": config.integer("intermediate_size"),
        "vocab_size": config.integer("vocab_size"),
        "max_positions": config.integer("max_position_embeddings"),
        "tied": config.flag("tie_word_embeddings", True),
        "activation": config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
    }


def write_shape(spec: ModelSpec) -> dict[str, Any]:
    """The fields of config.json that both write alike."""
    layers = spec.each_layer()
    mixer, mlp = layers[0].mixer, layers[0].mlp
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    windows = {layer.mixer.window for layer in layers} - {None}
    return {
        "hidden_size": spec.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_activation": names[mlp.activation],
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": layers[0].norm.epsilon,
        "query_pre_attn_scalar": round(mixer.scale**-2),
        "sliding_window": max(windows, default=None),
        "layer_types": [WHOLE if each.mixer.window is None else WINDOWED for each in layers],
        "final_logit_softcapping": spec.logit_softcap,
        "attention_bias": False,
        "tie_word_embeddings": spec.tied,
        "vocab_size": spec.vocab_size,
    }


def read_kinds(config: HubConfig, every: int) -> list[bool]:
    """Which layers see a window: those that `layer_types` says, or all but each `every`-th."""
    depth = config.integer("num_hidden_layers", most=llama.MOST_LAYERS)
    if not config.has("layer_types"):
        return [bool((number + 1) % every) for number in range(depth)]
    kinds = config.names("layer_types", (WINDOWED, WHOLE))
    if len(kinds) != depth:
        raise config.error("layer_types", f"names {len(kinds)} layers, and there are {depth}")
    return [kind == WINDOWED for kind in kinds]


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem = "model.layers.{layer}."
    norms = {
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "mixer_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    }
    dense = [t for t in llama.layer_tensors(layer) if "_layernorm." not in t.name]
    return dense + [
        tensor
        for theirs, ours in norms.items()
        for tensor in norm(f"{stem}{theirs}", ours, layer.norm)
    ]


LAYOUT = Layout(llama.outer_tensors, layer_tensors, llama.LAYOUT.ignored, llama.LAYOUT.prefix)
