"""GPT-Neo (Black et al. 2021): a GPT-3 of unscaled logits, with bands in some of its layers."""

from typing import Any

from instar.families import gpt3
from instar.families.family import Family, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import Layout, Tensor, linear, norm
from instar.models.spec import Activation, Attention, Layer, Mlp, ModelSpec, Norm, in_groups

# Layers, width, heads.
SIZES: dict[str, tuple[int, int, int]] = {
    "125m": (12, 768, 12),
    "1.3b": (24, 2048, 16),
    "2.7b": (32, 2560, 20),
}


def gpt_neo(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 50257,
    max_positions: int = 2048,
    tied: bool = True,
    window: int = 256,
    banded: list[bool] | None = None,
    activation: Activation = "gelu_tanh",
    norm_epsilon: float = 1e-5,
) -> ModelSpec:
    """A GPT-Neo of any size; `banded` says which layers see `window` keys, each second if None."""
    layer_norm = Norm("layer", norm_epsilon, bias=True)
    mlp = Mlp(mlp_width or 4 * width, activation, bias=True)
    banded = banded or [bool(number % 2) for number in range(depth)]

    def layer(narrow: bool) -> Layer:
        mixer = Attention(
            heads,
            heads,
            head_dim or width // heads,
            out_bias=True,
            window=window if narrow else None,
            scale=1.0,
        )
        return Layer(mixer, mlp, layer_norm)

    layers = [layer(each) for each in banded[:depth]]
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=in_groups(layers),
        final_norm=layer_norm,
        learned_positions=True,
        tied=tied,
    )


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a GPTNeoForCausalLM."""
    width, heads = config.integer("hidden_size"), config.integer("num_heads")
    if width % heads:
        raise config.error("hidden_size", f"({width}) is not a multiple of num_heads ({heads})")
    depth, kinds = config.integer("num_layers", most=MOST_LAYERS), read_kinds(config)
    if len(kinds) != depth:
        raise config.error("attention_types", f"names {len(kinds)} layers, and there are {depth}")
    return gpt_neo(
        depth=depth,
        width=width,
        heads=heads,
        mlp_width=config.integer("intermediate_size", None),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings"),
        tied=config.flag("tie_word_embeddings", True),
        window=config.integer("window_size", 256),
        banded=[kind == "local" for kind in kinds],
        activation=config.choice("activation_function", gpt3.ACTIVATIONS, "gelu_new"),
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
    )


def read_kinds(config: HubConfig) -> list[str]:
    """What each layer is, of pairs [kinds, how often they follow one another]."""
    kinds: list[str] = []
    try:
        for names, count in config.raw("attention_types"):
            if not 0 < count <= MOST_LAYERS or not {*names} <= {"global", "local"}:
                raise ValueError
            kinds += list(names) * count
    except (TypeError, ValueError):
        raise config.error(
            "attention_types", 'must be a list of pairs such as [["global", "local"], 12]'
        ) from None
    return kinds


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a GPTNeoForCausalLM's config.json."""
    layers = spec.each_layer()
    kinds = ["global" if layer.mixer.window is None else "local" for layer in layers]
    names = {ours: theirs for theirs, ours in reversed(gpt3.ACTIVATIONS.items())}
    windows = {layer.mixer.window for layer in layers} - {None}
    return {
        "hidden_size": spec.width,
        "num_heads": layers[0].mixer.heads,
        "num_layers": spec.depth,
        "intermediate_size": layers[0].mlp.width,
        "max_position_embeddings": spec.max_positions,
        "attention_types": [[[kind], 1] for kind in kinds],
        "window_size": max(windows, default=256),
        "activation_function": names[layers[0].mlp.activation],
        "layer_norm_epsilon": layers[0].norm.epsilon,
        "tie_word_embeddings": spec.tied,
        "vocab_size": spec.vocab_size,
    }


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem = "transformer.h.{layer}."
    return [
        *norm(f"{stem}ln_1", "mixer_norm", layer.norm),
        *linear(f"{stem}attn.attention.q_proj", "mixer.query", "embed", "heads head_dim"),
        *linear(f"{stem}attn.attention.k_proj", "mixer.key", "embed", "kv_heads head_dim"),
        *linear(f"{stem}attn.attention.v_proj", "mixer.value", "embed", "kv_heads head_dim"),
        *linear(f"{stem}attn.attention.out_proj", "mixer.out", "heads head_dim", "embed", True),
        *norm(f"{stem}ln_2", "mlp_norm", layer.norm),
        *linear(f"{stem}mlp.c_fc", "mlp.up", "embed", "mlp", bias=True),
        *linear(f"{stem}mlp.c_proj", "mlp.down", "mlp", "embed", bias=True),
    ]


LAYOUT = Layout(
    gpt3.outer_tensors,
    layer_tensors,
    ignored=(r".*\.attn\.attention\.(bias|masked_bias)", r"lm_head\.weight"),
    prefix="transformer.",
)
FAMILY = Family(
    "gpt_neo",
    gpt_neo,
    SIZES,
    options=("window",),
    hub=HubFormat(
        ("gpt_neo",),
        "GPTNeoForCausalLM",
        read_config,
        write_config,
        LAYOUT,
        scorer="GPTNeoForSequenceClassification",
    ),
)
