"""The figures of a sweep, as inline SVG: its metric over the values that were swept."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from instar.evaluation.plots import COLOURS, SMALL, WIDE, as_svg, one_two_five, styled_plot
from instar.evaluation.sweep_results import (
    SweepResults,
    TrialResult,
    free_keys,
    short_names,
    texts_of,
)

_MARKERS = "osD^vP*X"
# Values at which an axis has ticks of its own; where there are more, it has the usual ones.
_MOST_TICKS = 8
# How far above the middle of all values, in distances from the best to it, an axis reaches.
_REACH = 2.0


def drawn(results: SweepResults) -> list[tuple[str, bool]]:
    """(SVG, whether it takes the whole width) of what there is data for.

    Of one free key, and of two of which each value of one meets several of the other, one figure;
    of others one for each key.
    """
    trials, keys = results.trials, free_keys(results.trials)
    if not keys or results.best is None:
        return []
    counts = {key: len(set(texts_of(trials, key))) for key in keys}
    over = max(keys, key=lambda key: (_is_numeric(trials, key), counts[key]))
    others = [key for key in keys if key != over]
    if not others:
        return [(metric_plot(results, over, None, broad=True), True)]
    if len(others) == 1 and counts[others[0]] < len(trials):
        return [(metric_plot(results, over, others[0], broad=True), True)]
    return [(metric_plot(results, key, None, broad=False, joined=False), False) for key in keys]


@styled_plot
def metric_plot(
    results: SweepResults, over: str, by: str | None, broad: bool, joined: bool = True
) -> str:
    """The metric over the values of one key, with a line for each value of another.

    Trials without a value are crosses at the top; the best one has a ring.
    """
    names = short_names(key for trial in results.trials for key in trial.overrides)
    size, frame = WIDE if broad else SMALL
    figure = Figure(figsize=size)
    axes = figure.add_axes(frame)
    axes.tick_params(length=0)
    places = _places(axes, results.trials, over)
    lines = _ordered(results.trials, by) if by else [""]
    for number, value in enumerate(lines):
        of_line = [
            (places[trial.name], trial)
            for trial, text in zip(results.trials, _texts(results.trials, by), strict=True)
            if text == value
        ]
        points = sorted((place, trial.value) for place, trial in of_line if trial.ranked)
        axes.plot(
            *np.asarray(points, float).reshape(-1, 2).T,
            color=COLOURS["train"],
            alpha=1.0 if len(lines) == 1 else 0.3 + 0.7 * number / (len(lines) - 1),
            linestyle="solid" if joined else "none",
            linewidth=1.6,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            label=value or "left as it is",
        )
    _draw_missing(axes, [places[trial.name] for trial in results.trials if _came_to_nothing(trial)])
    _draw_best(axes, places[results.best.name], results.best.value)
    _limit(axes, [trial.value for trial in results.trials if trial.ranked], results.goal)
    axes.set_xlabel(names[over])
    axes.set_ylabel(results.metric)
    if by:
        axes.legend(title=names[by], loc="best", ncols=2 if len(lines) > 4 else 1)
    title = f"{results.metric} over {names[over]}" + (f" by {names[by]}" if by else "")
    return as_svg(figure, f"sweep-{names[over].replace('.', '-')}", escape(title))


def log_spaced(values: Sequence[float]) -> bool:
    """Whether numbers are more evenly spaced by factors than by differences.

    Two are where they are a factor of ten apart.
    """
    ordered = np.unique(np.asarray(values, float))
    if len(ordered) < 2 or ordered[0] <= 0:
        return False
    if len(ordered) == 2:
        return ordered[1] >= 10 * ordered[0]

    def unevenness(steps: np.ndarray) -> float:
        return steps.std() / steps.mean()

    # A little more will not do: equal steps are equal only up to rounding.
    return unevenness(np.diff(np.log(ordered))) < 0.9 * unevenness(np.diff(ordered)) - 1e-9


def _is_numeric(trials: Sequence[TrialResult], key: str) -> bool:
    values = [trial.overrides.get(key) for trial in trials]
    return all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)


def _texts(trials: Sequence[TrialResult], key: str | None) -> list[str]:
    return texts_of(trials, key) if key else [""] * len(trials)


def _ordered(trials: Sequence[TrialResult], key: str) -> list[str]:
    """The different values of a key as texts, numbers by size and others by their names."""
    values: dict[str, Any] = {str(t.overrides.get(key, "")): t.overrides.get(key) for t in trials}
    numeric = _is_numeric(trials, key)
    return sorted(values, key=lambda text: values[text] if numeric else text)


def _places(axes: Axes, trials: Sequence[TrialResult], key: str) -> dict[str, float]:
    """Where each trial lies on the horizontal axis, which is laid out for them."""
    if not _is_numeric(trials, key):
        order = _ordered(trials, key)
        axes.set_xticks(range(len(order)), [text or "left as it is" for text in order])
        axes.margins(x=0.15)
        texts = texts_of(trials, key)
        return {t.name: float(order.index(x)) for t, x in zip(trials, texts, strict=True)}
    values = {trial.name: float(trial.overrides[key]) for trial in trials}
    different = sorted(set(values.values()))
    logarithmic = log_spaced(different)
    if logarithmic:
        axes.set_xscale("log")
    if len(different) <= _MOST_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(different))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif logarithmic:
        within_ten = different[-1] < 15 * different[0]  # or nearly: one power of ten, or none
        axes.xaxis.set_major_formatter(FuncFormatter(one_two_five))
        axes.xaxis.set_minor_formatter(
            FuncFormatter(one_two_five) if within_ten else NullFormatter()
        )
    return values


def _came_to_nothing(trial: TrialResult) -> bool:
    return trial.status == "failed" or (trial.status == "done" and trial.value is None)


def _draw_missing(axes: Axes, places: Sequence[float]) -> None:
    if not places:
        return
    top = axes.get_xaxis_transform()
    style = {"color": COLOURS["warn"], "markersize": 6, "linestyle": "none"}
    axes.plot(places, [0.96] * len(places), marker="x", transform=top, **style)
    axes.annotate(
        "no result",
        (max(places), 0.96),
        xycoords=top,
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=COLOURS["warn"],
    )


def _draw_best(axes: Axes, place: float, value: float) -> None:
    ring = {"markerfacecolor": "none", "markeredgecolor": COLOURS["eval"], "markeredgewidth": 1.6}
    axes.plot([place], [value], marker="o", markersize=11, linestyle="none", **ring)
    axes.annotate(
        f"{value:.4g}",
        (place, value),
        xytext=(0, -15),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        color=COLOURS["eval"],
    )


def _limit(axes: Axes, values: Sequence[float], goal: str) -> None:
    """Leaves room around the values; of those far on the worse side, lines run off the frame."""
    sign = 1.0 if goal == "minimise" else -1.0
    ordered = np.sort(sign * np.asarray(values, float))
    best, middle, worst = ordered[0], float(np.median(ordered)), ordered[-1]
    edge = min(worst, middle + _REACH * (middle - best)) if middle > best else worst
    room = max(edge - best, 1e-3 * max(math.fabs(best), 1e-6))
    ends = sign * (best - 0.14 * room), sign * (edge + 0.12 * room)
    axes.set_ylim(min(ends), max(ends))
