"""Gemma 2 (2408.00118, section 2): windows in every other layer, logits capped by a tanh."""

import itertools
from typing import Any

from instar.families import gemma, llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.models.spec import Attention, ModelSpec, Rotary


def gemma2(
    *,
    depth: int,
    width: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = 4096,
    windowed: list[bool] | None = None,
    scale_size: int | None = None,
    softcap: float | None = 50.0,
    rope_theta: float = 10_000.0,
    **shape: Any,
) -> ModelSpec:
    """A Gemma 2 of any size; see `gemma.gemma` for the other options.

    `windowed` says which layers see `window` keys, the first and each second one if None;
    `scale_size` n scales the logits of attention by 1/sqrt(n), the head_dim if None.
    """
    head_dim = head_dim or width // heads
    windowed = windowed or [number % 2 == 0 for number in range(depth)]
    mixers = [
        Attention(
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim,
            rotary=Rotary(rope_theta),
            window=window if each else None,
            scale=(scale_size or head_dim) ** -0.5,
            softcap=softcap,
        )
        for each in itertools.islice(windowed, depth)
    ]
    shape = {"vocab_size": 256_000, "max_positions": 8192, "logit_softcap": 30.0, **shape}
    return gemma.gemma(mixers, width=width, **shape)


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a Gemma2ForCausalLM."""
    config.expect(partial_rotary_factor=1.0)
    theta, _ = llama.read_plain_rotary(config)
    heads, windowed = config.integer("num_attention_heads"), gemma.read_kinds(config, every=2)
    return gemma2(
        depth=len(windowed),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=config.integer("head_dim"),
        window=config.integer("sliding_window", None),
        windowed=windowed,
        scale_size=config.integer("query_pre_attn_scalar", 256),
        softcap=config.number("attn_logit_softcapping", None),
        logit_softcap=config.number("final_logit_softcapping", None),
        rope_theta=theta,
        **gemma.read_shape(config),
    )


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a Gemma2ForCausalLM's config.json."""
    mixer = spec.each_layer()[0].mixer
    theta = mixer.rotary.theta
    return gemma.write_shape(spec) | {
        "attn_logit_softcapping": mixer.softcap,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


FAMILY = Family(
    "gemma2",
    gemma2,
    options=("window",),
    hub=HubFormat(
        ("gemma2",),
        "Gemma2ForCausalLM",
        read_config,
        write_config,
        gemma.LAYOUT,
        scorer="Gemma2ForSequenceClassification",
    ),
)
