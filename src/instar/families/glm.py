"""GLM-4 (Zeng et al. 2024, 2406.12793): ChatGLM 3 as transformers writes it, and GLM-4-0414.

LLaMA with a few heads of keys, biases of queries, keys and values, and half of each head turned.
The models of April 2025 (`around`) have a norm on either side of each branch.
"""

import dataclasses
from typing import Any

from instar.families import llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import MOST_LAYERS, HubConfig
from instar.families.layout import GATE_UP, Layout, Tensor, fused, norm
from instar.models.spec import Layer, ModelSpec, Rotary


def glm(
    *,
    around: bool = False,
    bias: bool = True,
    rotary_fraction: float = 0.5,
    rope_theta: float = 10_000.0,
    **options: Any,
) -> ModelSpec:
    """A GLM-4 of any size; see `llama.llama` for the options."""
    spec = llama.llama(**{"norm_epsilon": 1e-5, **options})
    rotary = Rotary(rope_theta, rotary_fraction, "interleaved")

    def change(layer: Layer) -> Layer:
        return dataclasses.replace(
            layer,
            mixer=dataclasses.replace(layer.mixer, rotary=rotary, bias=bias),
            arrangement="sandwich" if around else "pre_norm",
        )

    return spec.map_layers(change)


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a GlmForCausalLM."""
    return _read(config, around=False)


def read_config_around(config: HubConfig) -> ModelSpec:
    """The spec of a Glm4ForCausalLM."""
    return _read(config, around=True)


def _read(config: HubConfig, around: bool) -> ModelSpec:
    config.expect(hidden_act="silu")
    theta, fraction = llama.read_plain_rotary(config, 0.5)
    heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", 128)
    if fraction > 1 or int(head_dim * fraction) % 2 or int(head_dim * fraction) < 2:
        raise config.error("partial_rotary_factor", f"({fraction}) does not fit {head_dim}")
    return glm(
        around=around,
        bias=config.flag("attention_bias", True),
        rotary_fraction=int(head_dim * fraction) / head_dim,
        rope_theta=theta,
        depth=config.integer("num_hidden_layers", most=MOST_LAYERS),
        width=config.integer("hidden_size"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        mlp_width=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        max_positions=config.integer("max_position_embeddings", 131_072),
        tied=config.flag("tie_word_embeddings", False),
        norm_epsilon=config.number("rms_norm_eps", 1.5625e-07),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a GlmForCausalLM's or a Glm4ForCausalLM's config.json."""
    rotary = spec.each_layer()[0].mixer.rotary
    fields = llama.write_config(spec)
    for name in ("mlp_bias", "rope_scaling"):
        del fields[name]
    stated = {"rope_theta": rotary.theta, "partial_rotary_factor": rotary.fraction}
    return fields | stated | {"rope_parameters": {"rope_type": "default", **stated}}


def layer_tensors(layer: Layer) -> list[Tensor]:
    """A layer of either kind."""
    stem = "model.layers.{layer}."
    left_out = ("mlp.gate_proj", "mlp.up_proj", "_layernorm.")
    norms = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}
    if layer.arrangement == "sandwich":
        norms |= {"post_self_attn_layernorm": "mixer_out_norm"}
        norms |= {"post_mlp_layernorm": "mlp_out_norm"}
    return [
        *(t for t in llama.layer_tensors(layer) if not any(name in t.name for name in left_out)),
        *fused(f"{stem}mlp.gate_up_proj", GATE_UP, False),
        *(t for theirs, ours in norms.items() for t in norm(stem + theirs, ours, layer.norm)),
    ]


LAYOUT = Layout(llama.outer_tensors, layer_tensors, llama.LAYOUT.ignored, llama.LAYOUT.prefix)
FAMILY = Family(
    "glm",
    glm,
    hub=HubFormat(
        ("glm",),
        "GlmForCausalLM",
        read_config,
        write_config,
        LAYOUT,
        scorer="GlmForSequenceClassification",
    ),
)
