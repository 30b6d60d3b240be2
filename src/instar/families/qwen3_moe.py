"""Qwen 3 with experts (Yang et al. 2025, section 2): many small ones in every layer."""

import dataclasses
from typing import Any

from instar.families import llama, mixtral, qwen3
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.families.layout import Layout, Tensor, linear
from instar.models.spec import Layer, ModelSpec


def qwen3_moe(
    *,
    experts: int = 128,
    experts_per_token: int = 8,
    router_bias: bool = False,
    normalise: bool = True,
    **options: Any,
) -> ModelSpec:
    """A Qwen 3 with experts; see `llama.llama` for the options, which describe each expert too.

    `normalise` divides the weights of a token's experts by their sum.
    """
    spec = qwen3.qwen3(**options)
    return _weighted(mixtral.with_experts(spec, experts, experts_per_token, router_bias), normalise)


def _weighted(spec: ModelSpec, normalise: bool) -> ModelSpec:

    def change(layer: Layer) -> Layer:
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, normalise=normalise))

    return spec.map_layers(change)


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a Qwen3MoeForCausalLM that has experts in every layer."""
    config.expect(decoder_sparse_step=1, mlp_only_layers=[])
    spec = qwen3.read_config(config)
    # Transformers 4 and 5 name their number differently.
    name = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    count, top_k = config.integer(name), config.integer("num_experts_per_tok")
    if top_k > count:
        raise config.error("num_experts_per_tok", f"({top_k}) exceeds {name} ({count})")
    width = config.integer("moe_intermediate_size")

    def change(layer: Layer) -> Layer:
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, width=width))

    spec = spec.map_layers(change)
    normalise = config.flag("norm_topk_prob", False)
    return _weighted(mixtral.with_experts(spec, count, top_k), normalise)


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a Qwen3MoeForCausalLM's config.json."""
    mlp = spec.each_layer()[0].mlp
    return llama.write_config(mixtral.dense(spec)) | {
        "moe_intermediate_size": mlp.expert.width,
        "num_experts": mlp.count,
        "num_experts_per_tok": mlp.top_k,
        "norm_topk_prob": mlp.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer: Qwen 3's, with a router (`gate`) and the matrices of each expert."""
    one = llama.layer_tensors(dataclasses.replace(layer, mlp=layer.mlp.expert))
    stem = "model.layers.{layer}.mlp."
    tensors = [tensor for tensor in one if ".mlp." not in tensor.name]
    tensors += linear(f"{stem}gate", "mlp.router", "embed", "experts")
    return tensors + llama.mlp_tensors(f"{stem}experts.{{expert}}.", "mlp")


FAMILY = Family(
    "qwen3_moe",
    qwen3_moe,
    options=("experts", "experts_per_token", "router_bias"),
    hub=HubFormat(
        ("qwen3_moe",),
        "Qwen3MoeForCausalLM",
        read_config,
        write_config,
        Layout(llama.outer_tensors, layer_tensors, llama.LAYOUT.ignored, llama.LAYOUT.prefix),
        scorer="Qwen3MoeForSequenceClassification",
    ),
)
