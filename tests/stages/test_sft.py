"""`instar sft`: from a model and prepared dialogues to one that answers, by the real commands."""

import dataclasses
import json
import math
import pathlib
import random
import shutil

import numpy as np
import pytest
from runs import final_fingerprint, instar, logged, losses

from instar import load
from instar.config import load as config_of
from instar.data.dataset import TokenDataset
from instar.data.rows import TrainingRows, assemble
from instar.errors import UserError
from instar.generation.sampling import SamplingConfig
from instar.interchange.loading import open_model
from instar.interchange.model import Model
from instar.interchange.reward import encoder_of
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.stages.reward_config import NormaliseConfig
from instar.stages.reward_normalise import sampler
from instar.stages.sft import SftConfig, count_steps

DATA_CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict(dict(
        sources=(
            dict(name="chats", kind="jsonl", path={path!r}, dialogue="messages"),
            dict(name="tales", kind="jsonl", path={tales!r}),
        ),
        tokenizer=dict(path={tokenizer!r}),
        chat_template="chatml",
        sequence_lengths=(48,),
        held_out=0.1,
    ))
"""
RUN_CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict(dict(
        parent={parent!r},
        data=dict(path={path!r}, sequence_length=48, weights=dict(chats=0.9, tales=0.1)),
        batch=dict(size=8),
        steps=200,
        dropout=0.05,
        optimizer=dict(learning_rate=2e-2),
        schedule=dict(kind="linear", warmup_steps=2),
        checkpoint=dict(minutes=None, keep_steps=100),
        evaluation=dict(every=200, rows=8, prompts=("go on",), sampling=dict(max_new_tokens=4)),
    ))
"""


@pytest.fixture(scope="module")
def parent(tmp_path_factory, run_config) -> pathlib.Path:
    """A pretrained model with room for dialogues."""
    folder = tmp_path_factory.mktemp("parent")
    # Longer positions than it was trained on: they are rotary.
    words = ("--config.model.max_positions=64", "--config.steps=4")
    done = instar("pretrain", "--config", run_config, "--workdir", folder, *words)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tiny_data) -> pathlib.Path:
    """Dialogues in which the answer is always the same."""
    folder, rng = tmp_path_factory.mktemp("chats"), random.Random(0)
    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(300):
            asked = " ".join(rng.choices("what was the film about".split(), k=3))
            turns = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": "a quiet story"},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    config = folder / "data.py"
    config.write_text(
        DATA_CONFIG.format(
            path=str(folder / "chats.jsonl"),
            tales=str(tiny_data.parent / "tales.jsonl"),
            tokenizer=str(tiny_data / "tokenizer"),
        )
    )
    done = instar("prepare", "--config", config, "--workdir", folder / "data")
    assert done.returncode == 0, done.stderr
    return folder / "data"


@pytest.fixture(scope="module")
def config(parent, chats) -> pathlib.Path:
    path = chats.parent / "sft.py"
    path.write_text(RUN_CONFIG.format(parent=str(parent), path=str(chats)))
    return path


@pytest.fixture(scope="module")
def tuned(config) -> pathlib.Path:
    folder = config.parent / "tuned"
    done = instar("sft", "--config", config, "--workdir", folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").stat().st_size > 0
    return folder


def loss_of(model: Model, batch: dict) -> float:
    """The mean loss over the targets of some rows, in NumPy from the logits on."""
    places = {name: batch[name] for name in ("positions", "segment_ids")}
    logits = np.float64(model.language_model.logits(model.params, batch["tokens"], **places))
    log_probs = logits - logits.max(-1, keepdims=True)
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, batch["targets"][..., None].astype(int), -1)[..., 0]
    return -(chosen * batch["weights"]).sum() / batch["weights"].sum()


