"""The curves of a PPO run, as inline SVG; see `instar.evaluation.plots`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from instar.evaluation.plots import (
    COLOURS,
    WIDE,
    as_svg,
    draw_curve,
    step_axes,
    styled_plot,
)
from instar.evaluation.run_files import Series

# Lower than `plots.SMALL`, with room for a legend above the frame.
_SMALL = (4.55, 2.6), (0.147, 0.185, 0.752, 0.695)
_DASHED, _DOTTED = (0, (4, 3)), (0, (1, 1.5))
_STYLES = {
    "policy": {"color": COLOURS["eval"], "marker": "o", "markersize": 3.5, "linewidth": 1.4},
    "reference": {"color": COLOURS["muted"], "linestyle": _DASHED, "linewidth": 1.1},
    "first": {"color": COLOURS["train"], "linewidth": 1.5},
    "second": {"color": COLOURS["eval"], "linewidth": 1.2, "linestyle": _DASHED},
    "third": {"color": COLOURS["ink"], "linewidth": 1.0, "linestyle": _DOTTED},
}


@dataclass(frozen=True)
class Curve:
    """One curve: its values, what it is called, and how it is drawn.

    `style` is "training" (a faint raw and a smoothed curve), or one of `_STYLES`.
    """

    series: Series
    label: str | None = None
    style: str = "training"


@styled_plot
def score_plot(
    name: str,
    label: str,
    curves: Sequence[Curve],
    last_step: int,
    alarms: Sequence[int],
    wide: bool,
) -> str:
    """A score over iterations, with what the policy and its reference get on held-out prompts."""
    figure, axes = step_axes(WIDE if wide else _SMALL, last_step)
    _draw(axes, curves)
    _mark(axes, alarms, "alarm" if wide else None)
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    _legend(axes, columns=4)
    return as_svg(figure, _identifier(name), f"{label} over iterations")


@styled_plot
def measure_plot(
    name: str,
    label: str,
    curves: Sequence[Curve],
    last_step: int,
    alarms: Sequence[int] = (),
    *,
    floor: float | None = None,
    ceiling: float | None = None,
    beside: Curve | None = None,
) -> str:
    """A measure, or several of one unit, over iterations.

    Args:
      floor, ceiling: ends of the axis, where it should not follow the values.
      beside: a curve with an axis of its own, at the right.
    """
    figure, axes = step_axes(_SMALL, last_step)
    _draw(axes, curves)
    _mark(axes, alarms)
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=floor, top=ceiling)
    if beside is not None and len(beside.series.finite):
        right = axes.twinx()
        series = beside.series.finite
        right.plot(series.steps, series.values, **_STYLES[beside.style])
        axes.plot([], [], label=beside.label, **_STYLES[beside.style])  # for the legend
        right.set_ylim(0, max(1.25 * series.values.max(), 1e-9))
        right.spines["right"].set_visible(False)
        right.tick_params(length=0)
        right.grid(visible=False)
    _legend(axes, columns=4)
    return as_svg(figure, _identifier(name), f"{label} over iterations")


def _draw(axes: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        series = curve.series.finite
        if not len(series):
            continue
        if curve.style == "training":
            draw_curve(axes, series, curve.label)
        else:
            axes.plot(series.steps, series.values, label=curve.label, **_STYLES[curve.style])


def _mark(axes: Axes, alarms: Sequence[int], label: str | None = None) -> None:
    """A line at each iteration in which an alarm began to ring."""
    for number, step in enumerate(alarms):
        text = label if number == 0 else None
        axes.axvline(step, color=COLOURS["warn"], linewidth=1.0, alpha=0.75, label=text)


def _legend(axes: Axes, columns: int) -> None:
    """Above the frame's top edge, so that no curve lies below it."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.01, 0.98),
            ncols=columns,
            fontsize=8.5,
            borderpad=0,
            handlelength=1.4,
            columnspacing=1.0,
        )


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", name)
