"""`instar ppo`, by the real command: killed and gone on with, collapsing, refusing."""

import collections
import functools
import itertools
import json
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import environment, final_fingerprint, instar, logged, losses, write_config
from several import run_pair

from instar import load
from instar.errors import UserError
from instar.generation.sampling import SamplingConfig
from instar.interchange.convert import ExportOptions, export_model
from instar.schema import build
from instar.stages.ppo import ppo
from instar.stages.ppo_config import PpoConfig

STEPS = 6
# Its import path is what the config names. It returns fractions, which must stay what they are.
SCORERS = """
def short(prompts, completions, share):
    assert all(prompt.startswith("the") for prompt in prompts)
    return [share / (1 + len(text)) for text in completions]

def many(prompts, completions):
    return [text.count("e") / 8 for text in completions]
"""
REWARD = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(
        parent={parent!r}, chat_template="plain", batch=dict(size=8), steps=2, members=2,
        data=dict(path={path!r}, kind="pairs", completions=2, max_length=16),
        optimizer=dict(learning_rate=1e-2),
        logging=dict(tensorboard=False),
    ))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, finished_run) -> pathlib.Path:
    """Prompts, a scorer's module and a reward model of two members."""
    folder, rng = tmp_path_factory.mktemp("ppo"), random.Random(0)
    words = "film story quiet people what and why".split()
    for name, count in (("prompts", 20), ("held_out", 8)):
        lines = [
            {"prompt": "the " + " ".join(rng.choices(words, k=1 + i % 2))} for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = [
        {"prompt": "the", "chosen": f" {a}", "rejected": f" {b}"}
        for a, b in itertools.pairwise(words)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs * 4)))
    (folder / "tiny_scorers.py").write_text(SCORERS)
    config = folder / "reward.py"
    config.write_text(REWARD.format(parent=str(finished_run), path=str(folder / "pairs.jsonl")))
    done = instar("reward", "--config", config, "--workdir", folder / "reward")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def settings(folder, finished_run, tiny_data) -> dict:
    """A run with everything on: a reward model, ptx, an adaptive coefficient, a mean, alarms."""
    return {
        "parent": str(finished_run),
        "chat_template": "plain",
        "reward": {"model": str(folder / "reward")},
        "prompts": {
            "path": str(folder / "prompts.jsonl"),
            "held_out": str(folder / "held_out.jsonl"),
            "max_length": 8,
        },
        "response": {"max_new_tokens": 6, "temperature": 0.9},
        "batch": {"size": 8, "microbatch": 2},
        "steps": STEPS,
        "update": {
            "minibatch": 4,
            "epochs": 2,
            "adaptive_kl": {"target": 0.1, "horizon": 100.0},
            "ptx_coefficient": 1.0,
            "scores": {"eos_penalty": 0.5},
        },
        "optimizer": {"learning_rate": 1e-2},
        "critic": {"optimizer": {"learning_rate": 1e-2}},
        "ptx": {"data": {"path": str(tiny_data), "sequence_length": 16}, "rows": 4},
        "ema": 0.5,
        "gold": {"short": {"function": "tiny_scorers:short", "arguments": {"share": 0.5}}},
        "execution": {"loss_chunk": 2},
        # One that rings at once, and never clears.
        "alarms": {"baseline": 1, "window": 1, "kl": 1e-6},
        "evaluation": {"every": 4, "samples": 2},
        "checkpoint": {"minutes": None, "keep_steps": 1},
        "logging": {"tensorboard": False},
    }


def command(settings: dict, workdir: pathlib.Path) -> tuple[list[str], dict]:
    """The command of a run beside `workdir`'s own config file, and the environment."""
    config = write_config(workdir.parent / f"{workdir.name}.py", settings)
    path = pathlib.Path(settings["prompts"]["path"]).parent
    env = environment() | {"PYTHONPATH": str(path), "JAX_LOG_COMPILES": "1"}
    words = ["ppo", "--config", str(config), "--workdir", str(workdir)]
    return [sys.executable, "-m", "instar", *words], env


