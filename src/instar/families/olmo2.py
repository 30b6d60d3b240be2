"""OLMo 2 (2501.00656, section 2.1): LLaMA whose norms follow the branches, with normed q and k."""

import dataclasses
from typing import Any

from instar.families import llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.families.layout import Layout, Tensor, norm
from instar.models.spec import Layer, ModelSpec


def olmo2(**options: Any) -> ModelSpec:
    """An OLMo 2 of any size; see `llama.llama` for the options."""
    return _rearranged(llama.llama(**{"rope_theta": 500_000.0, **options, "qk_norm": False}))


def _rearranged(spec: ModelSpec) -> ModelSpec:
    """A LLaMA's spec with the norms where OLMo 2 has them."""

    def change(layer: Layer) -> Layer:
        mixer = dataclasses.replace(layer.mixer, qk_norm=layer.norm, qk_norm_over="all")
        return dataclasses.replace(layer, mixer=mixer, arrangement="output_norm")

    return spec.map_layers(change)


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of an Olmo2ForCausalLM."""
    config.expect(mlp_bias=False, head_dim=None, attention_bias=False)
    return _rearranged(llama.read_config(config))


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of an Olmo2ForCausalLM's config.json."""
    fields = llama.write_llama_config(spec)
    return {name: value for name, value in fields.items() if name not in ("mlp_bias", "head_dim")}


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer."""
    stem = "model.layers.{layer}."
    dense = llama.layer_tensors(dataclasses.replace(layer, arrangement="pre_norm"))
    norms = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
    return [
        *(tensor for tensor in dense if not any(f".{name}." in tensor.name for name in norms)),
        *norm(f"{stem}post_attention_layernorm", "mixer_out_norm", layer.norm),
        *norm(f"{stem}post_feedforward_layernorm", "mlp_out_norm", layer.norm),
        *norm(f"{stem}self_attn.q_norm", "mixer.query_norm", layer.norm, "heads head_dim"),
        *norm(f"{stem}self_attn.k_norm", "mixer.key_norm", layer.norm, "kv_heads head_dim"),
    ]


FAMILY = Family(
    "olmo2",
    olmo2,
    hub=HubFormat(
        ("olmo2",),
        "Olmo2ForCausalLM",
        read_config,
        write_config,
        Layout(llama.outer_tensors, layer_tensors, llama.LAYOUT.ignored, llama.LAYOUT.prefix),
        scorer="Olmo2ForSequenceClassification",
    ),
)
