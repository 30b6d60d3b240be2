"""Gemma 3 (2503.19786, section 2), its text model: five windows to each whole view, q, k normed."""

import itertools
from typing import Any

from instar.families import gemma, llama
from instar.families.family import Family, HubFormat
from instar.families.hub_config import HubConfig
from instar.models.rotary import LinearScaling, Rotary
from instar.models.spec import Attention, ModelSpec


def gemma3(
    *,
    depth: int,
    width: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = 1024,
    windowed: list[bool] | None = None,
    scale_size: int | None = None,
    rotary: Rotary | None = None,
    local_rotary: Rotary | None = None,
    norm_epsilon: float = 1e-6,
    **shape: Any,
) -> ModelSpec:
    """A Gemma 3 of any size; see `gemma.gemma` for the other options.

    `windowed` says which layers see `window` keys, all but each sixth if None, and turn by
    `local_rotary`; the others turn by `rotary`.
    """
    head_dim = head_dim or width // heads
    windowed = windowed or [bool((number + 1) % 6) for number in range(depth)]
    local, whole = local_rotary or Rotary(10_000.0), rotary or Rotary(1_000_000.0)
    mixers = [
        Attention(
            heads=heads,
            kv_heads=kv_heads or heads,
            head_dim=head_dim,
            rotary=local if each else whole,
            qk_norm=gemma.gemma_norm(norm_epsilon),
            window=window if each else None,
            scale=(scale_size or head_dim) ** -0.5,
        )
        for each in itertools.islice(windowed, depth)
    ]
    shape = {"vocab_size": 262_144, "max_positions": 131_072, **shape}
    return gemma.gemma(mixers, width=width, norm_epsilon=norm_epsilon, **shape)


def read_config(config: HubConfig) -> ModelSpec:
    """The spec of a Gemma3ForCausalLM, as transformers 4 or 5 states it."""
    config.expect(attn_logit_softcapping=None)
    every = config.integer("sliding_window_pattern", 6)
    heads, windowed = config.integer("num_attention_heads"), gemma.read_kinds(config, every)
    rotary = read_rotary(config)
    return gemma3(
        depth=len(windowed),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=config.integer("head_dim", 256),
        window=config.integer("sliding_window", 4096),
        windowed=windowed,
        scale_size=config.integer("query_pre_attn_scalar", 256),
        logit_softcap=config.number("final_logit_softcapping", None),
        rotary=rotary[gemma.WHOLE],
        local_rotary=rotary[gemma.WINDOWED],
        **gemma.read_shape(config),
    )


def read_rotary(config: HubConfig) -> dict[str, Rotary]:
    """How layers of either kind turn."""
    thetas = {
        gemma.WHOLE: config.number("rope_theta", 1_000_000.0),
        gemma.WINDOWED: config.number("rope_local_base_freq", 10_000.0),
    }
    if not config.has("rope_parameters"):
        local = Rotary(thetas[gemma.WINDOWED])
        return {gemma.WHOLE: llama.read_rotary(config, 0), gemma.WINDOWED: local}
    found, stated = {}, config.section("rope_parameters")
    for kind, theta in thetas.items():
        section = stated.section(kind)
        section.expect(partial_rotary_factor=1.0)
        kinds = {"default": None, "linear": LinearScaling}
        scaling = section.choice("rope_type", kinds, "default")
        scaled = None if scaling is None else scaling(section.number("factor"))
        found[kind] = Rotary(section.number("rope_theta", theta), scaling=scaled)
    return found


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The fields of a Gemma3ForCausalLM's config.json."""
    mixers = [layer.mixer for layer in spec.each_layer()]
    whole = next((m.rotary for m in mixers if m.window is None), Rotary(1_000_000.0))
    local = next((m.rotary for m in mixers if m.window is not None), Rotary(10_000.0))
    rotary = {gemma.WHOLE: whole, gemma.WINDOWED: local}
    parameters = {
        kind: llama.write_rotary(each)["rope_parameters"] for kind, each in rotary.items()
    }
    return gemma.write_shape(spec) | {
        "rope_theta": whole.theta,
        "rope_local_base_freq": local.theta,
        "rope_scaling": llama.write_rotary(whole)["rope_scaling"],
        "rope_parameters": parameters,
    }


FAMILY = Family(
    "gemma3",
    gemma3,
    options=("window",),
    hub=HubFormat(
        ("gemma3_text",),
        "Gemma3ForCausalLM",
        read_config,
        write_config,
        gemma.LAYOUT,
        scorer="Gemma3TextForSequenceClassification",
    ),
)
