"""Where a model comes from: what a run holds on to, and the tree that `instar lineage` prints."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interchange_examples import make_model

from instar import cli
from instar.errors import UserError
from instar.interchange.convert import write_hub_folder
from instar.interchange.loading import open_model
from instar.interchange.parameters import flatten
from instar.interchange.parents import pin
from instar.interchange.sources import PIECE_BYTES, PIECES, digest_of_files
from instar.models.language_model import LanguageModel
from instar.sharding.mesh import MeshConfig, make_mesh

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of transformers', `hub`, and the checkpoint that it was imported as, `run`."""
    folder, model = tmp_path_factory.mktemp("made"), make_model("llama")
    read = flatten(model.params).__getitem__
    write_hub_folder(
        model.card, lambda path: np.asarray(read(path)), folder / "hub", np.dtype("f4")
    )
    assert cli.main(["import", "--from", str(folder / "hub"), "--to", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "a")
    return tmp_path / "a"


def checkpoint(run: Path, step: int, source: Path, **lineage: object) -> Path:
    """A checkpoint like that of `source`, with changes to its lineage."""
    target = run / "checkpoints" / str(step)
    shutil.copytree(source / "checkpoints/0", target)
    path = target / "lineage/lineage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": step} | lineage))
    return target


def read(opened) -> None:
    opened.read(LanguageModel(opened.card.spec), jnp.dtype("float32"), MESH)


# --- What a run holds on to ---------------------------------------------------------------------


def test_the_parent_stays_the_one_that_was_read(folder, tmp_path):
    run, work = folder / "run", tmp_path / "work"
    first = pin(work, "parent", run)
    assert not work.exists()
    # Not read yet: nothing is held on to.
    newer = checkpoint(run, 5, run, params="f" * 64)
    assert pin(work, "parent", run).lineage["path"] == str(newer)
    read(first)
    again = pin(work, "parent", run)
    assert again.lineage["path"] == str(run / "checkpoints/0")
    read(again)
    # Another role is another model's.
    assert pin(work, "reward", run).lineage["path"] == str(newer)
    # It is known again where it was moved to.
    moved = tmp_path / "moved"
    run.rename(moved)
    assert pin(work, "parent", moved).lineage["path"] == str(moved / "checkpoints/0")


def test_a_model_that_is_gone_is_missed_only_where_it_is_needed(folder, tmp_path):
    run, work = folder / "run", tmp_path / "work"
    opened = pin(work, "reward", run)
    read(opened)
    own = checkpoint(work, 3, run, stage="ppo", reward=opened.lineage)
    shutil.copytree(own, work / "checkpoints/4")
    shutil.rmtree(work / "checkpoints/4/lineage")  # a damaged one says nothing
    (work / "parents.json").unlink()  # its own checkpoint says the same
    shutil.rmtree(run / "checkpoints/0")
    message = f"reward {opened.lineage['path']} is gone, or no longer the model with"
    with pytest.raises(UserError, match=message):
        pin(work, "reward", run)
    again = pin(work, "reward", run, needed=False)
    assert again.lineage == opened.lineage and again.card.spec == opened.card.spec
    with pytest.raises(UserError, match=message):
        read(again)


def test_a_parent_that_is_gone_before_the_first_checkpoint_is_missed(folder, tmp_path):
    read(pin(tmp_path / "work", "parent", folder / "run"))
    shutil.rmtree(folder / "run/checkpoints/0")
    with pytest.raises(UserError, match="is gone, or no longer the model with"):
        pin(tmp_path / "work", "parent", folder / "run", needed=False)


def test_another_model_in_its_place_is_not_taken_for_it(folder, tmp_path):
    hub, work = folder / "hub", tmp_path / "work"
    read(pin(work, "parent", hub))
    assert pin(work, "parent", hub).lineage["stage"] == "import"
    weights = hub / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="no longer the model"):
        pin(work, "parent", hub)


def test_of_large_files_pieces_from_all_over_are_digested(tmp_path):
    size = PIECES * PIECE_BYTES * 3
    path = tmp_path / "model.gguf"
    content = bytearray(size)
    path.write_bytes(content)
    before = digest_of_files(path)
    assert digest_of_files(path.rename(tmp_path / "renamed.gguf")) == before
    # What one of the last pieces holds counts.
    content[size - 3 * PIECE_BYTES] = 1
    path.write_bytes(content)
    assert digest_of_files(path) != before
    path.write_bytes(bytes(size + 1))
    assert digest_of_files(path) != before


