"""The report of a chain of commands: its folder's `pipeline.json`, and what the steps left behind.

`instar pipeline` writes that file: of each step, by name, its `command`, what it was `told`, its
`status`, when it `started` and its `seconds`.
"""

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath
from markupsafe import Markup

from instar.evaluation import compare_report, plots, ppo_report, stage_reports
from instar.evaluation.family_report import family
from instar.evaluation.report_page import figures_of, fill, summary_of
from instar.evaluation.report_words import Fact, date, duration, plural, quantity
from instar.evaluation.run_facts import hardware_in_words
from instar.evaluation.run_files import Run, holds_run, load_run, read_optional

RECORD = "pipeline.json"


@dataclass(frozen=True)
class Step:
    """One command of the chain.

    Attributes:
      record: what pipeline.json says of it.
      folder: what it wrote; None where that is unknown.
      run: of a command that trains; None for others.
      compared: the results of `instar compare`; {} for others.
    """

    name: str
    record: Mapping[str, Any]
    folder: epath.Path | None
    run: Run | None
    compared: Mapping[str, Any]

    @property
    def command(self) -> str:
        return self.record["command"]

    @property
    def seconds(self) -> float:
        return self.record.get("seconds", 0.0)


def page(folder: epath.Path, price: float | None = None) -> Markup:
    """The page of a chain as HTML.

    Args:
      price: what an hour of the machine costs, in any currency; None leaves the cost out.

    Raises:
      UserError: a file is damaged.
    """
    steps = load_chain(folder)
    runs = [step for step in steps if step.run is not None]
    compared = [step for step in steps if step.compared]
    model = next((step for step in reversed(runs) if step.run.lineage), None)
    return fill(
        "chain.html.jinja",
        name=folder.resolve().name,
        stage="pipeline",
        subtitle=_subtitle(steps),
        summary=summary_of(_summary(steps, price)),
        steps=[_row(step, price) for step in steps],
        total=_total(steps, price),
        price=price,
        sections=[_run_section(step) for step in runs],
        comparisons=[
            (step.name, compare_report.section(step.folder, step.compared, step.name))
            for step in compared
        ],
        model="" if model is None else model.name,
        family="" if model is None else family({model.name: model.run.lineage}),
    )


def load_chain(folder: epath.Path) -> list[Step]:
    """The steps in their order. Raises UserError where a file is damaged."""
    return [_load(folder, name, each) for name, each in read_optional(folder / RECORD).items()]


def _load(folder: epath.Path, name: str, record: Mapping[str, Any]) -> Step:
    place = folder / name
    if not place.exists() and "to" in record.get("told", {}):
        place = epath.Path(record["told"]["to"])
    if not place.exists():
        return Step(name, record, None, None, {})
    compared = compare_report.load(place)
    # A prepared data set has a config as a run has one.
    trained = not compared and record["command"] != "prepare" and holds_run(place)
    return Step(name, record, place, load_run(place) if trained else None, compared)


# --- The summary --------------------------------------------------------------------------------


def _subtitle(steps: Sequence[Step]) -> str:
    """When the chain began, on what, and by which version."""
    started = [step.record["started"] for step in steps if "started" in step.record]
    machines = [step.run.facts.get("hardware", {}) for step in steps if step.run is not None]
    versions = [step.run.lineage.get("instar") for step in steps if step.run is not None]
    parts = [date(min(started))] if started else []
    parts += hardware_in_words(next((each for each in machines if each), {}))
    version = next((each for each in reversed(versions) if each), None)
    return " · ".join([*parts, f"instar {version or importlib.metadata.version('instar')}"])


def _summary(steps: Sequence[Step], price: float | None) -> Iterator[Fact]:
    done = sum(step.record.get("status") == "done" for step in steps)
    yield Fact("Steps", f"{done} of {len(steps)}", "done")
    seconds = sum(step.seconds for step in steps)
    yield Fact("Time", duration(seconds), "all steps, over all starts")
    if price is not None:
        yield Fact("Cost", f"{seconds / 3600 * price:.2f}", f"at {price:g} an hour")
    for step in steps:
        if step.compared:
            yield from compare_report.facts(step.compared)


def _row(step: Step, price: float | None) -> dict[str, str]:
    status = step.record.get("status", "")
    return {
        "name": step.name,
        "command": step.command,
        "time": duration(step.seconds),
        "tokens": _tokens(step),
        "result": _result(step) if status == "done" else status,
        "cost": "" if price is None else f"{step.seconds / 3600 * price:.2f}",
    }


def _total(steps: Sequence[Step], price: float | None) -> dict[str, str]:
    seconds = sum(step.seconds for step in steps)
    cost = "" if price is None else f"{seconds / 3600 * price:.2f}"
    return {"time": duration(seconds), "cost": cost}


def _tokens(step: Step) -> str:
    if step.run is not None:
        seen = step.run.lineage.get("tokens")
        return quantity(seen) if seen else "–"
    sources = _manifest(step)
    return quantity(sum(each["tokens"] for each in sources)) if sources else "–"


def _result(step: Step) -> str:
    """What a step came to, in a few words."""
    if step.run is not None:
        return stage_reports.of(step.run).key_result(step.run)
    if step.compared:
        return compare_report.key_result(step.compared)
    if sources := _manifest(step):
        return plural(sum(each["documents"] for each in sources), "document")
    facts = {} if step.folder is None else read_optional(step.folder / "facts.json")
    if "sentences" in facts:
        return f"{facts['sentences']:,} rated sentences, {facts['held_out']:,} held out"
    return ""


def _manifest(step: Step) -> list[Mapping[str, Any]]:
    """What a prepared data set says of its sources."""
    if step.command != "prepare" or step.folder is None:
        return []
    return list(read_optional(step.folder / "manifest.json").get("sources", {}).values())


# --- The steps ----------------------------------------------------------------------------------


def _run_section(step: Step) -> dict[str, Any]:
    """What the page says of a run: its main figures, and what its stage finds worth telling."""
    stage = stage_reports.of(step.run)
    sections = [Markup(plots.renamed(str(s), step.name)) for s in stage.key_sections(step.run)]
    figures = stage.key_figures(step.run)
    return {
        "name": step.name,
        "result": stage.key_result(step.run),
        "alarms": ppo_report.banner(step.run),
        "figures": figures_of(figures, step.name) if figures else "",
        "sections": sections,
    }
