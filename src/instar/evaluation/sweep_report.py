"""The report of a sweep: its trials in a sorted table, on a terminal and as a page with figures."""

import importlib.metadata
from collections.abc import Iterator

from etils import epath
from markupsafe import Markup

from instar.evaluation.report_page import figures_of, fill, summary_of
from instar.evaluation.report_words import Fact, duration
from instar.evaluation.sweep_plots import drawn
from instar.evaluation.sweep_results import (
    SweepResults,
    TrialResult,
    free_keys,
    short_names,
    swept_keys,
)


def page(folder: epath.Path, results: SweepResults) -> Markup:
    """The page of a sweep as HTML."""
    figures = drawn(results)
    head, *rows = table(results)
    return fill(
        "sweep.html.jinja",
        name=folder.resolve().name,
        stage="sweep",
        subtitle=f"instar {results.command} · instar {importlib.metadata.version('instar')}",
        summary=summary_of(list(_summary(results))),
        figures=figures_of(figures) if figures else "",
        head=head,
        trials=[
            (trial, row, (folder / trial.name / "report.html").exists())
            for trial, row in zip(results.trials, rows, strict=True)
        ],
        same=_shared(results),
        results=results,
    )


def table(results: SweepResults) -> list[list[str]]:
    """The trials as rows of words, best first, below a row of headings."""
    keys = swept_keys(results.trials)
    names = short_names(key for trial in results.trials for key in trial.overrides)
    head = ["", *(names[key] for key in keys), results.metric or "metric", "step", "time", "status"]
    rows = [
        [
            str(place) if trial.ranked else "",
            *(_value(trial, key) for key in keys),
            "–" if trial.value is None else _number(trial.value),
            "–" if trial.step is None else f"{trial.step:,}",
            "–" if trial.seconds is None else duration(trial.seconds),
            trial.status,
        ]
        for place, trial in enumerate(results.trials, start=1)
    ]
    return [head, *rows]


def text_table(results: SweepResults) -> str:
    """`table` for a terminal."""
    rows = table(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    reasons = [f"{trial.name}: {trial.reason}" for trial in results.trials if trial.reason]
    return "\n".join([*lines, *reasons])


def _number(value: float) -> str:
    """Five digits, zeros at the end included."""
    return f"{value:#.5g}".rstrip(".")


def _value(trial: TrialResult, key: str) -> str:
    return str(trial.overrides[key]) if key in trial.overrides else "–"


def _summary(results: SweepResults) -> Iterator[Fact]:
    count = {status: 0 for status in ("done", "failed")}
    for trial in results.trials:
        count[trial.status] = count.get(trial.status, 0) + 1
    failed = f"done, {count['failed']} failed" if count["failed"] else "done"
    yield Fact("Trials", f"{count['done']} of {len(results.trials)}", failed)
    if best := results.best:
        lowest = "lowest" if results.goal == "minimise" else "highest"
        yield Fact(f"{lowest.capitalize()} {results.metric}", _number(best.value))
        names = short_names(key for trial in results.trials for key in trial.overrides)
        for key in free_keys(results.trials):
            yield Fact(f"Best {names[key]}", _value(best, key))
    if any(trial.seconds for trial in results.trials):
        seconds = sum(trial.seconds or 0.0 for trial in results.trials)
        yield Fact("Time", duration(seconds), "all trials, over all starts")


def _shared(results: SweepResults) -> list[tuple[str, str]]:
    """(key, value) of what all trials set alike."""
    swept, first = swept_keys(results.trials), results.trials[0].overrides
    return [(key, str(value)) for key, value in first.items() if key not in swept]
