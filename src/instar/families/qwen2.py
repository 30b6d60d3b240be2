"""Qwen 2 (Yang et al. 2024, 2407.10671, section 2.2): LLaMA with biases of q, k and v."""

import dataclasses
from typing import Any

from instar.families import llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.models.spec import Layer, ModelSpec


def qwen2(**options: Any) -> ModelSpec:
    """A dense Qwen 2 of any size; see `llama.llama` for the options."""
    return with_biases(llama.llama(**{"rope_theta": 1e6, **options}))


def with_biases(spec: ModelSpec) -> ModelSpec:
    """The same model with biases of queries, keys and values."""

    def change(layer: Layer) -> Layer:
        return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, bias=True))

    return spec.map_layers(change)


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a Qwen2ForCausalLM."""
    config.expect(use_sliding_window=False, mlp_bias=False, attention_bias=None, head_dim=None)
    return with_biases(llama.read_config(config))


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a Qwen2ForCausalLM's config.json, which has none for biases and head_dim."""
    fields = llama.write_llama_config(spec)
    left_out = ("attention_bias", "mlp_bias", "head_dim")
    return {name: value for name, value in fields.items() if name not in left_out}


FAMILY = Family(
    "qwen2",
    qwen2,
    hub=HubFormat(
        ("qwen2",),
        "Qwen2ForCausalLM",
        read_config,
        write_config,
        llama.LAYOUT,
        scorer="Qwen2ForSequenceClassification",
    ),
)
