"""Every script under benchmarks/ runs, in small, and writes the figures that it prints."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from compilation import xla_flags

from instar.config import build
from instar.data.prepare import PrepareConfig, prepare

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: object, result: pathlib.Path) -> dict:
    """Runs a script as the README does, and returns what it wrote."""
    command = [sys.executable, FOLDER / script, *arguments, "--json", result]
    # One device, as a user has it, and not the eight of the tests.
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    # What they measure of compiling is no reading of a cache.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())


def test_loader(tmp_path):
    written = run(
        "loader.py", "--tokens", 200_000, "--seconds", 0.05, result=tmp_path / "loader.json"
    )
    assert all(line["tokens_per_second"] > 0 for line in written["measured"])


@pytest.mark.exhaustive
def test_compile_time(tmp_path):
    written = run("compile_time.py", "--depths", 2, 4, result=tmp_path / "compile_time.json")
    assert written["scan"].keys() == {"2", "4"} and written["ratio"] > 0


def test_loss_memory(tmp_path):
    written = run("loss_memory.py", "--vocabularies", 5000, result=tmp_path / "loss_memory.json")
    whole, *chunked = written["measured"]
    # What chunks are for: this is memory as compiled, and does not depend on the machine's speed.
    assert all(line["bytes"] < whole["bytes"] / 2 for line in chunked)


@pytest.mark.exhaustive
def test_import_memory(tmp_path):
    small = ("--depth", 2, "--width", 128, "--folder", tmp_path)
    written = run("import_memory.py", *small, result=tmp_path / "import_memory.json")
    assert written["measured"].keys() == {"import", "export"}
    assert written["float32_bytes"] > written["file_bytes"] > written["largest_parameter_bytes"]


def test_baselines(tmp_path):
    words = "what was said about the film was said by those who had not seen it".split()
    texts = [" ".join(words[n % 9 :] + words[: n % 7]) for n in range(300)]
    lines = (json.dumps({"text": f"{n}: {text}"}) for n, text in enumerate(texts))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    values = {
        "sources": [{"name": "texts", "kind": "jsonl", "path": str(tmp_path / "texts.jsonl")}],
        "tokenizer": {"vocab_size": 320},
        "sequence_lengths": [16],
        "held_out": 0.1,
    }
    prepare(build(values, PrepareConfig), tmp_path / "data")
    written = run("baselines.py", "--data", tmp_path / "data", result=tmp_path / "baselines.json")
    # Text that repeats itself: each baseline that has seen more of it is the better one.
    assert written["Kneser-Ney 5-gram"] < written["xz given the training text"] < written["xz"]


@pytest.mark.exhaustive
def test_scaling(tmp_path):
    """What is sent is known by hand where gradients alone are summed, or weights alone gathered."""
    meshes = ("--meshes", "data", "fsdp", "fsdp × tensor 8")
    small = ("--small", "--devices", 8, 16, *meshes, "--plot", tmp_path / "scaling.svg")
    written = run("scaling.py", *small, result=tmp_path / "scaling.json")["measured"]
    for name, line in written.items():
        for devices, found in line.items():
            share = (int(devices) - 1) / int(devices)
            weights = 4 * found["parameters"]
            if name == "data":
                (sums,) = found["sent"]["data"].values()  # an all-reduce: out and back
                # Of the head's gradient there is a part for each of eight chunks of the loss.
                head = 4 * 512 * 64
                assert sums == pytest.approx(2 * share * (weights + 7 * head), rel=1e-3)
            # Parameters and two moments, on each device or split over all but its norms.
            held = found["state_bytes"] / (3 * weights)
            assert held == pytest.approx(1 if name == "data" else 1 / int(devices), rel=0.2)
            if name == "fsdp":
                # Weights of layers are gathered for the forward pass and again for the backward.
                gathered = found["sent"]["fsdp"]["all-gather"]
                assert share * weights < gathered < 2.2 * share * weights
    assert set(written["fsdp × tensor 8"]["16"]["sent"]) >= {"fsdp", "tensor"}
    assert "sent by a device" in (tmp_path / "scaling.svg").read_text()


@pytest.mark.exhaustive
def test_mfu(tmp_path):
    small = ("--small", "--steps", 2)
    written = run("mfu.py", *small, result=tmp_path / "mfu.json")
    tries = written["training"]["small"]
    # Two numbers of rows, and the other attention with the better of them.
    assert [each["attention"] for each in tries] == ["auto", "auto", "xla"]
    for each in tries:
        assert each["tokens_per_second"] > 0 and each["compiled_bytes"] > 0
        assert each["loss"] < 6.3  # log 512 = 6.24: the step that was timed is one that trains
    assert written["generation"]["4"]["tokens_per_second"] > 0
    assert written["ppo"]["phases"].keys() >= {"rollout", "assess", "update"}


@pytest.mark.parity
def test_pretrain_step(tmp_path):
    pytest.importorskip("torch")
    arguments = ("--models", "LLaMA 1M", "--turns", 1)
    written = run("pretrain_step.py", *arguments, result=tmp_path / "pretrain_step.json")
    # The script itself sees to it that the frameworks' first losses agree.
    assert set(written["measured"]) == {"LLaMA 1M float32"}


@pytest.mark.parity
def test_generate(tmp_path):
    pytest.importorskip("transformers")
    small = ("--model", "small", "--rows", 2, "--prompt", 8, "--new", 32, "--turns", 1)
    dtypes = ("--dtypes", "float32", "bfloat16")
    written = run("generate.py", *small, *dtypes, result=tmp_path / "generate.json")
    # The script itself sees to it that the tokens begin alike.
    programs = {"instar float32", "instar bfloat16", "transformers float32"}
    assert written["measured"]["2 rows"].keys() == programs
    assert written["bytes_per_second"] > 0


@pytest.mark.parity
def test_ppo_step(tmp_path):
    pytest.importorskip("trl")
    small = ("--models", "tiny", "--turns", 1, "--prompt", 4, "--new", 8)
    written = run("ppo_step.py", *small, result=tmp_path / "ppo_step.json")
    # The script itself sees to it that both begin as the same models.
    found = written["measured"]["tiny"]
    assert found["ratio"]["median"] > 0
    for phases in found["phases"].values():
        assert all(phases[phase] > 0 for phase in ("rollout", "assess", "update", "rest"))
    # Nothing of an iteration is missing in its phases.
    assert sum(found["phases"]["trl"].values()) == pytest.approx(found["seconds"]["trl"]["min"])
