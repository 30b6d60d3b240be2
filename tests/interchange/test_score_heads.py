"""Reward models in and out as classifiers with one label: nothing is lost, their bias included."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from examples import random_params, telling
from interchange_examples import SPECS, make_model, tokenizer

import instar
from instar import cli
from instar.data.chat import ChatTemplate
from instar.errors import UserError
from instar.interchange import safetensors
from instar.interchange.card import ModelCard
from instar.interchange.convert import write_hub_folder
from instar.interchange.parameters import flatten
from instar.interchange.reward import LoadedRewardModel
from instar.models.reward_model import RewardModel
from instar.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.smoke

PROMPTS, COMPLETIONS = ["A fisherman", "hello", ""], [" lived by the sea.", "", " world world"]


def make_judge(name: str) -> LoadedRewardModel:
    """A reward model of one network, whose score has a bias."""
    model = RewardModel(SPECS[name])
    params = {"member_0": random_params(model.model, 1)}
    card = dataclasses.replace(make_model(name).card, spec=model.spec, members=1)
    return LoadedRewardModel(card, model, params, make_mesh(MeshConfig(), jax.devices()[:1]))


def write_folder(judge: LoadedRewardModel, folder: Path) -> Path:
    read = flatten(judge.params["member_0"]).__getitem__
    write_hub_folder(judge.card, lambda path: np.asarray(read(path)), folder, np.dtype("f4"))
    return folder


def run(capsys, *words: object) -> tuple[int, str]:
    code = cli.main([str(word) for word in words])
    return code, capsys.readouterr().err


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(make_judge("llama"), tmp_path / "folder")


def change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", telling(SPECS, ("llama", "mistral", "deepseek_v3")))
def test_in_and_out_and_in_again_is_the_same_reward_model_bit_for_bit(name, tmp_path, capsys):
    judge = make_judge(name)
    write_folder(judge, tmp_path / "folder")
    assert run(capsys, "import", "--from", tmp_path / "folder", "--to", tmp_path / "ours")[0] == 0
    words = ("export", "--checkpoint", tmp_path / "ours", "--to", tmp_path / "back")
    assert run(capsys, *words)[0] == 0
    for place in ("folder", "ours", "back"):
        again = instar.load(tmp_path / place)
        jax.tree.map(np.testing.assert_array_equal, again.params, judge.params)
        assert (again.card.members, again.spec.output) == (1, "scalar")
    again, expected = (each.score(PROMPTS, COMPLETIONS) for each in (again, judge))
    np.testing.assert_array_equal(again, expected)
    assert len(set(expected.tolist())) == 3


def test_what_the_folder_says(folder):
    config = json.loads((folder / "config.json").read_text())
    params = make_judge("llama").params["member_0"]
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["model_type"], config["id2label"]) == ("llama", {"0": "score"})
    assert config["score_bias"] == float(params["score_head"]["bias"][0]) != 0
    assert config["pad_token_id"] == tokenizer().pad_id
    stored = safetensors.open_folder(folder)
    np.testing.assert_array_equal(stored["score.weight"].read(), params["score_head"]["kernel"].T)
    assert not {name for name in stored if "bias" in name or "lm_head" in name}


def test_texts_that_end_with_the_padding_have_none_for_transformers(tmp_path):
    """It would take the end token for padding, and read the score before it."""
    judge = make_judge("gpt3")
    # As GPT-2's, whose only special token is both.
    own = tokenizer().__class__(judge.tokenizer.model)
    own.pad_id = own.eos_id
    plain = ChatTemplate.named("plain").source
    for template, pad in ((plain, None), (judge.card.chat_template, own.pad_id)):
        card = dataclasses.replace(judge.card, tokenizer=own, chat_template=template)
        folder = write_folder(dataclasses.replace(judge, card=card), tmp_path / str(pad))
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == pad


# --- What is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, "num_labels is 2, and a reward model gives one"),
        ({"id2label": None}, "num_labels is 2"),
        ({"id2label": None, "num_labels": 3}, "num_labels is 3"),
        (
            {"architectures": ["GPT2ForSequenceClassification"]},
            "only LlamaForCausalLM, LlamaForSeq",
        ),
        ({"score_bias": "much"}, "score_bias must be a finite number, not 'much'"),
        ({"score_bias": 1e39}, "score_bias must be a finite number, not 1e+39"),
        ({"architectures": ["LlamaForCausalLM"]}, "lacks the tensor lm_head.weight"),
        ({"tie_word_embeddings": True, "architectures": None}, "holds the tensor score.weight"),
    ],
)
def test_a_config_that_is_wrong(folder, capsys, fields, sentence):
    change(folder, **fields)
    code, err = run(capsys, "import", "--from", folder, "--to", folder.parent / "ours")
    assert code == 2 and sentence in err and err.count("\n") == 1
    assert not (folder.parent / "ours").exists()


def test_a_model_that_transformers_does_not_score_with_is_refused(tmp_path):
    judge = make_judge("llama")
    spec = instar.families.baichuan.baichuan(
        depth=1, width=24, heads=2, mlp_width=8, vocab_size=400, alibi=True
    )
    card = ModelCard(spec.replace(output="scalar"), members=1)
    with pytest.raises(UserError, match=r"LlamaForSequenceClassification.* its layers combine"):
        write_folder(dataclasses.replace(judge, card=card), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_reward_model_without_a_template_scores_no_texts(folder):
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="came without a chat template"):
        instar.load(folder).score(PROMPTS, COMPLETIONS)


def test_a_language_model_has_no_members(tmp_path, capsys):
    read = flatten(make_model("llama").params).__getitem__
    card = make_model("llama").card
    write_hub_folder(card, lambda p: np.asarray(read(p)), tmp_path / "folder", np.dtype("f4"))
    assert run(capsys, "import", "--from", tmp_path / "folder", "--to", tmp_path / "ours")[0] == 0
    words = ("export", "--checkpoint", tmp_path / "ours", "--to", tmp_path / "back", "--member=0")
    code, err = run(capsys, *words)
    assert code == 2 and "is a language model: leave --member out" in err
