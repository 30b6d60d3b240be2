"""Baichuan and Baichuan 2 (Yang et al. 2023, 2309.10305): LLaMA with one matrix for q, k and v.

The models of 13B have linear biases (ALiBi) in the place of rotary positions. Baichuan 2 divides
the rows of its head by their norms, at every step of training too.
"""

import dataclasses
from typing import Any

from instar.families import llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.families.layout import CHAINED, Layout, Tensor, fused
from instar.models.spec import Layer, ModelSpec

# Layers, width, heads, width of the MLP.
_7B, _13B = (32, 4096, 32, 11008), (40, 5120, 40, 13696)
SIZES = {"7b": _7B, "13b": _13B, "2-7b": _7B, "2-13b": _13B}
VARIANTS = {
    "13b": {"alibi": True},
    "2-7b": {"head_normed": True},
    "2-13b": {"alibi": True, "head_normed": True},
}


def baichuan(
    *,
    alibi: bool = False,
    head_normed: bool = False,
    vocab_size: int = 64_000,
    **options: Any,
) -> ModelSpec:
    """A Baichuan of any size; see `llama.llama` for the options."""
    spec = llama.llama(vocab_size=vocab_size, **options).replace(head_normed=head_normed)

    def change(layer: Layer) -> Layer:
        mixer = dataclasses.replace(layer.mixer, rotary=None, alibi=True)
        return dataclasses.replace(layer, mixer=mixer)

    return spec.map_layers(change) if alibi else spec


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a BaichuanForCausalLM.

    Its four models share a class name: those of 13B say `model_max_length` alone, and Baichuan 2
    alone has a z-loss.
    """
    config.expect(num_key_value_heads=None, head_dim=None, mlp_bias=False, attention_bias=False)
    alibi = not config.has("max_position_embeddings")
    positions = config.integer("model_max_length" if alibi else "max_position_embeddings")
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if width % heads:
        raise config.error("hidden_size", f"({width}) is not a multiple of {heads} heads")
    config.expect(rope_scaling=None)
    config.choice("hidden_act", llama.ACTIVATIONS, "silu")
    return baichuan(
        depth=config.integer("num_hidden_layers", most=llama.MOST_LAYERS),
        width=width,
        heads=heads,
        mlp_width=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=positions,
        tied=config.flag("tie_word_embeddings", False),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        alibi=alibi,
        head_normed=config.number("z_loss_weight", None, zero=True) is not None,
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a BaichuanForCausalLM's config.json."""
    layer = spec.each_layer()[0]
    fields = {
        "hidden_size": spec.width,
        "intermediate_size": layer.mlp.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": layer.mixer.heads,
        "hidden_act": layer.mlp.activation,
        "rms_norm_eps": layer.norm.epsilon,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied,
    }
    positions = "model_max_length" if layer.mixer.alibi else "max_position_embeddings"
    fields[positions] = spec.max_positions
    return fields | ({"z_loss_weight": 0} if spec.head_normed else {})


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    apart = [f"self_attn.{name}_proj" for name in "qkv"]
    rest = [t for t in llama.layer_tensors(layer) if not any(name in t.name for name in apart)]
    return [*fused("model.layers.{layer}.self_attn.W_pack", CHAINED, False), *rest]


LAYOUT = Layout(llama.outer_tensors, layer_tensors, llama.LAYOUT.ignored, llama.LAYOUT.prefix)
FAMILY = Family(
    "baichuan",
    baichuan,
    SIZES,
    VARIANTS,
    hub=HubFormat(
        ("baichuan",), "BaichuanForCausalLM", read_config, write_config, LAYOUT, own_code=True
    ),
)
