"""The reports of PPO and reward runs, comparisons and chains: what their files say is seen."""

import html
import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from instar.errors import UserError
from instar.evaluation import compare_report
from instar.evaluation import report as reports
from instar.evaluation.alarms import AlarmConfig, Alarms
from instar.evaluation.report import ReportOptions, write_report

ROLLS = {
    "score": 0.3, "gold/vader": 0.1, "kl": 2.5, "kl_k2": 2.6, "kl_k3": 2.4, "entropy": 3.5,
    "length": 24.0, "eos_rate": 0.8, "distinct_1": 0.4, "distinct_2": 0.9, "self_bleu": 0.05,
    "perplexity": 50.0, "mismatch": 6e-7,
}  # fmt: skip
UPDATES = {
    "loss": 0.01, "clip_fraction": 0.1, "value_clip_fraction": 0.2, "value_loss": 0.3,
    "explained_variance": 0.4, "beta": 0.05, "grad_norm": 0.4, "learning_rate": 2e-4,
    "tokens": 4000.0, "tokens_per_second": 1000.0,
}  # fmt: skip
WINS = [("vader", "sft", "base", 0.6), ("vader", "ppo", "base", 0.8), ("vader", "ppo", "sft", 0.7)]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_ppo(folder: Path, iterations: int = 12) -> Path:
    """A run whose entropy falls until the alarm rings, as the stage would write it."""
    bell, lines = Alarms(AlarmConfig()), []
    for step in range(1, iterations + 1):
        scalars = ROLLS | UPDATES | {"score": 0.3 + 0.01 * step, "entropy": 3.5 * 0.8**step}
        scalars |= {f"alarm/{alarm.name}": 1.0 for alarm in bell.update(step, scalars)}
        lines.append({"step": step, "time": 1e9 + step, **scalars})
        if step % 6 == 0:
            policy = {f"held_out/{name}": value for name, value in ROLLS.items()}
            reference = {f"held_out/{name}_reference": value / 2 for name, value in ROLLS.items()}
            lines.append({"step": step, "time": 1e9 + step, **policy, **reference}
                         | {"held_out/win_rate": 0.61})  # fmt: skip
    write_lines(folder / "metrics.jsonl", lines)
    sample = {"prompt": "the <film>", "completion": " shines", "reference": " drags"}
    judged = {"score": 0.9, "reference_score": -0.2, "gold/vader": 0.5, "reference_gold/vader": 0.1}
    write_lines(folder / "samples.jsonl", [{"step": 6} | sample, {"step": 12} | sample | judged])
    write_json(folder / "config.json", {"steps": iterations, "update": {}, "parent": "sft"})
    parent = {"stage": "pretrain", "parent": None, "step": 1500, "params": "a" * 64, "tokens": 3e6}
    family = {"stage": "sft", "parent": parent, "step": 400, "params": "b" * 64, "tokens": 8e5}
    lineage = {"stage": "ppo", "parent": family, "step": iterations, "tokens": 5e4}
    path = folder / "checkpoints" / str(iterations) / "lineage" / "lineage.json"
    write_json(path, lineage | {"instar": "0.1.0"})
    return folder


