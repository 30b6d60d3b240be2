"""Specs that cannot be are refused before anything is built."""

import dataclasses

import pytest
from examples import GPT, LLAMA, MIXED, with_mixer

from instar.errors import UserError
from instar.models.language_model import LanguageModel
from instar.models.spec import Mlp, ModelSpec, Rotary


def with_mlp(spec: ModelSpec, mlp: Mlp) -> ModelSpec:
    ((repeat, (layer,)),) = spec.layers
    return spec.replace(layers=((repeat, (dataclasses.replace(layer, mlp=mlp),)),))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (GPT.replace(vocab_size=0), "must each be at least 1"),
        (GPT.replace(layers=()), "needs at least one layer"),
        (GPT.replace(layers=((0, GPT.layers[0][1]),)), "repeated at least 1"),
        (MIXED.replace(layers=((0, MIXED.layers[0][1]), MIXED.layers[1])), "repeated at least 1"),
        (MIXED.replace(layers=((3, ()), MIXED.layers[1])), "needs at least one layer"),
        (with_mixer(LLAMA, kv_heads=4), "multiple of kv_heads"),
        (with_mixer(LLAMA, head_dim=0), "must each be at least 1"),
        (with_mixer(LLAMA, head_dim=5), "even number of rotated elements"),
        (with_mixer(LLAMA, rotary=Rotary(fraction=0.25)), "gives 2.5"),
        (with_mixer(LLAMA, rotary=Rotary(fraction=0.0)), "even number of rotated elements"),
        (with_mixer(LLAMA, window=0), "window must be at least 1, not 0"),
        (with_mlp(LLAMA, Mlp(0, "silu")), "mlp width must be at least 1, not 0"),
    ],
)
def test_impossible_specs(spec, message):
    with pytest.raises(UserError, match=message):
        LanguageModel(spec)


def test_layers_run_in_the_order_of_the_program():
    (two, (a, b)), (one, (c,)) = MIXED.layers
    assert (two, one) == (2, 1)
    assert MIXED.each_layer() == (a, b, a, b, c) and MIXED.depth == 5
