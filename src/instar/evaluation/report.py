"""A run as one page: `report.html`, self-contained, made from nothing but the run's own files."""

import json
from dataclasses import dataclass
from types import ModuleType

from etils import epath
from markupsafe import Markup

from instar.errors import UserError
from instar.evaluation import language_report, ppo_report, reward_report, run_facts
from instar.evaluation.family_report import family
from instar.evaluation.report_page import figures_of, fill, summary_of
from instar.evaluation.run_files import Run, load_run

REPORT = "report.html"
# What a page says of a run is a matter of its stage. Each of these modules has the functions
# summary, figures, sections, and, for the report of a chain, key_figures, key_sections, key_result.
STAGES: dict[str, ModuleType] = {"reward": reward_report, "ppo": ppo_report}


@dataclass(frozen=True)
class ReportOptions:
    """Writes `report.html` into the folder of a run again."""

    workdir: str


def report(options: ReportOptions) -> None:
    """Writes the report of a run and says where it is."""
    print(write_report(options.workdir))


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes `report.html` into a run's folder and returns its path.

    Raises:
      UserError: the folder holds no run, or one of its JSON files is damaged.
    """
    folder = epath.Path(workdir)
    return write_page(folder, render(load_run(folder)))


def write_page(folder: epath.Path, page: str) -> epath.Path:
    """Writes a page as a folder's `report.html`. Raises UserError where that fails."""
    path = folder / REPORT
    try:
        path.write_text(page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None
    return path


def stage_report(run: Run) -> ModuleType:
    """The module that reports on the stage of a run."""
    return STAGES.get(run.stage, language_report)


def render(run: Run) -> Markup:
    """The page as HTML."""
    stage = stage_report(run)
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