def test_it_begins_with_the_parents_parameters(tuned, parent, chats, config):
    """The loss of the first step is the parent's, over what the assistant says and the tales."""
    model = load(parent)
    rows = TrainingRows(
        TokenDataset.open(chats),
        sequence_length=48,
        weights={"chats": 0.9, "tales": 0.1},
        seed=0,
    )
    done = instar(
        *("sft", "--config", config, "--workdir", config.parent / "once"),
        *("--config.steps=1", "--config.dropout=0", "--config.schedule.warmup_steps=0"),
    )
    assert done.returncode == 0, done.stderr
    expected = loss_of(model, rows.rows(np.arange(8)))
    assert losses(config.parent / "once")[1] == pytest.approx(expected, rel=1e-5)


def test_the_held_out_loss_is_that_of_the_dialogues(tuned, chats):
    """Beside which the tales, of which there are more held-out rows, would be nearly all of it."""
    dataset = TokenDataset.open(chats)
    kept = {name: source.pack_index("held_out", 48) for name, source in dataset.sources.items()}
    assert kept["tales"].rows > kept["chats"].rows
    rows = np.linspace(0, kept["chats"].rows - 1, 8).round().astype(int)  # evaluation.rows
    batch = assemble(dataset.sources["chats"], kept["chats"], rows, 48, dataset.tokenizer.pad_id)
    expected = loss_of(load(tuned), batch)
    (line,) = logged(tuned, "eval/loss")
    assert line["eval/loss"] == pytest.approx(expected, rel=1e-4)


def test_epochs_count_the_dialogues_beside_which_text_is_read(config, chats):
    config = config_of(str(config), [("steps", "None"), ("epochs", "2.5")], SftConfig)
    rows = TokenDataset.open(chats).sources["chats"].pack_index("train", 48).rows
    # Of ten rows nine are dialogues; a batch has eight.
    assert count_steps(config, TokenDataset.open(chats)) == math.ceil(2.5 * rows / 0.9 / 8)
    assert count_steps(dataclasses.replace(config, steps=7), TokenDataset.open(chats)) == 7
    with pytest.raises(UserError, match="epochs must be positive"):
        config_of(str(chats.parent / "sft.py"), [("epochs", "0")], SftConfig)


def test_the_model_learns_to_answer_and_to_stop(tuned):
    before, after = losses(tuned)[1], losses(tuned)[200]
    assert after < before / 2
    model = load(tuned)
    greedy = SamplingConfig(max_new_tokens=24, temperature=0)
    (answer,) = model.generate([[{"role": "user", "content": "the film was"}]], sampling=greedy)
    assert (answer.text, answer.reason) == ("a quiet story", "stop")
    done = instar(*("generate", "--model", tuned, "--chat=true", "--temperature=0", "the film was"))
    assert json.loads(done.stdout)["completion"] == "a quiet story", done.stderr


