"""`instar compare`: its figures are those of NumPy on the same samples, and mistakes are named."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from interchange_examples import make_model

from instar import load
from instar.errors import UserError
from instar.evaluation.scorers import ScorerConfig
from instar.generation.sampling import SamplingConfig
from instar.interchange.convert import write_hub_folder
from instar.interchange.model import Model
from instar.interchange.parameters import flatten
from instar.schema import build
from instar.stages import compare_models
from instar.stages.compare import check, choose_prompts, compare, table
from instar.stages.compare_config import ChecksConfig, CompareConfig

PROMPTS = ("A fisherman", "his wife", "naïve", "hello world, by the sea")
NEW = 7
SCORERS = """
def letters(prompts, completions):
    return [len(text) for text in completions]
"""


def save(model: Model, folder: Path, noise: float) -> str:
    """A model whose parameters are `noise` away, as a folder of transformers.

    Many tokens end what it says, so that some completions end by themselves.
    """
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: x + np.float32(noise) * rng.standard_normal(x.shape, np.float32), model.params
    )
    values = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    card = dataclasses.replace(model.card, stop_ids=(*model.card.stop_ids, *range(8, 420, 9)))
    write_hub_folder(card, values.__getitem__, folder, np.dtype(np.float32))
    return str(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> CompareConfig:
    folder, model = tmp_path_factory.mktemp("models"), make_model("llama")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    )
    (folder / "letter_scorers.py").write_text(SCORERS)
    models = {name: save(model, folder / name, noise)
              for name, noise in (("early", 0.0), ("late", 0.02))}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield build(
            {
                "models": models,
                "prompts": str(folder / "prompts.jsonl"),
                "judges": {"letters": {"function": "letter_scorers:letters"}},
                **{"candidate": "late", "baseline": "early", "reference": "early"},
                **{"base": "early", "max_new_tokens": NEW, "rows": 3, "seed": 5, "samples": 2},
            },
            CompareConfig,
        )


@pytest.fixture(scope="module")
def compared(config, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("runs") / "compare"
    compare(config, str(folder))
    return folder, json.loads((folder / "compare.json").read_text())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_figures_are_those_of_the_samples_alone(config, compared):
    """Each response apart, in float64, from the whole of each model's logits."""
    folder, found = compared
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert sorted(sample["prompt"] for sample in samples) == sorted(PROMPTS)
    models = {name: load(path) for name, path in config.models.items()}
    for name, model in models.items():
        template = model.chat_template()
        prompts = [
            model.encode_chat([{"role": "user", "content": sample["prompt"]}], template)
            for sample in samples
        ]
        completions = model.generate(
            prompts, sampling=SamplingConfig(max_new_tokens=NEW), seed=config.seed
        )
        assert {each.reason for each in completions} == {"stop", "length"}
        kl, kl_k3, nats, words = [], [], 0.0, 0
        for prompt, completion, sample in zip(prompts, completions, samples, strict=True):
            assert sample["completions"][name] == completion.text
            assert sample["scores"]["letters"][name] == len(completion.text)
            ids, count = completion.tokens, len(completion.tokens)
            padded = np.zeros((1, 96), np.int32)
            padded[0, : len(prompt) + count] = [*prompt, *ids]
            own, early = (
                log_softmax(np.asarray(models[each](padded))[0])[
                    len(prompt) - 1 : len(prompt) - 1 + count
                ][np.arange(count), ids]
                for each in (name, "early")
            )
            kl.append(np.sum(own - early))
            kl_k3.append(np.sum(np.exp(early - own) - 1 - (early - own)))
            spoken = count - (completion.reason == "stop")
            nats, words = nats - early[:spoken].sum(), words + spoken
        each = found["models"][name]
        assert each["kl"]["value"] == pytest.approx(np.mean(kl), abs=2e-4)
        assert each["kl_k3"]["value"] == pytest.approx(np.mean(kl_k3), abs=2e-4)
        assert each["perplexity"] == pytest.approx(np.exp(nats / words), rel=1e-4)
        assert each["judges"]["letters"]["value"] == np.mean(
            [len(sample["completions"][name]) for sample in samples]
        )
    assert found["models"]["early"]["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["models"]["late"]["kl_k3"]["value"] > 1e-3


def test_there_is_a_report_and_the_config(compared):
    folder, found = compared
    assert "Side by side" in (folder / "report.html").read_text()
    assert json.loads((folder / "config.json").read_text())["candidate"] == "late"
    assert set(found["checks"]) == {"gap/letters", "kl", "distinct_2", "perplexity"}


def test_the_table_has_the_wins_of_every_model_but_the_baseline():
    """Of one that is earlier than the baseline too: its wins are the baseline's losses."""
    interval = {"value": 0.25, "low": 0.125, "high": 0.5}
    model = {
        "judges": {"letters": interval},
        **{"kl": interval, "perplexity": 9.0, "distinct_1": 0.5, "distinct_2": 0.5},
        **{"self_bleu": 0.5, "ended": 1.0, "length": 4.0},
    }
    won = {"judge": "letters", **interval}
    pairs = [("sft", "base"), ("ppo", "base"), ("ppo", "sft")]
    found = {
        "models": dict.fromkeys(("base", "sft", "ppo"), model),
        "wins": [won | {"model": later, "against": earlier} for later, earlier in pairs],
        "baseline": "sft",
    }
    shown = table(found)
    rows = zip(*(list(column.cells) for column in shown.columns), strict=True)
    wins = next(row for row in rows if row[0] == "wins, letters")
    assert wins[1:] == ("0.750 (0.500, 0.875)", "", "0.250 (0.125, 0.500)")


def test_checks_hold_at_their_limits_and_not_beyond():
    def model(low: float, high: float, kl: float, distinct: float, perplexity: float) -> dict:
        return {
            "judges": {"j": {"value": (low + high) / 2, "low": low, "high": high}},
            **{"kl": {"value": kl}, "distinct_2": distinct, "perplexity": perplexity},
        }

    sft = model(0.0, 0.5, 0.0, 0.8, 50.0)
    for ppo, expected in (
        (model(0.625, 0.7, 20.0, 0.56, 60.0), (0.125, 20.0, 0.7, 1.2)),
        (model(0.5, 0.7, 20.5, 0.4, 62.5), None),
    ):
        checks = check({"models": {"sft": sft, "ppo": ppo}}, "ppo", "sft", ChecksConfig())
        assert [each["holds"] for each in checks.values()] == [expected is not None] * 4
        if expected:
            found = [each["value"] for each in checks.values()]
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_models_are_in_order_whatever_their_names(config):
    names = ("a", "b", "c", "d")
    changed = dataclasses.replace(
        config,
        models=dict.fromkeys(names, ""),
        **{"candidate": "a", "baseline": "c", "base": "d", "reference": "c"},
    )
    assert changed.names == ["d", "c", "b", "a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidate": "ppo"}, r"candidate must be the name of one of models \(early, late\)"),
        ({"candidate": "early"}, "candidate and baseline must be two models"),
        ({"judges": {}}, "judges must name at least one scorer"),
        ({"rows": 0}, "rows must be at least 1"),
    ],
)
def test_a_config_that_makes_no_sense(config, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 128}, r"models.early has 128 positions.* lower max_prompt_length"),
        ({"models": {"early": "gone", "late": "gone"}}, "^models.early gone does not exist"),
        ({"chat_template": "plain"}, "has a chat template of its own: leave chat_template out"),
        ({"judges": {"a": ScorerConfig("letter_scorers:words")}}, "has no function words"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(config, changes, message, tmp_path):
    folder = tmp_path / "compare"
    with pytest.raises(UserError, match=message):
        compare(dataclasses.replace(config, **changes), str(folder))
    assert not folder.exists()


def test_prompts_that_are_left_out_are_told(config, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "his wife"}\n{"question": "why"}\n')
    changed = dataclasses.replace(config, prompts=str(path))
    assert choose_prompts(changed, compare_models.open_contenders(changed)) == ["his wife"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "prompts: 2 records, 1 prompt; left out: 1 record broken"
    assert told[1].strip() == f"record 2 of {path} (prompt is missing)"


def test_models_of_two_tokenizers_are_refused(config, tmp_path, monkeypatch):
    opened = compare_models.open_model

    def other(path: str, field: str):
        found = opened(path, field)
        if path != config.models["late"]:
            return found
        tokenizers = type("Tokenizer", (), {"digest": "another"})
        return dataclasses.replace(
            found, card=dataclasses.replace(found.card, tokenizer=tokenizers)
        )

    monkeypatch.setattr(compare_models, "open_model", other)
    with pytest.raises(UserError, match=r"models\.late .* reads other tokens than the baseline"):
        compare(config, str(tmp_path / "compare"))