def run(settings: dict, workdir: pathlib.Path) -> subprocess.CompletedProcess:
    words, env = command(settings, workdir)
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False)


def stopped(settings: dict, workdir: pathlib.Path, number: int, lines: int, wait: float) -> None:
    """Starts the run and sends it a signal when it has written so many lines, and a while after."""
    words, env = command(settings, workdir)
    process = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)
    log = workdir / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines):
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(number)
    assert process.wait() == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143}[number]


@pytest.fixture(scope="module")
def alone(folder, settings) -> pathlib.Path:
    """A run that nothing interrupts."""
    done = run(settings, folder / "alone")
    assert done.returncode == 0, done.stderr
    (folder / "alone.stderr").write_text(done.stderr)
    return folder / "alone"


# --- A run --------------------------------------------------------------------------------------


def test_a_run_that_is_killed_and_stopped_goes_on_bit_for_bit(folder, settings, alone):
    """Networks, both optimisers, the coefficient, the mean, and the places in prompts and text."""
    workdir = folder / "killed"
    stopped(settings, workdir, signal.SIGKILL, 2, random.Random(1).uniform(0, 0.3))
    before = max(line["step"] for line in logged(workdir, "score"))
    assert 2 <= before < STEPS
    stopped(settings, workdir, signal.SIGTERM, before + 1, 0.0)
    done = run(settings, workdir)
    assert done.returncode == 0 and "resumed from the checkpoint" in done.stderr, done.stderr
    assert losses(workdir) == losses(alone)
    assert final_fingerprint(workdir, STEPS) == final_fingerprint(alone, STEPS)
    # The alarm rang before the kill, and does not ring again.
    assert "ALARM" not in done.stderr
    clock = {"time", "tokens_per_second", "mfu"}
    for found, expected in zip(logged(workdir, "score"), logged(alone, "score"), strict=True):
        assert {n: found[n] for n in found.keys() - clock} == {
            n: expected[n] for n in expected.keys() - clock
        }


def test_a_run_whose_prompts_have_changed_does_not_go_on(folder, settings, alone):
    shutil.copytree(alone, folder / "changed")
    for name in ("prompts", "held_out"):
        path = folder / f"{name}.jsonl"
        path.rename(folder / f"{name}.kept")
        path.write_text(json.dumps({"prompt": "the film"}))
    done = run(settings, folder / "changed")
    for name in ("prompts", "held_out"):
        (folder / f"{name}.kept").replace(folder / f"{name}.jsonl")
    assert done.returncode == 2
    assert "prompts.path, prompts.held_out: no longer what the run in" in done.stderr


@pytest.mark.exhaustive
def test_two_processes_come_to_what_one_comes_to(folder, settings, alone):
    words, env = command(settings, folder / "two")
    for code, said in run_pair(*words[1:], env=env):
        assert code == 0, said
    # Later, rounding may have led to another token.
    two, one = logged(folder / "two", "score"), logged(alone, "score")
    for found, expected in zip(two[:2], one[:2], strict=True):
        names = ("score", "gold/short", "kl", "entropy", "loss", "ptx_loss", "length")
        assert {n: found[n] for n in names} == pytest.approx(
            {n: expected[n] for n in names}, rel=1e-3, abs=1e-5
        )
    assert len(two) == STEPS and logged(folder / "two", "held_out/win_rate")


