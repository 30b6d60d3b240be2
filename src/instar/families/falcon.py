"""Falcon (Almazrouei et al. 2023, 2311.16867): one key for many queries, attention beside the MLP.

7B has one key and value for all heads and one norm for both branches; 40B and 180B have a key for
each group of heads and a norm for each branch; Falcon 2 (11B) the groups and one norm. Those that
were trained on RefinedWeb alone (rw; Penedo et al. 2023, 2306.01116, section 4.1) are GPT-3s with
ALiBi, which their code rounds.
"""

from typing import Any

from instar.errors import UserError
from instar.families import llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import (
    BY_GROUP,
    BY_GROUP_FOLD,
    Layout,
    Tensor,
    fused,
    linear,
    norm,
    table,
)
from instar.models.spec import Activation, Attention, Layer, Mlp, ModelSpec, Norm, Rotary

# Layers, width, heads (table 11; of 11b and the rw models, their published configs).
SIZES: dict[str, tuple[int, int, int]] = {
    "7b": (32, 4544, 71),
    "11b": (60, 4096, 32),
    "40b": (60, 8192, 128),
    "180b": (80, 14848, 232),
    "rw-1b": (24, 2048, 32),
    "rw-7b": (36, 4096, 64),
}
_RW = {"alibi": True, "parallel": False, "bias": True}
VARIANTS = {
    "7b": {"kv_heads": 1},
    "11b": {"kv_heads": 8},
    "40b": {"kv_heads": 8, "norms": 2},
    "180b": {"kv_heads": 8, "norms": 2},
    "rw-1b": _RW | {"kv_heads": 32},
    "rw-7b": _RW | {"kv_heads": 64},
}


def falcon(
    *,
    depth: int,
    width: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    vocab_size: int = 65024,
    max_positions: int = 2048,
    tied: bool = True,
    norms: int = 1,
    parallel: bool = True,
    alibi: bool = False,
    bias: bool = False,
    activation: Activation = "gelu",
    rope_theta: float = 10_000.0,
    norm_epsilon: float = 1e-5,
) -> ModelSpec:
    """A Falcon of any size, with one norm in a layer or two; one that is not parallel has two."""
    layer_norm = Norm("layer", norm_epsilon, bias=True)
    mixer = Attention(
        heads=heads,
        kv_heads=kv_heads or 1,
        head_dim=head_dim or width // heads,
        bias=bias,
        out_bias=bias,
        rotary=None if alibi else Rotary(rope_theta),
        alibi=alibi,
        alibi_rounded=alibi,
    )
    mlp = Mlp(mlp_width or 4 * width, activation, bias=bias)
    arrangement = ("shared" if norms == 1 else "parallel") if parallel else "pre_norm"
    layer = Layer(mixer, mlp, layer_norm, arrangement)
    return ModelSpec(
        vocab_size=vocab_size,
        width=width,
        max_positions=max_positions,
        layers=((depth, (layer,)),),
        final_norm=layer_norm,
        tied=tied,
    )


ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a FalconForCausalLM, of whichever of its generations."""
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if width % heads:
        raise config.error("hidden_size", f"({width}) is not a multiple of {heads} heads")
    grouped = config.flag("new_decoder_architecture", False)
    norms = config.integer("num_ln_in_parallel_attn", 2 if grouped else 1, most=2)
    kv_heads, parallel = config.integer("num_kv_heads", heads), True
    if not grouped:
        norms, kv_heads = 1, 1 if config.flag("multi_query", True) else heads
        parallel = config.flag("parallel_attn", True)
    config.expect(partial_rotary_factor=1.0)
    theta, _ = llama.read_plain_rotary(config)
    return falcon(
        depth=config.integer("num_hidden_layers", most=MOST_LAYERS),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=config.integer("ffn_hidden_size", None),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings", 2048),
        tied=config.flag("tie_word_embeddings", True),
        norms=norms,
        parallel=parallel,
        alibi=config.flag("alibi", False),
        bias=config.flag("bias", False),
        activation=config.choice("activation", ACTIVATIONS, "gelu"),
        rope_theta=theta,
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a FalconForCausalLM's config.json.

    Raises:
      UserError: the width is no multiple of the heads, which that class cannot say.
    """
    layer = spec.each_layer()[0]
    mixer = layer.mixer
    if mixer.head_dim * mixer.heads != spec.width:
        raise UserError(f"FalconForCausalLM needs heads of width / heads, not {mixer.head_dim}")
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    parallel = layer.arrangement != "pre_norm"
    grouped = parallel and (mixer.kv_heads > 1 or layer.arrangement == "parallel")
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": mixer.heads,
        "num_kv_heads": mixer.kv_heads,
        "ffn_hidden_size": layer.mlp.width,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": len(layer.norms) if grouped else None,
        "multi_query": grouped or mixer.kv_heads == 1,
        "parallel_attn": parallel,
        "alibi": mixer.alibi,
        "bias": mixer.bias,
        "activation": names[layer.mlp.activation],
        "rope_theta": (mixer.rotary or Rotary()).theta,
        "layer_norm_epsilon": layer.norm.epsilon,
        "tie_word_embeddings": spec.tied,
    }


def outer_tensors(spec: ModelSpec) -> list[Tensor]:
    """Embeddings, final norm and head."""
    return [
        table("transformer.word_embeddings.weight", "embedding", "vocab embed"),
        *norm("transformer.ln_f", "final_norm", spec.final_norm),
        *([] if spec.tied else linear("lm_head", "head", "embed", "vocab")),
    ]


NORMS = {
    "shared": ("input_layernorm",),
    "parallel": ("ln_attn", "ln_mlp"),
    "pre_norm": ("input_layernorm", "post_attention_layernorm"),
}


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer; with one key for all heads the groups come to the same as all queries first.

    With a key for each head they are head by head.
    """
    stem, bias = "transformer.h.{layer}.", layer.mixer.bias
    names = NORMS[layer.arrangement]
    return [
        *(
            tensor
            for theirs, ours in zip(names, layer.norms, strict=True)
            for tensor in norm(f"{stem}{theirs}", ours, layer.norm)
        ),
        *fused(f"{stem}self_attention.query_key_value", BY_GROUP, bias, BY_GROUP_FOLD),
        *linear(f"{stem}self_attention.dense", "mixer.out", "heads head_dim", "embed", bias),
        *linear(f"{stem}mlp.dense_h_to_4h", "mlp.up", "embed", "mlp", bias),
        *linear(f"{stem}mlp.dense_4h_to_h", "mlp.down", "mlp", "embed", bias),
    ]


LAYOUT = Layout(
    outer_tensors,
    layer_tensors,
    ignored=(r".*rotary_emb\.inv_freq", r"lm_head\.weight"),
    prefix="transformer.",
)
FAMILY = Family(
    "falcon",
    falcon,
    SIZES,
    VARIANTS,
    hub=HubFormat(
        ("falcon",),
        "FalconForCausalLM",
        read_config,
        write_config,
        LAYOUT,
        scorer="FalconForSequenceClassification",
    ),
)
