"""A run as one page: `report.html`, self-contained, made from nothing but the run's own files.

So is a comparison of models, a chain of commands with all of its runs, and a sweep.
"""

import json
import math
from dataclasses import dataclass

from etils import epath
from markupsafe import Markup

from instar.errors import UserError
from instar.evaluation import (
    chain_report,
    compare_report,
    ppo_report,
    run_facts,
    stage_reports,
    sweep_report,
    sweep_results,
)
from instar.evaluation.family_report import family
from instar.evaluation.report_page import figures_of, fill, summary_of
from instar.evaluation.run_files import Run, load_run

REPORT = "report.html"


@dataclass(frozen=True)
class ReportOptions:
    """Writes `report.html` into the folder of a run, a comparison, a pipeline or a sweep again.

    `price` is what an hour of the machine costs; a pipeline's report then says what it came to.
    """

    workdir: str
    price: float | None = None

    def check(self) -> None:
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UserError(f"price must not be negative ({self.price})")


def report(options: ReportOptions) -> None:
    """Writes the report of a run and says where it is; that of a sweep with its table."""
    folder = epath.Path(options.workdir)
    if (folder / sweep_results.RECORD).exists():
        print(sweep_report.text_table(sweep_results.collect(folder)))
    print(write_report(options.workdir, options.price))


def write_report(workdir: epath.PathLike, price: float | None = None) -> epath.Path:
    """Writes `report.html` into the folder of a run, comparison, pipeline or sweep; gives its path.

    The results of a sweep are collected anew, into `sweep.json` too.

    Args:
      price: what an hour of a pipeline's machine costs; None leaves the cost out.

    Raises:
      UserError: the folder holds no run, or one of its JSON files is damaged.
    """
    folder = epath.Path(workdir)
    if (folder / chain_report.RECORD).exists():
        return write_page(folder, chain_report.page(folder, price))
    if (folder / sweep_results.RECORD).exists():
        results = sweep_results.collect(folder)
        sweep_results.write_results(folder, results)
        return write_page(folder, sweep_report.page(folder, results))
    if compared := compare_report.load(folder):
        return write_page(folder, compare_report.page(folder, compared))
    return write_page(folder, render(load_run(folder)))


def write_page(folder: epath.Path, page: str) -> epath.Path:
    """Writes a page as a folder's `report.html`. Raises UserError where that fails."""
    path = folder / REPORT
    try:
        path.write_text(page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None
    return path


def render(run: Run) -> Markup:
    """The page as HTML."""
    stage = stage_reports.of(run)
    figures = stage.figures(run)
    return fill(
        "run.html.jinja",
        name=run.name,
        stage=run.stage,
        subtitle=run_facts.subtitle(run),
        alarms=ppo_report.banner(run),
        summary=summary_of(stage.summary(run)),
        figures=figures_of(figures) if figures else "",
        sections=stage.sections(run),
        events=run_facts.events(run),
        tables=run_facts.tables(run),
        family=family(run.lineage),
        formula=run_facts.formula(run, stage.FORMULA),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )
