"""The figures of what a reward model is worth, as inline SVG; see `instar.evaluation.plots`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from instar.evaluation.plots import (
    COLOURS,
    SMALL,
    WIDE,
    as_svg,
    draw_curve,
    step_axes,
    styled_plot,
)
from instar.evaluation.run_files import Series

_DASHED = (0, (4, 3))


@styled_plot
def reliability_plot(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """How often the better text wins against how sure the model is of it, for each set."""
    figure, axes = _axes(SMALL)
    axes.plot([0.5, 1], [0.5, 1], color=COLOURS["muted"], linewidth=0.9, linestyle=_DASHED)
    for index, (name, found) in enumerate(sets.items()):
        bins = found["calibration"]["bins"]
        axes.plot(
            [each["predicted"] for each in bins],
            [each["observed"] for each in bins],
            **_curve(index, name),
        )
    axes.set_xlim(0.5, 1.0)
    axes.set_ylim(0.4, 1.02)
    axes.set_xlabel("predicted probability of the preference")
    axes.set_ylabel("share that agrees")
    axes.legend(loc="upper left", fontsize=8.5, borderpad=0)
    return as_svg(figure, "reliability", "Predicted against observed preferences")


@styled_plot
def gap_plot(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy over the gap of the two texts' ratings, for each set."""
    figure, axes = _axes(SMALL)
    for index, (name, found) in enumerate(sets.items()):
        bins = found["by_gap"]
        axes.plot(
            [each["gap"] for each in bins],
            [each["accuracy"] for each in bins],
            **_curve(index, name),
        )
    axes.axhline(0.5, color=COLOURS["muted"], linewidth=0.9, linestyle=_DASHED)
    axes.set_ylim(0.4, 1.02)
    axes.set_xlabel("gap of the ratings")
    axes.set_ylabel("accuracy in pairs")
    axes.legend(loc="lower right", fontsize=8.5, borderpad=0)
    return as_svg(figure, "gap", "Accuracy over the gap of the ratings")


@styled_plot
def accuracy_plot(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy on each set with its interval, beside the words' baseline and one person."""
    figure, axes = _axes(WIDE)
    places = np.arange(len(sets))
    found = list(sets.values())
    # Of a set without pairs they are null, here NaN, and nothing is drawn.
    values = np.asarray([each["accuracy"]["value"] for each in found], float)
    ends = np.asarray([[each["accuracy"][end] for each in found] for end in ("low", "high")], float)
    axes.bar(places, values - 0.4, bottom=0.4, width=0.5, color=COLOURS["train"], alpha=0.85)
    axes.errorbar(
        places,
        values,
        yerr=np.abs(ends - values),
        fmt="none",
        ecolor=COLOURS["ink"],
        capsize=3,
        linewidth=1.1,
    )
    for key, colour, label in (
        ("baseline", "eval", "bag of words"),
        ("person", "ink", "one person"),
    ):
        known = [(place, each[key]) for place, each in enumerate(found) if each[key] is not None]
        for number, (place, value) in enumerate(known):
            axes.plot(
                [place - 0.36, place + 0.36],
                [value, value],
                color=COLOURS[colour],
                linewidth=1.8,
                label=label if number == 0 else None,
            )
    axes.set_xticks(places, list(sets))
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0.4, 1.0)
    axes.set_ylabel("accuracy in pairs")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", ncols=2, fontsize=8.5, borderpad=0)
    return as_svg(figure, "accuracy", "Accuracy on each set")


@styled_plot
def training_accuracy_plot(accuracy: Series, sets: Mapping[str, Series], last_step: int) -> str:
    """The share of pairs in which the better text wins: those trained on, and each set's."""
    figure, axes = step_axes(SMALL, last_step)
    draw_curve(axes, accuracy.finite, "training")
    for index, (name, series) in enumerate(sets.items()):
        style = _curve(index + 1, name)
        axes.plot(series.finite.steps, series.finite.values, **style)
    axes.axhline(0.5, color=COLOURS["muted"], linewidth=0.9, linestyle=_DASHED)
    axes.set_ylabel("accuracy in pairs")
    axes.legend(loc="lower right", fontsize=8.5, borderpad=0)
    return as_svg(figure, "learning", "Accuracy over steps")


def drawn(sets: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, bool]]:
    """(SVG, whether it takes the whole width) of the sets of a `reward.json`, if it has any."""
    if not sets:
        return []
    return [
        (accuracy_plot(sets), True),
        (reliability_plot(sets), False),
        (gap_plot(sets), False),
    ]


def _axes(
    shape: tuple[tuple[float, float], tuple[float, float, float, float]],
) -> tuple[Figure, Axes]:
    size, frame = shape
    figure = Figure(figsize=size)
    axes = figure.add_axes(frame)
    axes.tick_params(length=0)
    return figure, axes


def _curve(index: int, name: str) -> dict[str, Any]:
    """The first set, which is the model's own domain, stands out; the others differ by dashes."""
    dashes = ("solid", _DASHED, (0, (1, 1.5)), (0, (5, 2, 1, 2)))
    return {
        "color": COLOURS["train" if index == 0 else "eval"],
        "linestyle": dashes[0] if index == 0 else dashes[(index - 1) % len(dashes)],
        "linewidth": 1.6 if index == 0 else 1.1,
        "marker": "o",
        "markersize": 3 if index == 0 else 2,
        "label": name,
    }
