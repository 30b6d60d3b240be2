"""The curves of a report as inline SVG that follows the page's colours, light or dark.

Matplotlib draws with placeholder colours; each is then replaced by a CSS variable of the page, and
texts take the page's font.
"""

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from instar.evaluation.run_files import Series

P = ParamSpec("P")

# Placeholder colours, each of which stands for the CSS variable of the same name.
COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "train": "#040404",
    "eval": "#050505",
    "warn": "#060606",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
}
# Width and height in inches, and the frame's left, bottom, width and height as shares of them, so
# that the frames of two columns, and of the plot above both, line up.
WIDE = (9.4, 3.7), (0.071, 0.135, 0.88, 0.79)
SMALL = (4.55, 2.6), (0.147, 0.185, 0.752, 0.775)
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# More points than this are drawn as the lowest and the highest of each of half as many groups.
_MOST_POINTS = 1200


def styled_plot(draw: Callable[P, str]) -> Callable[P, str]:
    """Runs a drawing function under `_STYLE`, which Matplotlib reads as each part is made."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """A centred moving mean of finite values.

    The window shrinks towards the start on both sides, so that a steep beginning is not bent, and
    towards the end on the right side alone, where the curve is flat and calm matters more.
    """
    count, half = len(values), window // 2
    index = np.arange(count)
    first = index - np.minimum(half, index)
    last = index + np.minimum(np.minimum(half, index), count - 1 - index)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


@styled_plot
def loss_plot(
    train: Series,
    held_out: Series,
    last_step: int,
    skipped: Sequence[int] = (),
    spikes: Sequence[int] = (),
    unit: str = "nats / token",
) -> str:
    """Training loss, raw and smoothed, with held-out loss; skipped steps and spikes at the top."""
    figure, axes = step_axes(WIDE, last_step)
    train, held_out = train.finite, held_out.finite
    draw_curve(axes, train, "training")
    if len(held_out):
        draw_points(axes, held_out, "held out")
    draw_flags(axes, skipped, spikes)
    axes.set_ylabel(f"loss ({unit})")
    _limit_loss(axes, train, held_out)
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.98), ncols=4, borderpad=0)
    return as_svg(figure, "loss", "Training and held-out loss over steps")


@styled_plot
def learning_rate_plot(rate: Series, last_step: int) -> str:
    """The learning rate, in units of the power of ten below its peak."""
    figure, axes = step_axes(SMALL, last_step)
    rate = rate.finite
    power = math.floor(math.log10(max(rate.values.max(), 1e-30)))
    axes.plot(rate.steps, rate.values / 10.0**power, color=COLOURS["train"], linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(
        "learning rate" + (f" (×10{str(power).translate(_SUPERSCRIPT)})" if power else "")
    )
    return as_svg(figure, "rate", "Learning rate over steps")


@styled_plot
def grad_norm_plot(norm: Series, last_step: int, clip: float | None) -> str:
    """The global norm of the gradient, with the norm to which it is clipped."""
    figure, axes = step_axes(SMALL, last_step)
    norm = norm.finite
    draw_curve(axes, norm)
    positive = norm.values[norm.values > 0]
    if len(positive) and positive.max() > 8 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(one_two_five))
        axes.yaxis.set_minor_formatter(FuncFormatter(one_two_five))
    if clip is not None:
        axes.axhline(clip, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            "clipped above",
            (1, clip),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=COLOURS["muted"],
        )
    axes.set_ylabel("gradient norm")
    return as_svg(figure, "norm", "Norm of the gradient over steps")


@styled_plot
def throughput_plot(rate: Series, last_step: int, mfu_at_rate: float | None) -> str:
    """Tokens a second; `mfu_at_rate` is the MFU of one token a second, for the right-hand axis."""
    figure, axes = step_axes(SMALL, last_step)
    rate = rate.finite
    draw_curve(axes, rate)
    axes.set_ylim(0, 1.15 * max(_percentile(rate.values, 99), 1e-9))
    axes.set_ylabel("tokens / s")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
    if mfu_at_rate:
        share = axes.secondary_yaxis(
            "right",
            functions=(lambda x: 100 * x * mfu_at_rate, lambda x: x / mfu_at_rate / 100),
        )
        share.set_ylabel("MFU (%)")
        share.spines["right"].set_visible(False)
        share.tick_params(length=0)
        # Its 0 would lie on the last number of the axis of steps.
        share.yaxis.set_major_locator(MaxNLocator(nbins=6, prune="lower"))
    return as_svg(figure, "throughput", "Tokens a second over steps")


@styled_plot
def bits_plot(bits: Series, last_step: int) -> str:
    """Bits per byte of held-out text."""
    figure, axes = step_axes(SMALL, last_step)
    draw_points(axes, bits.finite)
    axes.set_ylabel("held-out bits / byte")
    return as_svg(figure, "bits", "Held-out bits per byte over steps")


def thousands(value: float) -> str:
    """950, 12k, 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def one_two_five(value: float, _: int | None) -> str:
    """0.2, 0.5, 1, 2, 5: enough of the ticks of a logarithmic axis."""
    return f"{value:g}" if f"{value:.0e}"[0] in "125" else ""


