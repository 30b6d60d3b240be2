"""Mistral (Jiang et al. 2023, section 2): LLaMA with grouped queries and a sliding window."""

import dataclasses
from typing import Any

from instar.families import llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.models.spec import Layer, ModelSpec


def mistral(*, window: int | None = 4096, **options: Any) -> ModelSpec:
    """A Mistral of any size; see `llama.llama` for the options."""
    return with_window(llama.llama(**options), window)


def with_window(spec: ModelSpec, window: int | None) -> ModelSpec:
    """The same model, in which a query sees `window` keys, its own included."""

    def change(layer: Layer) -> Layer:
        return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=window))

    return spec.map_layers(change)


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a MistralForCausalLM."""
    config.expect(attention_bias=False, mlp_bias=False)
    return with_window(llama.read_config(config), config.integer("sliding_window", None))


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a MistralForCausalLM's config.json."""
    layer: Layer = spec.each_layer()[0]
    return llama.write_config(spec) | {"sliding_window": layer.mixer.window}


FAMILY = Family(
    "mistral",
    mistral,
    options=("window",),
    hub=HubFormat(
        ("mistral",),
        "MistralForCausalLM",
        read_config,
        write_config,
        llama.LAYOUT,
        scorer="MistralForSequenceClassification",
    ),
)
