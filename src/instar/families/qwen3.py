"""Qwen 3 (Yang et al. 2025, section 2): LLaMA with queries and keys normalised in each head."""

import dataclasses
from typing import Any

from instar.families import llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.models.spec import Layer, ModelSpec


def qwen3(**options: Any) -> ModelSpec:
    """A dense Qwen 3 of any size; see `llama.llama` for the options."""
    return llama.llama(**{"qk_norm": True, "rope_theta": 1e6, **options})


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a Qwen3ForCausalLM."""
    config.expect(use_sliding_window=False, mlp_bias=False)
    config.integer("head_dim")

    def change(layer: Layer) -> Layer:
        return dataclasses.replace(
            layer, mixer=dataclasses.replace(layer.mixer, qk_norm=layer.norm)
        )

    return llama.read_config(config).map_layers(change)


FAMILY = Family(
    "qwen3",
    qwen3,
    {},
    hub=HubFormat(
        ("qwen3",),
        "Qwen3ForCausalLM",
        read_config,
        llama.write_config,
        llama.LAYOUT,
        scorer="Qwen3ForSequenceClassification",
    ),
)