def draw_points(axes: Axes, series: Series, label: str | None = None) -> None:
    """A curve of held-out text, with its points where they are few."""
    marker = "o" if len(series) <= 30 else None
    style = {"color": COLOURS["eval"], "marker": marker, "markersize": 3.5, "linewidth": 1.4}
    axes.plot(series.steps, series.values, label=label, **style)


def draw_flags(axes: Axes, skipped: Sequence[int], spikes: Sequence[int]) -> None:
    """Marks steps at the top of a frame."""
    for steps, marker, label in ((spikes, "v", "spike"), (skipped, "x", "skipped step")):
        if len(steps):
            top = axes.get_xaxis_transform()
            axes.plot(
                steps,
                [0.97] * len(steps),
                marker,
                transform=top,
                color=COLOURS["warn"],
                markersize=5,
                label=label,
            )


def step_axes(
    shape: tuple[tuple[float, float], tuple[float, float, float, float]], last_step: int
) -> tuple[Figure, Axes]:
    """An empty frame over the steps 0 to `last_step`."""
    size, frame = shape
    figure = Figure(figsize=size)
    axes = figure.add_axes(frame)
    axes.set_xlim(0, max(last_step, 1) * 1.01)
    axes.set_xlabel("step")
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure, axes


def draw_curve(axes: Axes, series: Series, label: str | None = None) -> None:
    """A faint raw curve and a smoothed one; points where there are few of them."""
    if len(series) < 30:
        marker = "o" if len(series) < 3 else None
        axes.plot(
            series.steps,
            series.values,
            color=COLOURS["train"],
            linewidth=1.4,
            marker=marker,
            markersize=3.5,
            label=label,
        )
        return
    raw = _envelope(series)
    axes.plot(raw.steps, raw.values, color=COLOURS["train"], alpha=0.28, linewidth=0.7)
    smoothed = _thinned(series.steps, smooth(series.values, max(5, len(series) // 40)))
    axes.plot(smoothed.steps, smoothed.values, color=COLOURS["train"], linewidth=1.6, label=label)


def _envelope(series: Series) -> Series:
    """At most `_MOST_POINTS` points that keep every low and every high."""
    if len(series) <= _MOST_POINTS:
        return series
    groups = np.array_split(np.arange(len(series)), _MOST_POINTS // 2)
    kept = [
        sorted({g[0] + series.values[g].argmin(), g[0] + series.values[g].argmax()}) for g in groups
    ]
    index = np.concatenate(kept)
    return Series(series.steps[index], series.values[index])


def _thinned(steps: np.ndarray, values: np.ndarray) -> Series:
    index = np.unique(np.linspace(0, len(steps) - 1, _MOST_POINTS // 2).astype(int))
    return Series(steps[index], values[index])


def _limit_loss(axes: Axes, train: Series, held_out: Series) -> None:
    """Gives the height to the part after the first fall, which runs off the top."""
    if len(train) < 30:
        return
    start = len(train) // 30
    calm = smooth(train.values, max(5, len(train) // 40))[start:]
    late = held_out.values[held_out.steps >= train.steps[start]]
    high = max(calm.max(), *late) if len(late) else calm.max()
    low = min(_percentile(train.values[start:], 0.5), calm.min(), *late)
    margin = 0.06 * max(high - low, 1e-3)
    axes.set_ylim(low - margin, high + 3 * margin)


def _percentile(values: np.ndarray, share: float) -> float:
    return float(np.percentile(values, share)) if len(values) else 0.0


def as_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an <svg> element; `name` keeps its ids apart from those of other plots."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = renamed(text, name)
    text = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg class="plot" role="img" aria-label="{title}" \1>',
        text,
        count=1,
    )
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def renamed(svg: str, name: str) -> str:
    """The figure with `name` before each of its ids, to keep them apart from those of others."""
    return re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