def interval(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def write_compare(folder: Path) -> Path:
    models = {
        name: {
            "judges": {"vader": interval(0.1 * place)},
            **{"distinct_1": 0.4, "distinct_2": 0.9, "self_bleu": 0.05, "repetition": 0.0},
            **{"length": 24.0, "ended": 0.8, "path": f"runs/{name}", "digest": "c" * 64},
            **{"kl": interval(float(place)), "kl_k3": interval(1.0), "perplexity": 50.0},
        }
        for place, name in enumerate(("base", "sft", "ppo"))
    }
    for name in ("base", "ppo"):
        models[name]["judges"]["vader"]["overlaps"] = name == "base"
    roles = {"candidate": "ppo", "baseline": "sft", "reference": "sft", "base": "base"}
    checks = {
        "gap/vader": {"value": -0.01, "limit": 0.0, "holds": False},
        "kl": {"value": 2.0, "limit": 20.0, "holds": True},
    }
    wins = [dict(judge=j, model=m, against=a) | interval(v) for j, m, a, v in WINS]
    found = {"prompts": 64, "models": models, "wins": wins, "checks": checks, "samples": 1}
    write_json(folder / "compare.json", found | roles | {"max_new_tokens": 40, "time": 1e9})
    texts = {"base": " is", "sft": " was", "ppo": " is <b>great</b>"}
    scores = {"vader": {"base": 0.0, "sft": 0.1, "ppo": 0.62}}
    record = {"prompt": [{"role": "user", "content": "the film"}]}
    write_lines(folder / "samples.jsonl", [record | {"completions": texts, "scores": scores}] * 2)
    return folder


class Page(html.parser.HTMLParser):
    """What a reader sees of a page, which must not load anything."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.ids = "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        cells = re.findall(r'<dt>(.*?)</dt><dd class="value">(.*?)</dd>', self.source)
        self.summary = dict(cells)
        self.plots = re.findall(r'<svg class="plot"[^>]*aria-label="([^"]*)"', self.source)
        assert len(self.ids) == len(set(self.ids)), "two figures share an id"
        for target in re.findall(r"url\((.*?)\)|xlink:href=\"(.*?)\"", self.source):
            assert "".join(target)[1:] in self.ids

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe"), tag
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def ppo_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(write_ppo(tmp_path_factory.mktemp("runs") / "ppo")))


def test_ppo_is_told_beside_its_reference(ppo_page: Page):
    summary = ppo_page.summary
    assert summary["Iterations"] == "12" and summary["Score"] == "0.300"
    assert summary["Wins"] == "61%" and summary["KL"] == "2.50"
    assert "held out, reference 0.150" in ppo_page.text
    assert "held out, reference 25.0" in ppo_page.text


def test_all_of_ppo_is_drawn(ppo_page: Page):
    for words in (
        *("score", "score of vader", "KL", "entropy", "perplexity", "distinct", "self-BLEU"),
        *("tokens / response", "share that ended", "wins", "clipped share", "value loss"),
        *("explained variance", "sampler to trainer"),
    ):
        assert any(words in title for title in ppo_page.plots), words
    assert "β (right)" in ppo_page.text and "k3" in ppo_page.text


def test_alarms_are_seen_with_step_and_reason(ppo_page: Page):
    assert re.search(r'role="alert"><b>1 alarm</b>', ppo_page.source)
    assert re.search(r"entropy at step \d+: entropy collapses: .* raise the KL", ppo_page.text)


def test_a_run_without_alarms_has_no_banner(tmp_path: Path):
    assert 'role="alert"' not in Page(write_report(write_ppo(tmp_path / "ppo", 4))).source


def test_samples_of_policy_and_reference_are_side_by_side(ppo_page: Page):
    row = re.search(r"<tr><td>the &lt;film&gt;</td>.*?</tr>", ppo_page.source, re.DOTALL)[0]
    assert row.index("drags") < row.index("shines")
    assert "score +0.90 · vader +0.50" in row and "score -0.20 · vader +0.10" in row


def test_the_family_is_a_table(ppo_page: Page):
    assert "parent › parent" in ppo_page.text and "b" * 12 in ppo_page.text
    assert "b" * 13 not in ppo_page.text


def test_a_ppo_run_that_has_just_begun(tmp_path: Path):
    write_json(tmp_path / "config.json", {"steps": 9, "update": {}})
    page = Page(write_report(tmp_path))
    assert page.summary == {"Iterations": "0"} and "No steps are logged yet" in page.text


def test_a_reward_run_shows_its_loss_and_accuracy(tmp_path: Path):
    lines = [
        {"step": step, "time": 1e9 + step, "loss": math.log(2) / step, "accuracy": 0.7}
        | ({"eval/film/accuracy": 0.66} if step == 3 else {})
        for step in (1, 2, 3)
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    write_json(tmp_path / "config.json", {"steps": 3, "members": 2})
    page = Page(write_report(tmp_path))
    assert page.summary["Training loss"] == "0.2310"
    assert "loss (nats / comparison)" in page.text and "nats / token" not in page.text
    assert any("Accuracy over steps" in title for title in page.plots)


def test_a_comparison_says_who_wins_and_what_holds(tmp_path: Path):
    page = Page(write_report(write_compare(tmp_path / "compare")))
    assert "✗ does not hold" in page.text and "✓ holds" in page.text
    # Against the baseline: of the base it is one less than the baseline's wins over it.
    assert re.findall(r"<td>(\d+\.\d) %</td>", page.source) == ["40.0", "70.0"]
    assert re.findall(r"<td>(overlap|are apart)</td>", page.source) == ["overlap", "are apart"]
    assert " is <b>great</b>" in page.text and "user: the film" in page.text
    assert page.text.count("vader +0.62") == 1, "more samples than were asked for"


def test_what_is_null_in_a_comparison_is_a_dash(tmp_path: Path):
    """A perplexity that is beyond float64, and what is computed with it."""
    folder = write_compare(tmp_path / "compare")
    found = json.loads((folder / "compare.json").read_text())
    found["models"]["ppo"] |= {"perplexity": None, "kl": dict.fromkeys(("value", "low", "high"))}
    found["checks"]["perplexity"] = {"value": None, "limit": 1.2, "holds": False}
    write_json(folder / "compare.json", found)
    page = Page(write_report(folder))
    assert "<td>–<small>– to –</small></td><td>–</td>" in page.source
    assert re.search(r"multiple of the baseline's</td><td>–</td>", html.unescape(page.source))
    shown = {fact.label: fact.value for fact in compare_report.facts(found)}
    assert (shown["KL"], shown["Perplexity"], shown["Distinct-2"]) == ("–", "–", "0.900")


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    folder = tmp_path / "quickstart"
    write_ppo(folder / "first"), write_ppo(folder / "ppo"), write_compare(folder / "compare")
    write_json(
        folder / "data" / "manifest.json",
        {"sources": {"films": {"documents": 25_000, "tokens": 10_500_000}}},
    )
    write_json(folder / "data" / "config.json", {})
    write_json(tmp_path / "facts" / "facts.json", {"sentences": 10_605, "held_out": 1627})
    commands = {"data": "prepare", "first": "ppo", "ppo": "ppo", "compare": "compare"}
    steps = {
        name: {"command": command, "told": {}, "started": 1e9, "seconds": 1800.0, "status": "done"}
        for name, command in commands.items()
    }
    steps["facts"] = {"command": "demonstration", "told": {"to": str(tmp_path / "facts")}}
    steps["later"] = {"command": "sft", "told": {}, "status": "failed"}
    steps["facts"]["status"] = "done"
    write_json(folder / "pipeline.json", steps)
    return folder


def test_a_chain_is_one_page(chain: Path):
    page = Page(write_report(chain))
    assert page.summary["Steps"] == "5 of 6" and page.summary["Time"] == "2 h 00 min"
    assert page.summary["Wins by vader"] == "70%" and "Cost" not in page.summary
    for text in (
        *("25,000 documents", "10.5 M", "10,605 rated sentences, 1,627 held out", "failed"),
        *("score 0.15 → 0.30", "1 alarm", "1 of 2 checks hold; ppo beats sft in 70% by vader"),
        *("Where ppo comes from", "ppo › parent › parent", "instar 0.1.0"),
    ):
        assert text in page.text, text


def test_a_price_makes_the_cost_known(chain: Path, capsys):
    reports.report(ReportOptions(str(chain), price=1.25))
    assert capsys.readouterr().out.strip() == str(chain / "report.html")
    page = Page(chain / "report.html")
    assert page.summary["Cost"] == "2.50" and "at 1.25 an hour" in page.text
    with pytest.raises(UserError, match="price must not be negative"):
        ReportOptions("runs", price=-1.0).check()