# --- The tree -----------------------------------------------------------------------------------


@pytest.fixture
def family(folder) -> Path:
    """Imported, fine-tuned, and a policy that knows a reward model besides: made by hand."""
    imported = open_model(folder / "run").lineage
    tuned = checkpoint(folder / "sft", 7, folder / "run", stage="sft", parent=imported, tokens=1234)
    config = {
        "data": {"path": "nowhere", "sequence_length": 16},
        "steps": 9,
        "dropout": 0.0,
        "kl": {"coefficient": 0.05},
        "optimizer": {"name": "adamw", "learning_rate": 0.002, "b1": 0.9},
    }
    (tuned / "config").mkdir()
    (tuned / "config/config.json").write_text(json.dumps(config))
    lines = [
        {"step": 3, "eval/loss": 2.5, "eval/accuracy": 0.25},
        {"step": 7, "loss": 2.0},
        {"step": 7, "eval/loss": "nan"},
        {"step": 9, "eval/loss": 1.0},
    ]
    log = folder / "sft/metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward = imported | {"stage": "reward", "path": "/gone/reward", "params": "e" * 64}
    above = open_model(folder / "sft").lineage
    checkpoint(folder / "ppo", 2, folder / "run", stage="ppo", parent=above, reward=reward)
    return folder


def printed(capsys, *words: object) -> str:
    assert cli.main(["lineage", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_tree_as_json(family, capsys):
    tree = json.loads(printed(capsys, "--json=true", family / "ppo"))
    assert (tree["stage"], tree["step"]) == ("ppo", 2)
    assert set(tree["ancestors"]) == {"parent", "reward"}
    tuned = tree["ancestors"]["parent"]
    assert (tuned["stage"], tuned["step"], tuned["tokens"], tuned["gone"]) == ("sft", 7, 1234, None)
    # Not the line after its step, and of each metric the last.
    assert tuned["evaluations"] == {
        "eval/loss": {"value": "nan", "step": 7},
        "eval/accuracy": {"value": 0.25, "step": 3},
    }
    assert tuned["config"]["optimizer"]["b1"] == 0.9
    spec = open_model(family / "run").card.spec
    assert tuned["model"]["layers"] == spec.depth and tuned["model"]["width"] == spec.width
    count = sum(leaf.size for leaf in jax.tree.leaves(LanguageModel(spec).shapes))
    assert tuned["model"]["parameters"] == count
    imported = tuned["ancestors"]["parent"]
    assert Path(imported["source"]).name == "hub" and imported["path"].endswith("checkpoints/0")
    stored = json.loads((family / "run/checkpoints/0/lineage/lineage.json").read_text())
    assert imported["params"] == stored["params"]
    reward = tree["ancestors"]["reward"]
    assert "/gone/reward does not exist" in reward["gone"] and reward["params"] == "e" * 64


def test_the_tree_as_text(family, capsys):
    shutil.rmtree(family / "run/checkpoints/0")
    lines = printed(capsys, family / "ppo").splitlines()
    text = "\n".join(lines)
    assert lines[0].startswith("ppo, step 2")
    assert any(line.startswith("├─ parent: sft, step 7, 1,234 tokens") for line in lines)
    assert any(line.startswith("│  └─ parent: import, step 0") for line in lines)
    assert any(line.startswith("└─ reward: reward") for line in lines)
    # What is on, of the shared sections the main values, and all of the stage's own.
    assert (
        "steps 9; data.sequence_length 16; optimizer.name adamw; optimizer.learning_rate 0.002; "
        "kl.coefficient 0.05\n"
    ) in text
    assert "loss nan (step 7); accuracy 0.25 (step 3)" in text
    assert text.count("nothing of it can be read any more") == 2


def test_another_model_in_an_ancestors_place_is_told(family, capsys):
    path = family / "sft/checkpoints/7/lineage/lineage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"params": "d" * 64}))
    tuned = json.loads(printed(capsys, "--json=true", family / "ppo"))["ancestors"]["parent"]
    assert "another model lies there now (dddddddddddd)" in tuned["gone"] and not tuned["config"]


def test_models_of_others_have_one_too(family, capsys):
    text = printed(capsys, family / "hub")
    assert text.startswith("import\n") and digest_of_files(family / "hub")[:12] in text
    assert cli.main(["lineage", str(family / "none")]) == 2
    assert cli.main(["lineage"]) == 2
    assert "lineage needs the path of one model" in capsys.readouterr().err
