"""The report of a run: read from its files alone, self-contained, and robust to what is missing."""

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instar.errors import UserError
from instar.evaluation.report import write_report
from instar.training.metrics import LoggingConfig, MetricsWriter

START = 1_767_225_600.0  # 1 January 2026, 00:00 UTC
STEP_SECONDS, STEP_TOKENS, RATE = 0.25, 4096, 16384.0
PEAK = {
    "flops": 2.1e11,
    "source": "measured",
    "dtype": "float32",
    "device_kind": "cpu",
    "devices": 1,
}
CONFIG = {
    "data": {"path": "work/data", "sequence_length": 256, "weights": {}},
    "model": {"family": "llama", "depth": 6, "width": 192, "heads": 6},
    "steps": 2000,
    "optimizer": {"name": "muon", "learning_rate": 0.003, "clip_norm": 1.0},
    "note": "<script>alert(1)</script>",
}
HARDWARE = {
    "platform": "cpu",
    "device_kind": "cpu",
    "devices": 1,
    "cpu": "AMD EPYC",
    "cpu_count": 2,
    "host_memory_bytes": 24 * 2**30,
    "device_memory_bytes": None,
    "python": "3.13.0",
    "versions": {"jax": "0.12.0", "flax": "0.12.12"},
}
PROMPTS = ("The film begins with", "I have never seen")
CONTINUATIONS = (
    "ae  the th s in ,, of<br", " a lot of the movie is a movie of the movie, and the film",
    " a man who comes home from the war, and what he finds there is told without a false note.",
)  # fmt: skip


def loss_at(step: int) -> float:
    return 2.6 + 5.7 * math.exp(-step / 35) + 2.2 / (1 + step / 150)


