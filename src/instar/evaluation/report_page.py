"""The templates of reports, filled in. Texts are escaped; what is HTML comes as `Markup`."""

import functools
import importlib.resources
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from instar.evaluation import plots
from instar.evaluation.report_words import Fact


def fill(template: str, **values: Any) -> Markup:
    """A template of the folder `templates` with its values, as HTML."""
    return Markup(_environment().get_template(template).render(**values).strip())


def summary_of(facts: Sequence[Fact | None]) -> Markup:
    """The figures at the top of a page; None are left out."""
    return fill("facts.html.jinja", facts=[fact for fact in facts if fact is not None])


def figures_of(drawn: Sequence[tuple[str, bool]], prefix: str = "") -> Markup:
    """Plots (SVG, whether it takes the whole width) in two columns.

    `prefix` keeps their ids apart where a page has those of several runs.
    """
    shown = [(plots.renamed(svg, prefix) if prefix else svg, wide) for svg, wide in drawn]
    return fill("figures.html.jinja", figures=[(Markup(svg), wide) for svg, wide in shown])


@functools.cache
def _environment() -> jinja2.Environment:
    folder = importlib.resources.files(__package__) / "templates"
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
