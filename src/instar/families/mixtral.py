"""Mixtral (Jiang et al. 2024, 2401.04088, section 2): LLaMA with experts in place of the MLP."""

import dataclasses
from typing import Any

from instar.families import llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.families.layout import Layout, Tensor, linear
from instar.families.mistral import with_window
from instar.models.spec import Experts, Layer, ModelSpec


def mixtral(
    *,
    experts: int = 8,
    experts_per_token: int = 2,
    router_bias: bool = False,
    window: int | None = None,
    **options: Any,
) -> ModelSpec:
    """A Mixtral of any size; see `llama.llama` for the options, which describe each expert too.

    With `router_bias` the routers have a bias that balances the experts without a loss.
    """
    options = {"norm_epsilon": 1e-5, "rope_theta": 1e6, **options}
    spec = with_experts(llama.llama(**options), experts, experts_per_token, router_bias)
    return with_window(spec, window)


def with_experts(spec: ModelSpec, count: int, top_k: int, choice_bias: bool = False) -> ModelSpec:
    """The same model with `count` MLPs like its own in each layer, `top_k` of them for a token."""

    def change(layer: Layer) -> Layer:
        experts = Experts(layer.mlp, count, top_k, choice_bias=choice_bias)
        return dataclasses.replace(layer, mlp=experts)

    return spec.map_layers(change)


def dense(spec: ModelSpec) -> ModelSpec:
    """The same model with one of its experts as the MLP of each layer."""
    return spec.map_layers(lambda layer: dataclasses.replace(layer, mlp=layer.mlp.expert))


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a MixtralForCausalLM."""
    config.expect(attention_bias=False, mlp_bias=False)
    spec = llama.read_config(config)
    count, top_k = config.integer("num_local_experts"), config.integer("num_experts_per_tok")
    if top_k > count:
        raise config.error("num_experts_per_tok", f"({top_k}) exceeds num_local_experts ({count})")
    return with_window(with_experts(spec, count, top_k), config.integer("sliding_window", None))


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a MixtralForCausalLM's config.json."""
    layer = spec.each_layer()[0]
    return llama.write_config(dense(spec)) | {
        "sliding_window": layer.mixer.window,
        "num_local_experts": layer.mlp.count,
        "num_experts_per_tok": layer.mlp.top_k,
    }


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer: LLaMA's, with a router (`gate`) and the matrices of each expert."""
    one = llama.layer_tensors(dataclasses.replace(layer, mlp=layer.mlp.expert))
    stem = "model.layers.{layer}.block_sparse_moe."
    tensors = [tensor for tensor in one if ".mlp." not in tensor.name]
    tensors += linear(f"{stem}gate", "mlp.router", "embed", "experts")
    for name, path, inputs, outputs in (
        ("w1", "mlp.gate", "embed", "mlp"),
        ("w3", "mlp.up", "embed", "mlp"),
        ("w2", "mlp.down", "mlp", "embed"),
    ):
        tensors += linear(f"{stem}experts.{{expert}}.{name}", path, inputs, outputs)
    return tensors


FAMILY = Family(
    "mixtral",
    mixtral,
    options=("experts", "experts_per_token", "router_bias", "window"),
    hub=HubFormat(
        ("mixtral",),
        "MixtralForCausalLM",
        read_config,
        write_config,
        Layout(llama.outer_tensors, layer_tensors, llama.LAYOUT.ignored, llama.LAYOUT.prefix),
        scorer="MixtralForSequenceClassification",
    ),
)