def write_run(workdir: Path, steps: int = 2000, restart: int = 800, every: int = 1) -> Path:
    """The files of a run that was stopped after `restart` steps and went on an hour later."""
    noise = np.random.default_rng(0)
    writer = MetricsWriter(
        workdir,
        resume_step=0,
        config=LoggingConfig(tensorboard=False),
        clock=lambda: START + 10 + step * STEP_SECONDS + 3600 * (step > restart),
    )
    for step in range(every, steps + 1, every):
        spike, skipped = step == 1203, step in (611, 1204)
        loss = loss_at(step) + 0.06 * noise.standard_normal() + 1.5 * spike
        rate = RATE * (1 + 0.03 * noise.standard_normal()) if step > 1 else None
        scalars = {
            "loss": math.nan if skipped else loss,
            "grad_norm": math.inf if skipped else math.exp(0.25 * noise.standard_normal()) * 0.6,
            "learning_rate": 0.003 * min(step / 100, 0.55 + 0.45 * math.cos(step * 3.14 / steps)),
            "tokens": STEP_TOKENS,
            "skipped": float(skipped),
            "spike": float(spike),
            "epoch/imdb": step / 1500,
        }
        if rate:
            scalars |= {"tokens_per_second": rate, "mfu": 6.4e6 * rate / PEAK["flops"]}
        writer.write(step, scalars)
        if step % 250 == 0:
            held_out = loss_at(step) + 0.05
            writer.write(
                step,
                {
                    "eval/loss": held_out,
                    "eval/perplexity": math.exp(held_out),
                    "eval/bits_per_byte": held_out / math.log(2) / 2.05,
                },
            )
            text = CONTINUATIONS[min(2, step // 500)]
            writer.samples(step, [{"prompt": p, "completion": text} for p in PROMPTS])
    writer.close()
    facts = {"hardware": HARDWARE, "mesh": {"data": 1, "fsdp": 1, "tensor": 1}, "peak": PEAK}
    facts |= {"parameters": 1_071_234, "flops_per_token": 6.4e6}
    later = {"step": restart, "time": START + 10 + restart * STEP_SECONDS + 3600}
    starts = [{"step": 0, "time": START}, *([later] if steps > restart else [])]
    write_json(workdir / "run.json", facts | {"starts": starts})
    write_json(workdir / "config.json", CONFIG | {"steps": steps})
    for step in (steps // 2, steps):
        write_json(
            workdir / "checkpoints" / str(step) / "lineage" / "lineage.json",
            {"stage": "pretrain", "parent": None, "data": f"sha256:{step:064x}", "step": step}
            | {"tokens": step * STEP_TOKENS, "instar": "0.1.0"},
        )
    return workdir


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


class Page(html.parser.HTMLParser):
    """What a reader sees of a page: its summary, its texts, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.text, self.links, self.ids, self.open = "", [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        cells = re.findall(r'<dt>(.*?)</dt><dd class="value">(.*?)</dd>', self.source)
        self.summary = dict(cells)
        self.plots = re.findall(r'<svg class="plot"[^>]*aria-label="([^"]*)"', self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe"), tag
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(write_run(tmp_path_factory.mktemp("runs") / "film-1m")))


def test_summary_is_computed_from_the_files(page: Page):
    summary = page.summary
    assert summary["Steps"] == "2,000"
    assert summary["Tokens"] == "8.19 M"
    # 2000 steps of 0.25 s and 10 s of compilation; the hour between stop and restart is left out.
    assert summary["Training time"] == "8 min 30 s"
    assert float(summary["Training loss"]) == pytest.approx(loss_at(1975), abs=0.05)
    assert summary["Held-out loss"] == f"{loss_at(2000) + 0.05:.4f}"
    assert summary["Bits per byte"] == f"{(loss_at(2000) + 0.05) / math.log(2) / 2.05:.4f}"
    assert float(summary["Throughput"].replace(",", "")) == pytest.approx(RATE, rel=0.01)
    assert summary["MFU"] == "~49.9 %"
    assert summary["Parameters"] == "1.07 M"


def test_page_is_self_contained(page: Page):
    """No link leaves the page, and none inside the plots is dangling or ambiguous."""
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link.startswith("#") and link[1:] in page.ids
    for target in re.findall(r"url\((.*?)\)", page.source):
        assert target.startswith("#") and target[1:] in page.ids
    assert "@import" not in page.source and "<!DOCTYPE svg" not in page.source


def test_all_plots_are_there_and_follow_the_theme(page: Page):
    assert len(page.plots) == 5
    for words in ("loss", "Learning rate", "gradient", "Tokens a second", "bits per byte"):
        assert any(words in title for title in page.plots), words
    for label in ("loss (nats / token)", "gradient norm", "tokens / s", "MFU (%)", "step"):
        assert label in page.text
    for svg in re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL):
        # Black or white would vanish in one of the two themes.
        assert not re.findall(r"(?:fill|stroke): ?(?:#\w+|black|white)", svg)


def test_texts_are_shown_and_escaped(page: Page):
    assert "<script>alert(1)</script>" in page.text and "<script>" not in page.source
    assert f"<b>{PROMPTS[0]}</b>" in page.source and CONTINUATIONS[2] in page.text
    assert "Step 2,000" in page.text and "Step 250" in page.text
    assert page.text.index("Step 2,000") < page.text.index("Step 250")


def test_events_and_lineage_are_told(page: Page):
    assert "Restarted at step 800" in page.text and "1 January 2026, 01:03 UTC" in page.text
    assert "1 loss spike" in page.text and "at step 1,203" in page.text
    assert "2 skipped steps" in page.text and "at step 611, 1,204" in page.text
    assert f"sha256:{2000:064x}" in page.text, "the lineage is not the newest checkpoint's"
    assert "AMD EPYC" in page.text and "24.0 GiB" in page.text


def test_mfu_states_its_formula_and_that_the_peak_was_measured(page: Page):
    assert "6.4 MFLOP" in page.text and "210 GFLOP/s" in page.text
    assert "measured on this machine" in page.text and "recomputation is not counted" in page.text


def test_peak_of_a_known_chip_is_not_called_measured(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=40)
    facts = json.loads((run / "run.json").read_text())
    facts["peak"] = {**PEAK, "source": "table", "device_kind": "TPU v4", "devices": 8}
    write_json(run / "run.json", facts)
    page = Page(write_report(run))
    assert re.fullmatch(r"\d\d\.\d %", page.summary["MFU"])
    assert "measured" not in page.text and "8 x TPU v4" in page.text.replace("×", "x")


@pytest.mark.parametrize("steps", [1, 2, 5, 31])
def test_short_runs(tmp_path: Path, steps: int):
    page = Page(write_report(write_run(tmp_path / "run", steps=steps)))
    assert page.summary["Steps"] == str(steps)
    assert page.plots[0].startswith("Training") and "Held-out loss" not in page.summary


def test_long_runs_stay_small(tmp_path: Path):
    """20,000 points are drawn by their lows and highs: every spike is kept, most bytes are not."""
    path = write_report(write_run(tmp_path / "run", steps=20_000))
    assert path.stat().length < 600_000


def test_run_that_logs_every_tenth_step_estimates_its_tokens(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=1000, every=10)
    (run / "checkpoints" / "1000" / "lineage" / "lineage.json").unlink()
    assert Page(write_report(run)).summary["Tokens"] == "≈ 4.1 M"


def test_run_without_a_finished_step(tmp_path: Path):
    write_json(tmp_path / "config.json", CONFIG)
    page = Page(write_report(tmp_path))
    assert page.summary == {"Steps": "0"} and "No steps are logged yet" in page.text


def test_metrics_alone_with_numbers_that_are_not_finite(tmp_path: Path):
    lines = [
        '{"step": 1, "time": 1.0, "loss": "nan", "grad_norm": "inf", "skipped": 1.0}',
        '{"step": 2, "time": 2.0, "loss": "inf", "eval/loss": "nan"}',
        '{"step": 2, "time": 2.0, "eval/loss": "nan", "eval/perplexity": "inf"}',
        '{"step": 3, "time": 3.0, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = Page(write_report(tmp_path))
    assert page.summary["Steps"] == "2" and "Training loss" not in page.summary
    assert page.summary["Held-out loss"] == "nan" and page.summary["Perplexity"] == "inf"


def test_what_is_no_run_is_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="holds no run"):
            write_report(folder)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        write_report(tmp_path)
