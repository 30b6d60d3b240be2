"""A config.json that is wrong in any one field is refused by a sentence that names it."""

import copy
import json

import pytest

from instar.errors import UserError
from instar.families import deepseek_v3, gpt3, llama
from instar.families.hub_config import HubConfig
from instar.families.registry import FAMILIES
from instar.models.rotary import LinearScaling, Llama3Scaling, Rotary, Yarn

SMALL = {"depth": 2, "width": 32, "heads": 4, "mlp_width": 128, "vocab_size": 13}
# Those whose classes have a head of their own in any case.
UNTIED = {"gptj", "moss", "chatglm", "chatglm1"}
HUBS = {name: family for name, family in FAMILIES.items() if family.hub}


def written(name: str) -> dict:
    family = HUBS[name]
    return json.loads(json.dumps(family.hub.write_config(family.build(**SMALL))))


def read(name: str, fields: dict):
    return HUBS[name].hub.read_config(HubConfig(fields, "config.json"))


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_written_config_reads_back_as_the_same_spec(name, tied):
    family = HUBS[name]
    for options in ({}, {"max_positions": 99, "head_dim": 8}):
        spec = family.build(**SMALL, tied=tied, **options)
        if tied and name in UNTIED:
            with pytest.raises(UserError, match=r"of its own|tie_word_embeddings"):
                read(name, family.hub.write_config(spec))
            continue
        fields = json.loads(json.dumps(family.hub.write_config(spec)))
        assert read(name, fields) == spec


WRONG = [None, "x", -1, 0, 1.5, 10**400, True, [], {}, [3], {"rope_type": "yarn"}, float("nan")]
# What a field may be besides what it was: the default that stands for its absence, or a value with
# which the model is another one.
SAME_TYPE = {bool: {bool}, int: {int}, float: {int, float}, str: {str}, dict: {dict}}
SAME_TYPE |= {type(None): {int, float, bool}, list: {list}}


@pytest.mark.parametrize("name", HUBS)
def test_any_one_field_wrong_is_a_sentence_or_another_model(name):
    whole = written(name)
    for field in whole:
        for value in WRONG:
            fields = copy.deepcopy(whole) | {field: value}
            try:
                spec = read(name, fields)
                spec.check()
            except UserError as error:
                assert len(str(error).splitlines()) == 1
                continue
            # It was taken for what it is: a missing field, or one of the right type.
            if value is None:
                fields.pop(field)
                assert read(name, fields) == spec
            elif value != whole[field] and field not in ("rope_scaling",):
                allowed = SAME_TYPE[type(whole[field])]
                assert type(value) in allowed, (field, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, r"config\.json: hidden_size is missing"),
        ({"hidden_size": "12"}, r"hidden_size must be a whole number of at least 1, not '12'"),
        ({"hidden_size": 13, "head_dim": None}, r"hidden_size \(13\) is not a multiple of 4 heads"),
        ({"hidden_act": "gelu"}, r"hidden_act must be one of silu, swish, not 'gelu'"),
        ({"pretraining_tp": 2}, r"pretraining_tp is 2, and only 1 is supported"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps must be a finite number above 0"),
        (
            {"rope_parameters": {"rope_type": "dynamic"}},
            r"rope_parameters\.rope_type must be one of",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_parameters\.original_max_position_embeddings is missing",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1}},
            r"rope_parameters\.beta_slow \(1\.0\) must be below beta_fast \(1\.0\)",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            r"config\.json: rope_parameters\.factor is missing",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            r"low_freq_factor \(4\.0\) must be below high_freq_factor",
        ),
    ],
)
def test_what_a_llama_may_not_say(change, message):
    with pytest.raises(UserError, match=message):
        read("llama", written("llama") | change)


def test_the_rotary_positions_of_older_configs():
    fields = written("llama")
    del fields["rope_parameters"]
    linear = fields | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}
    rotary = read("llama", linear).each_layer()[0].mixer.rotary
    assert rotary == Rotary(5e5, scaling=LinearScaling(4.0))
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rotary = read("llama", fields | {"rope_scaling": scaling}).each_layer()[0].mixer.rotary
    assert rotary == Rotary(1e4, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))


DEEPSEEK = {
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def test_the_published_config_of_deepseek_v3():
    spec = read("deepseek_v3", DEEPSEEK)
    built = deepseek_v3.deepseek_v3(
        depth=61,
        width=7168,
        heads=128,
        mlp_width=18432,
        max_positions=163_840,
        rotary=Rotary(style="interleaved", scaling=Yarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0)),
        **deepseek_v3.VARIANTS["671b"],
    )
    assert spec == built
    # What its code multiplies logits by: 192^-0.5 (0.1 ln 40 + 1)^2; and nothing else grows.
    mixer = spec.each_layer()[0].mixer
    assert mixer.scale == pytest.approx(0.1352337788608801, rel=1e-12)
    assert mixer.rotary.scaling.magnitude == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_method": "greedy"}, "topk_method is 'greedy', and only 'noaux_tc' is supported"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8, and only 128 is supported"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be .* of at least 0, not -1"),
        ({"n_group": 7}, "256 experts do not make 7 groups of the same size"),
        ({"topk_group": 9}, r"top_groups \(9\) must be at least 1 and at most"),
        ({"n_group": 128, "topk_group": 3}, r"top_k \(8\) exceeds the 6 experts of 3 groups"),
        ({"qk_rope_head_dim": 63}, "even number of rotated elements"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is of a kind that no"),
    ],
)
def test_what_a_deepseek_may_not_say(change, message):
    with pytest.raises(UserError, match=message):
        read("deepseek_v3", DEEPSEEK | change).check()


def test_gpt2_refuses_what_it_does_not_compute():
    fields = gpt3.write_config(gpt3.gpt3(**SMALL)) | {"scale_attn_by_inverse_layer_idx": True}
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx is True"):
        read("gpt3", fields)


def test_llama_3_1_s_scaling_is_known_by_its_divisors():
    """llama.cpp stores what the frequencies are divided by; it comes from theta and the scaling."""
    for scaling in llama.PUBLISHED_SCALINGS:
        theta, size = 5e5, 64
        plain = llama.frequencies_of(Rotary(theta), size)
        divisors = plain / llama.frequencies_of(Rotary(theta, scaling=scaling), size)
        assert llama.published_scaling(theta, divisors, "x.gguf") == scaling
        with pytest.raises(UserError, match=r"x\.gguf: rope_freqs\.weight"):
            llama.published_scaling(theta, divisors * 1.1, "x.gguf")
