"""Every family goes from a folder of transformers' through SFT, a reward model and PPO."""

import json
import math
import pathlib
import random

import jax
import numpy as np
import pytest
from family_examples import small_spec
from runs import logged, write_config
from tokenizer_examples import train_chat_huggingface

from instar import cli, load
from instar.config import build
from instar.data.prepare import PrepareConfig, prepare
from instar.data.tokenizer import load_tokenizer
from instar.families.registry import FAMILIES
from instar.interchange.card import ModelCard
from instar.interchange.convert import write_hub_folder
from instar.interchange.parameters import flatten
from instar.models.language_model import LanguageModel

pytestmark = pytest.mark.exhaustive

# What a format of transformers can tell, and eight devices can share. (Bands as GPT-3's are tested
# as GPT-Neo's.)
OWN = {"bloom": {"mlp_width": 128}, "gpt3": {"window": None}, "deepseek_v3": {"query_rank": 16}}
LENGTH, STEPS = 64, 6
ASKED = ("the film", "was bad", "film film", "the bad")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A tokenizer, dialogues in two templates, pairs and prompts."""
    folder, rng = tmp_path_factory.mktemp("families"), random.Random(0)
    made = train_chat_huggingface()
    made.add_special_tokens(["[MASK]"])
    made.save(str(folder / "tokenizer.json"))
    chats = [
        {
            "messages": [
                {"role": "user", "content": " ".join(rng.choices(ASKED, k=3))},
                {"role": "assistant", "content": "was good"},
            ]
        }
        for _ in range(120)
    ]
    pairs = [{"prompt": p, "chosen": "was good", "rejected": "x12"} for p in ASKED * 2]
    files = {"chats": chats, "pairs": pairs, "prompts": [{"prompt": p} for p in ASKED * 2]}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for template in ("chatml", "chatglm"):
        source = {"name": "chats", "kind": "jsonl", "dialogue": "messages"}
        settings = {
            "sources": [source | {"path": str(folder / "chats.jsonl")}],
            "tokenizer": {"path": str(folder / "tokenizer.json")},
            "chat_template": template,
            "sequence_lengths": [LENGTH],
            "held_out": 0.1,
        }
        prepare(build(settings, PrepareConfig), folder / template)
    return folder


def write_parent(name: str, to: pathlib.Path, tokenizer_path: pathlib.Path) -> None:
    """A folder of transformers' with fresh parameters."""
    tokenizer = load_tokenizer(tokenizer_path)
    changes, stop = {"vocab_size": tokenizer.vocab_size} | OWN.get(name, {}), "<|im_end|>"
    if name == "chatglm1":
        changes["start_id"] = tokenizer.token_id("<sop>")
        changes["mask_ids"] = tuple(map(tokenizer.token_id, ("[gMASK]", "[MASK]")))
        stop = "<eop>"
    spec = small_spec(name, **changes)
    read = flatten(LanguageModel(spec).init(jax.random.key(1))).__getitem__
    card = ModelCard(spec, tokenizer, stop_ids=(tokenizer.token_id(stop),))
    write_hub_folder(card, lambda path: np.asarray(read(path)), to, np.dtype("f4"))


def settings_of(name: str, folder: pathlib.Path, runs: pathlib.Path) -> dict[str, dict]:
    """What each stage is told, in their order."""
    common = {
        "batch": {"size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "logging": {"tensorboard": False},
    }
    template = "chatglm" if name == "chatglm1" else "chatml"
    sft = {
        "parent": str(runs / "model"),
        "data": {"path": str(folder / template), "sequence_length": LENGTH},
        "steps": STEPS,
        "evaluation": {"every": STEPS, "rows": 8},
    }
    reward = {
        "parent": str(runs / "sft"),
        "data": {"path": str(folder / "pairs.jsonl"), "kind": "pairs"}
        | {"completions": 2, "max_length": 48},
        "steps": STEPS,
    }
    ppo = {
        "parent": str(runs / "sft"),
        "reward": {"model": str(runs / "reward")},
        "prompts": {"path": str(folder / "prompts.jsonl"), "max_length": 40},
        "response": {"max_new_tokens": 8},
        "steps": 2,
        "update": {"minibatch": 8, "epochs": 1},
    }
    stages = {"sft": sft, "reward": reward, "ppo": ppo}
    return {stage: common | told for stage, told in stages.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_tuned_judged_and_reinforced(name, folder, tmp_path):
    write_parent(name, tmp_path / "model", folder / "tokenizer.json")
    for stage, settings in settings_of(name, folder, tmp_path).items():
        config = write_config(tmp_path / f"{stage}.py", settings)
        words = [stage, "--config", str(config), "--workdir", str(tmp_path / stage)]
        assert cli.main(words) == 0
    # It begins where a model that knows nothing does, and learns.
    losses = [line["loss"] for line in logged(tmp_path / "sft", "loss")]
    size = load_tokenizer(folder / "tokenizer.json").vocab_size
    assert losses[0] == pytest.approx(math.log(size), abs=1)
    assert losses[-1] < losses[0] - 1
    good, bad = load(tmp_path / "reward").score(["the film"] * 2, ["was good", "x12"])
    assert good > bad
    # What the policy drew from its cache is as likely by the update's pass over whole texts.
    first, second = logged(tmp_path / "ppo", "mismatch")
    assert first["mismatch"] < 1e-4 and first["kl_k3"] < 1e-6 < second["kl_k3"]
