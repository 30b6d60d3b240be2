"""The figures of a comparison of models, as inline SVG; see `instar.evaluation.plots`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instar.evaluation.plots import COLOURS, SMALL, as_svg, styled_plot

_DASHED = (0, (4, 3))
# The height of a small plot over the width of two; see `plots.WIDE`.
_BROAD = (9.4, 2.6), (0.071, 0.185, 0.88, 0.775)


@styled_plot
def judge_plot(judge: str, models: Mapping[str, Mapping[str, float]], candidate: str) -> str:
    """A judge's mean of each model with its 95 % interval."""
    figure, axes = _axes(SMALL)
    _draw(axes, list(models), list(models.values()), candidate)
    axes.set_ylabel(f"score by {judge}")
    return as_svg(figure, f"judge-{judge}", f"Score by {judge} of each model")


@styled_plot
def wins_plot(wins: Sequence[Mapping[str, Any]], baseline: str, candidate: str, broad: bool) -> str:
    """How often each model beats the baseline, by each judge, with 95 % intervals."""
    figure, axes = _axes(_BROAD if broad else SMALL)
    judges = {each["judge"]: None for each in wins}
    names = [f"{each['model']}\n{each['judge']}" if len(judges) > 1 else each["model"]
             for each in wins]  # fmt: skip
    colours = [candidate if each["model"] == candidate else "" for each in wins]
    _draw(axes, names, wins, candidate, colours)
    axes.axhline(0.5, color=COLOURS["muted"], linewidth=0.9, linestyle=_DASHED)
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"wins against {baseline}")
    return as_svg(figure, "against", f"Wins against {baseline}")


def _axes(
    shape: tuple[tuple[float, float], tuple[float, float, float, float]],
) -> tuple[Figure, Axes]:
    size, frame = shape
    figure = Figure(figsize=size)
    axes = figure.add_axes(frame)
    axes.tick_params(length=0)
    axes.grid(axis="x", visible=False)
    return figure, axes


def _draw(
    axes: Axes,
    names: Sequence[str],
    intervals: Sequence[Mapping[str, float]],
    candidate: str,
    owners: Sequence[str] | None = None,
) -> None:
    """A point with its interval over each name; those of the candidate stand out."""
    for place, (owner, each) in enumerate(zip(owners or names, intervals, strict=True)):
        ends = np.asarray([[each["value"] - each["low"]], [each["high"] - each["value"]]])
        axes.errorbar(
            [place],
            [each["value"]],
            yerr=np.maximum(ends, 0),
            fmt="o",
            color=COLOURS["eval" if owner == candidate else "train"],
            markersize=5.5,
            capsize=4,
            linewidth=1.6,
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