def test_what_a_run_leaves(alone, folder, finished_run):
    lines, said = logged(alone, "score"), (folder / "alone.stderr").read_text()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert sum("alarm/kl" in line for line in lines) == 1 and said.count("ALARM") == 1
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4) and lines[-1]["kl"] != lines[0]["kl"]
    betas = [line["beta"] for line in lines]
    assert betas[0] == pytest.approx(0.05) and len(set(betas)) == STEPS
    share = lines[0]["epoch/prompts"]
    assert [line["epoch/prompts"] for line in lines] == pytest.approx(
        [share * step for step in range(1, STEPS + 1)]
    )
    assert all(line["ptx_loss"] > 0 and line["updates"] == 4 for line in lines)
    # Scores that differ from one iteration to the next, and are no whole numbers.
    assert len({line["score"] for line in lines}) == STEPS
    assert all(0 < line["gold/short"] < 0.5 for line in lines)
    assert (alone / "report.html").stat().st_size > 0
    compared = logged(alone, "held_out/win_rate")
    assert [line["step"] for line in compared] == [4, STEPS]
    lineage = json.loads((alone / f"checkpoints/{STEPS}/lineage/lineage.json").read_text())
    stages = {role: lineage[role]["stage"] for role in ("parent", "reward")} | {
        "": lineage["stage"]
    }
    assert stages == {"parent": "pretrain", "reward": "reward", "": "ppo"}


def test_no_program_is_compiled_twice(alone, folder):
    said = (folder / "alone.stderr").read_text()
    found = collections.Counter(re.findall(r"Compiling jit\((\w+)\)", said))
    programs = {name: found[name] for name in ("improve", "rollout", "assess", "_seeds")}
    assert programs == dict.fromkeys(programs, 1), found