def test_token_ids_and_an_export_end_where_a_dialogue_does(tuned, tmp_path):
    """Neither knows of the template, so the card has to say that its end token is one."""
    model = load(tuned)
    ends = [model.tokenizer.eos_id, model.tokenizer.token_id("<|im_end|>")]
    ids = model.encode_chat([{"role": "user", "content": "the film was"}], model.chat_template())
    greedy = SamplingConfig(max_new_tokens=24, temperature=0)
    (answer,) = model.generate([ids], sampling=greedy)
    assert (answer.text, answer.reason) == ("a quiet story", "stop")
    done = instar("export", "--checkpoint", tuned, "--to", tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    exported = json.loads((tmp_path / "folder/generation_config.json").read_text())
    assert exported["eos_token_id"] == ends


def test_samples_for_a_reward_model_end_with_its_template_s_token(tuned, tmp_path):
    """Though the card of the policy does not name it, as that of a pretrained one does not."""
    opened = open_model(str(tuned))
    policy = dataclasses.replace(opened, card=dataclasses.replace(opened.card, stop_ids=()))
    encoder = encoder_of(policy.card)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film was"}\n')
    greedy = SamplingConfig(max_new_tokens=24, temperature=0)
    config = NormaliseConfig("samples", str(tmp_path / "prompts.jsonl"), str(tuned), greedy)
    texts = sampler(config, policy, encoder, make_mesh(MeshConfig()), 64, seed=0)
    assert texts() == [encoder.whole("the film was", "a quiet story")]


def test_its_lineage_holds_the_parents(tuned, parent):
    lineage = json.loads((tuned / "checkpoints/200/lineage/lineage.json").read_text())
    above = json.loads((parent / "checkpoints/4/lineage/lineage.json").read_text())
    assert lineage["stage"] == "sft"
    assert lineage["parent"] == above | {"path": str((parent / "checkpoints/4").resolve())}


def test_it_goes_on_where_it_was_though_its_parent_moved_on(tuned, parent, config, tmp_path):
    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/200")
    # The parent's run has another checkpoint by now, and not the one that was read any more.
    checkpoints, newer = parent / "checkpoints", parent / "checkpoints/5"
    (checkpoints / "4").rename(newer)
    lineage = newer / "lineage/lineage.json"
    text = lineage.read_text()
    lineage.write_text(json.dumps(json.loads(text) | {"step": 5, "params": "f" * 64}))
    try:
        done = instar("sft", "--config", config, "--workdir", tmp_path)
    finally:
        lineage.write_text(text)
        newer.rename(checkpoints / "4")
    assert done.returncode == 0, done.stderr
    assert "resumed from the checkpoint of step 100" in done.stderr
    assert losses(tmp_path) == losses(tuned)
    assert final_fingerprint(tmp_path, 200) == final_fingerprint(tuned, 200)
    of_both = [folder / "checkpoints/200/lineage/lineage.json" for folder in (tmp_path, tuned)]
    assert of_both[0].read_text() == of_both[1].read_text()


@pytest.mark.exhaustive
def test_an_exported_model_is_a_parent_as_well(tuned, config, tmp_path):
    done = instar("export", "--checkpoint", tuned, "--to", tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    # A folder's tokenizer.json reads the same text as other bytes; the data goes by its digest.
    data = config.parent / "data.py"
    done = instar(
        *("prepare", "--config", data, "--workdir", tmp_path / "data"),
        f"--config.tokenizer.path={tmp_path / 'folder/tokenizer.json'}",
    )
    assert done.returncode == 0, done.stderr
    done = instar(
        *("sft", "--config", config, "--workdir", tmp_path / "run", "--config.steps=3"),
        *(f"--config.parent={tmp_path / 'folder'}", f"--config.data.path={tmp_path / 'data'}"),
    )
    assert done.returncode == 0, done.stderr
    lineage = json.loads((tmp_path / "run/checkpoints/3/lineage/lineage.json").read_text())
    assert lineage["parent"]["stage"] == "import"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.parent=gone", "parent gone does not exist: name a run's folder"),
        ("--config.parent={texts}", "data is a prepared data set, not a model: name a run's"),
        ("--config.data.path={texts}", "holds no dialogues"),
        ("--config.data.sequence_length=65", "exceeds the model's 64 positions"),
        (f"--config.evaluation.prompts.0={'what was said ' * 9}", "evaluation.prompts"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    config, tiny_data, tmp_path, change, message
):
    change = change.format(texts=tiny_data)
    done = instar("sft", "--config", config, "--workdir", tmp_path / "run", change)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_parent_with_another_tokenizer_is_refused(config, chats, parent, tmp_path):
    done = instar(
        *("prepare", "--config", config.parent / "data.py", "--workdir", tmp_path / "data"),
        *("--config.tokenizer.path=None", "--config.tokenizer.vocab_size=330"),
    )
    assert done.returncode == 0, done.stderr
    words = ("sft", "--config", config, "--workdir", tmp_path / "run")
    done = instar(*words, f"--config.data.path={tmp_path / 'data'}")
    assert done.returncode == 2 and "was prepared with the tokenizer" in done.stderr


def test_a_parent_of_a_wrong_stage_is_refused(config, parent, tmp_path):
    shutil.copytree(parent, tmp_path / "parent")
    path = tmp_path / "parent/checkpoints/4/lineage/lineage.json"
    path.write_text(path.read_text().replace('"pretrain"', '"reward"'))
    words = ("sft", "--config", config, "--workdir", tmp_path / "run")
    done = instar(*words, f"--config.parent={tmp_path / 'parent'}")
    assert done.returncode == 2 and "comes from stage reward" in done.stderr
