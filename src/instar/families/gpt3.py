"""GPT-3 (Brown et al. 2020, table 2.1): learned positions, LayerNorm, GELU, biases, tied.

GPT-2 (Radford et al. 2019) is the same architecture, and its format is the one in which others
store both.
"""

import dataclasses
from typing import Any

from instar.families.family import Family, GgufFormat, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import Layout, Tensor, linear, norm, table
from instar.models.spec import Activation, Attention, Layer, Mlp, ModelSpec, Norm, in_groups

# Layers, width, heads. The paper prints 24 heads of 128 for 1.3B and a width of 5140 for 13B, which
# contradict its own FLOP column (table D.1): 16 heads and 5120 agree with it.
SIZES: dict[str, tuple[int, int, int]] = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 16),
    "1.3b": (24, 2048, 16),
    "2.7b": (32, 2560, 32),
    "6.7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "175b": (96, 12288, 96),
}


def gpt3(
    *,
    depth: int,
    width: int,
    heads: int,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 50257,
    max_positions: int = 2048,
    tied: bool = True,
    qk_norm: bool = False,
    window: int | None = None,
    activation: Activation = "gelu_tanh",
    norm_epsilon: float = 1e-5,
) -> ModelSpec:
    """A GPT-3 of any size; the MLP is four times as wide as the model unless stated.

    With a `window` every second layer is locally banded, as those of the paper are (section 2.1;
    how wide their bands were is not published): its queries see so many keys.
    """
    layer_norm = Norm("layer", norm_epsilon, bias=True)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim or width // heads,
        bias=True,
        out_bias=True,
        qk_norm=layer_norm if qk_norm else None,
    )
    layer = Layer(mixer, Mlp(mlp_width or 4 * width, activation, bias=True), layer_norm)
    banded = dataclasses.replace(layer, mixer=dataclasses.replace(mixer, window=window))
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=in_groups([(layer, banded)[number % 2] for number in range(depth)]),
        final_norm=layer_norm,
        learned_positions=True,
        tied=tied,
    )


# --- As transformers stores it (GPT-2) ----------------------------------------------------------

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a GPT2LMHeadModel."""
    config.expect(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    width, heads = config.integer("n_embd"), config.integer("n_head")
    if width % heads:
        raise config.error("n_embd", f"({width}) is not a multiple of n_head ({heads})")
    return gpt3(
        depth=config.integer("n_layer", most=MOST_LAYERS),
        width=width,
        heads=heads,
        mlp_width=config.integer("n_inner", None),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("n_positions"),
        tied=config.flag("tie_word_embeddings", True),
        activation=config.choice("activation_function", ACTIVATIONS, "gelu_new"),
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a GPT2LMHeadModel's config.json."""
    layer = spec.each_layer()[0]
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "n_embd": spec.width,
        "n_head": layer.mixer.heads,
        "n_layer": spec.depth,
        "n_inner": layer.mlp.width,
        "n_positions": spec.max_positions,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied,
        "activation_function": names[layer.mlp.activation],
        "layer_norm_epsilon": layer.norm.epsilon,
    }


def conv1d(name: str, paths: dict[str, str], inputs: str) -> list[Tensor]:
    """GPT-2's Conv1D, [in, out]; `paths` maps each projection that it holds to its output axes."""
    weights = {f"{p}.kernel": f"{inputs} {out} -> ({inputs}) ({out})" for p, out in paths.items()}
    biases = {f"{path}.bias": f"{out} -> ({out})" for path, out in paths.items()}
    return [Tensor(f"{name}.weight", weights, join=1), Tensor(f"{name}.bias", biases)]


QKV = {
    "mixer.query": "heads head_dim",
    "mixer.key": "kv_heads head_dim",
    "mixer.value": "kv_heads head_dim",
}


def outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Both embeddings, final norm and head."""
    return [
        table("transformer.wte.weight", "embedding", "vocab embed"),
        table("transformer.wpe.weight", "position_embedding", "positions embed"),
        *norm("transformer.ln_f", "final_norm", spec.final_norm),
        *([] if spec.tied else linear("lm_head", "head", "embed", "vocab")),
    ]


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem = "transformer.h.{layer}."
    return [
        *norm(f"{stem}ln_1", "mixer_norm", layer.norm),
        *conv1d(f"{stem}attn.c_attn", QKV, "embed"),
        *conv1d(f"{stem}attn.c_proj", {"mixer.out": "embed"}, "heads head_dim"),
        *norm(f"{stem}ln_2", "mlp_norm", layer.norm),
        *conv1d(f"{stem}mlp.c_fc", {"mlp.up": "mlp"}, "embed"),
        *conv1d(f"{stem}mlp.c_proj", {"mlp.down": "embed"}, "mlp"),
    ]


# Older checkpoints store the masks of attention; a tied model may store its head as well.
LAYOUT = Layout(
    outer_tensors,
    layer_tensors,
    ignored=(r".*\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
    prefix="transformer.",
)


# --- As llama.cpp stores it ---------------------------------------------------------------------

GGUF_FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "embedding_length",
    "n_head": "attention.head_count",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}


def gguf_outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Both embeddings, final norm and head."""
    return [
        table("token_embd.weight", "embedding", "vocab embed"),
        table("position_embd.weight", "position_embedding", "positions embed"),
        *norm("output_norm", "final_norm", spec.final_norm),
        *([] if spec.tied else linear("output", "head", "embed", "vocab")),
    ]


def gguf_layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem = "blk.{layer}."
    weights = {f"{path}.kernel": f"embed {out} -> ({out}) embed" for path, out in QKV.items()}
    biases = {f"{path}.bias": f"{out} -> ({out})" for path, out in QKV.items()}
    return [
        *norm(f"{stem}attn_norm", "mixer_norm", layer.norm),
        Tensor(f"{stem}attn_qkv.weight", weights),
        Tensor(f"{stem}attn_qkv.bias", biases),
        *linear(f"{stem}attn_output", "mixer.out", "heads head_dim", "embed", bias=True),
        *norm(f"{stem}ffn_norm", "mlp_norm", layer.norm),
        *linear(f"{stem}ffn_up", "mlp.up", "embed", "mlp", bias=True),
        *linear(f"{stem}ffn_down", "mlp.down", "mlp", "embed", bias=True),
    ]


FAMILY = Family(
    "gpt3",
    gpt3,
    SIZES,
    options=("window",),
    hub=HubFormat(
        ("gpt2",),
        "GPT2LMHeadModel",
        read_config,
        write_config,
        LAYOUT,
        scorer="GPT2ForSequenceClassification",
    ),
    gguf=GgufFormat("gpt2", GGUF_FIELDS, Layout(gguf_outer_tensors, gguf_layer_tensors)),
)