def test_the_result_is_the_mean_and_generates(alone, folder):
    model = load(alone)
    greedy = SamplingConfig(max_new_tokens=4, temperature=0)
    (answer,) = model.generate(["the film"], sampling=greedy)
    assert answer.text

    def saved(step: int, item: str) -> dict:
        path = alone / f"checkpoints/{step}" / item
        return ocp.StandardCheckpointHandler().restore(path, args=ocp.args.StandardRestore())

    # Before the last step the mean was this; and what that came to has changed places with it.
    before, last = (saved(step, "state")["extras"]["ema"] for step in (STEPS - 1, STEPS))
    expected = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, before, last)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, saved(STEPS, "params"), expected)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), model.params, load(alone / "checkpoints/1").params
    )
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.exhaustive
def test_a_folder_of_transformers_is_improved_and_another_judges(folder, settings, tmp_path):
    """Both with the tokenizer.json of the same tokenizer; the judge is one member, which scores."""
    policy, judge = tmp_path / "policy", tmp_path / "judge"
    export_model(ExportOptions(settings["parent"], str(policy)))
    export_model(ExportOptions(str(folder / "reward"), str(judge), member=1))
    kept = ("chat_template", "prompts", "response", "batch", "optimizer", "logging")
    changes = {"parent": str(policy), "reward": {"model": str(judge)}, "steps": 1}
    changes |= {"update": {"minibatch": 8}, "checkpoint": {"minutes": None}}
    changed = {name: settings[name] for name in kept} | changes
    done = run(changed, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (line,) = logged(tmp_path / "run", "score")
    assert np.isfinite(line["score"])
    lineage = json.loads((tmp_path / "run/checkpoints/1/lineage/lineage.json").read_text())
    assert {lineage[role]["stage"] for role in ("parent", "reward")} == {"import"}
    with pytest.raises(UserError, match="parent is a reward model, and must be a language model"):
        other = changed | {"parent": str(judge), "batch": {"size": 8}}
        ppo(build(other, PpoConfig), str(tmp_path / "other"))


def test_without_a_coefficient_it_collapses_and_says_so(folder, settings):
    """Rewards from a function of texts, by its import path; the critic has a fresh head."""
    changes = {
        "reward": {"scorer": {"function": "tiny_scorers:many"}},
        "prompts": {"path": settings["prompts"]["path"], "max_length": 8},
        "response": {"max_new_tokens": 8},
        "batch": {"size": 32},
        "steps": 24,
        "update": {"beta": 0.0, "minibatch": 16, "epochs": 2},
        "optimizer": {"learning_rate": 3e-2},
        "checkpoint": {"minutes": None},
    }
    kept = ("parent", "chat_template", "critic", "logging")
    done = run({name: settings[name] for name in kept} | changes, folder / "collapsed")
    assert done.returncode == 0, done.stderr
    lines = logged(folder / "collapsed", "score")
    assert lines[-1]["score"] > 2 * lines[0]["score"]
    assert lines[-1]["entropy"] < 0.5 * lines[0]["entropy"]
    rung = {name for line in lines for name in line if name.startswith("alarm/")}
    assert "alarm/entropy" in rung
    assert done.stderr.count("ALARM") == sum(name in line for line in lines for name in rung)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parent": "REWARD"}, "comes from stage reward, and ppo goes on from"),
        ({"parent": "EXPORTED"}, "reward.model reads the tokens of another tokenizer"),
        ({"reward": {"model": "PARENT"}}, "reward.model is a language model"),
        ({"critic": {"parent": "PARENT"}}, "critic.parent is a language model"),
        ({"base": "REWARD"}, "base is a reward model"),
        ({"base": "gone"}, "^base gone does not exist"),
        ({"reward": {"model": "gone"}}, "^reward.model gone does not exist"),
        ({"critic": {"parent": "gone"}}, "^critic.parent gone does not exist"),
        ({"chat_template": None}, "has no chat template of its own"),
        (
            {"response": {"max_new_tokens": 10}},
            r"\(18\) exceed the 16 positions of parent /.*: lower",
        ),
        ({"reward": {"scorer": {"function": "gone_scorers:f"}}}, "gone_scorers cannot be imported"),
        ({"batch": {"size": 6}}, "must be a multiple of update.minibatch"),
        (
            {"execution": {"loss_chunk": 4}},
            r"execution.loss_chunk \(4\) must divide response.max_new_tokens \(6\)",
        ),
        (
            {"execution": {"loss_chunk": 6}},
            r"execution.loss_chunk \(6\) must divide ptx.data.sequence_length \(16\)",
        ),
        ({"execution": {"loss_chunk": -2}}, "execution.loss_chunk must be 0 or more, not -2"),
        ({"prompts": {"path": "nowhere.jsonl", "max_length": 8}}, "nowhere.jsonl"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    folder, settings, finished_run, tmp_path, monkeypatch, changes, sentence
):
    monkeypatch.syspath_prepend(folder)
    exported = tmp_path / "exported"
    named = {"REWARD": folder / "reward", "PARENT": finished_run, "EXPORTED": exported}
    if "EXPORTED" in changes.values():
        # Its tokenizer has another digest, that of tokenizer.json.
        export_model(ExportOptions(str(finished_run), str(exported)))

    def filled(value: object) -> object:
        if isinstance(value, dict):
            return {name: filled(each) for name, each in value.items()}
        return str(named.get(value, value)) if isinstance(value, str) else value

    with pytest.raises(UserError, match=sentence) as error:
        whole = {"checkpoint": {}, "mesh": {"data": 8}, "ptx": settings["ptx"] | {"rows": 8}}
        changed = settings | whole | filled(changes)
        changed["batch"] = changes.get("batch", {"size": 64})
        changed["update"] = {"minibatch": 4 if "batch" in changes else 64}
        ppo(build(changed, PpoConfig), str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_left_out_are_told(folder, settings, tmp_path, capsys):
    lines = [{"prompt": "the film"}, {"prompt": "the " + "quiet " * 9}, {"question": "why"}]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines * 2)))
    prompts = settings["prompts"] | dict.fromkeys(
        ("path", "held_out"), str(tmp_path / "some.jsonl")
    )
    changes = {"prompts": prompts, "reward": {"scorer": {"function": "gone_scorers:f"}}}
    changes |= {"mesh": {"data": 8}, "batch": {"size": 64}, "update": {"minibatch": 64}}
    changes["ptx"] = settings["ptx"] | {"rows": 8}
    with pytest.raises(UserError, match="gone_scorers cannot be imported"):
        ppo(build(settings | changes, PpoConfig), str(tmp_path / "run"))
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    counts = "6 records, 2 prompts; left out: 2 records broken, 2 texts too long"
    assert told == [f"prompts.{name}: {counts}" for name in ("path", "held_out")]
