"""From a model's config to its spec."""

import dataclasses

import pytest

from instar.errors import UserError
from instar.families import gpt3, llama
from instar.families.registry import FAMILIES, ModelConfig, build_spec
from instar.models.spec import Attention, Experts, Layer, Mlp, ModelSpec, Norm, Rotary


def build(**fields) -> ModelSpec:
    config = ModelConfig(**fields)
    config.check()
    return build_spec(config, vocab_size=100, max_positions=32)


def only_layer(spec: ModelSpec) -> Layer:
    ((_, (layer,)),) = spec.layers
    return layer


def test_gpt3_is_gpt3():
    norm = Norm("layer", 1e-5, bias=True)
    assert build(family="gpt3", depth=3, width=24, heads=4) == ModelSpec(
        vocab_size=100,
        width=24,
        max_positions=32,
        layers=(
            (3, (Layer(Attention(4, 4, 6, True, True), Mlp(96, "gelu_tanh", bias=True), norm),)),
        ),
        final_norm=norm,
        learned_positions=True,
        tied=True,
    )


def test_llama_is_llama():
    norm = Norm("rms", 1e-6)
    mixer = Attention(4, 4, 6, rotary=Rotary(10_000.0, 1.0, "half"))
    assert build(family="llama", depth=3, width=24, heads=4) == ModelSpec(
        vocab_size=100,
        width=24,
        max_positions=32,
        layers=((3, (Layer(mixer, Mlp(64, "silu", gated=True), norm),)),),
        final_norm=norm,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_config_reaches_the_spec(family):
    fields = {
        "depth": 3,
        "width": 40,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 16,
        "mlp_width": 72,
        "vocab_size": 130,
        "max_positions": 77,
        "qk_norm": True,
    }
    for name in FAMILIES[family].without:
        with pytest.raises(UserError, match=f"model.{name} is nothing that {family} has"):
            build(family=family, **fields)
        del fields[name]
    for tied in (True, False):
        spec = build(family=family, tied=tied, **fields)
        for layer in spec.each_layer():
            mixer = layer.mixer
            found = {
                "depth": spec.depth,
                "width": spec.width,
                "heads": mixer.heads,
                "kv_heads": getattr(mixer, "kv_heads", None),
                "head_dim": mixer.head_dim,
                "mlp_width": mlp_width(layer.mlp),
                "vocab_size": spec.vocab_size,
                "max_positions": spec.max_positions,
                "qk_norm": getattr(mixer, "qk_norm", None) is not None,
            }
            assert {name: found[name] for name in fields} == fields
        assert spec.tied is tied


def mlp_width(mlp: Mlp | Experts) -> int:
    """Of experts that of one; beside a shared one, of all that read a token."""
    if isinstance(mlp, Mlp):
        return mlp.width
    shared = mlp.shared
    return mlp.expert.width if shared is None else mlp.top_k * mlp.expert.width + shared.width


def test_the_fields_of_experts_reach_the_spec():
    fields = {"experts": 6, "experts_per_token": 3, "router_bias": True}
    spec = build(family="mixtral", depth=1, width=24, heads=4, mlp_width=10, **fields)
    expert = Mlp(10, "silu", gated=True)
    assert only_layer(spec).mlp == Experts(expert, 6, 3, choice_bias=True)


def test_every_second_layer_of_a_gpt3_may_be_banded():
    spec = build(family="gpt3", depth=5, width=24, heads=4, window=7)
    ((twice, (dense, banded)), last) = spec.layers
    assert (twice, last) == (2, (1, (dense,)))
    assert (dense.mixer.window, banded.mixer.window) == (None, 7)
    assert dataclasses.replace(banded, mixer=dense.mixer) == dense


def test_what_a_published_size_has_of_its_own():
    spec = build(family="opt", size="350m", depth=2)
    assert (spec.embedding_width, spec.final_norm, spec.each_layer()[0].arrangement) == (
        512,
        None,
        "post_norm",
    )
    assert build(family="falcon", size="40b").each_layer()[0].mixer.kv_heads == 8
    assert build(family="falcon", size="40b", kv_heads=4).each_layer()[0].mixer.kv_heads == 4


def test_a_size_and_changes_to_it_combine():
    spec = build(family="llama", size="7b", depth=2, kv_heads=8)
    assert (spec.depth, spec.width, only_layer(spec).mlp.width) == (2, 4096, 11008)
    assert (only_layer(spec).mixer.heads, only_layer(spec).mixer.kv_heads) == (32, 8)


def test_llama_s_mlp_width_is_the_published_one_at_every_size_it_is_rounded_for():
    """8/3 of the width, rounded up; the papers round to 256, so only these agree."""
    assert only_layer(build(family="llama", depth=1, width=4096, heads=32)).mlp.width == 10944
    for size in ("7b", "13b", "33b", "65b"):
        _, width, _, mlp_width = llama.SIZES[size]
        assert 0 <= mlp_width - 8 * width / 3 < 256, size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "7"}, "model.size '7' is not a size of llama: choose one of 7b, 13b"),
        ({"family": "gpt3", "size": "7b"}, "is not a size of gpt3"),
        ({"depth": 2, "width": 24}, "model.heads is missing"),
        ({"depth": 0, "width": 24, "heads": 4}, "model.depth must be at least 1, not 0"),
        ({"size": "7b", "vocab_size": -1}, "model.vocab_size must be at least 1, not -1"),
        ({"depth": 2, "width": 25, "heads": 4}, r"model.width \(25\) is not a multiple of"),
        (
            {"depth": 2, "width": 24, "heads": 4, "kv_heads": 3},
            r"heads \(4\) must be a multiple of kv_heads \(3\)",
        ),
        (
            {"depth": 2, "width": 24, "heads": 4, "experts": 8},
            "model.experts is nothing that llama has: leave it out, or choose .* or mixtral",
        ),
        ({"depth": 2, "width": 12, "heads": 4}, "even number of rotated elements"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        build(**fields)


def test_published_sizes_are_all_possible():
    for family, sizes in ((f.name, f.sizes) for f in FAMILIES.values()):
        for size in sizes:
            build(family=family, size=size)
    assert gpt3.SIZES["175b"] == (96, 12288, 96)
