"""What the report says of a run that trains a reward model.

What the model is worth on rated texts comes from `reward.json`; of metrics.jsonl it reads `loss`,
`accuracy` (of the comparisons that are trained on) and `eval/SET/accuracy`.
"""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from instar.evaluation import run_facts
from instar.evaluation.plots import grad_norm_plot, learning_rate_plot
from instar.evaluation.report_words import Fact
from instar.evaluation.reward_plots import drawn, training_accuracy_plot, training_loss_plot
from instar.evaluation.run_files import Run

FORMULA = run_facts.TRAINED_ONCE
_HEAD = (
    *("set", "texts", "accuracy", "95 %", "members", "disagree", "ECE"),
    *("words", "one person", "alpha"),
)


def summary(run: Run) -> list[Fact | None]:
    """The figures at the top; None for what the files do not hold."""
    return [
        run_facts.steps(run),
        run_facts.tokens(run),
        run_facts.training_time(run),
        run_facts.last_mean(run, "loss", "Training loss", "nats / pair"),
        run_facts.last_mean(run, "accuracy", "Training accuracy", "share of pairs", digits=3),
        *_held_out(run),
        *run_facts.speed(run),
    ]


def figures(run: Run) -> list[tuple[str, bool]]:
    """(SVG, whether it takes the whole width) of what there is data for."""
    last, found = run.last_step, []
    if len((loss := run.series("loss")).finite):
        flags = run.flagged("skipped"), run.flagged("spike")
        found.append((training_loss_plot(loss, last, *flags), True))
    sets = {name: run.series(f"eval/{name}/accuracy") for name in _sets(run)}
    if len((accuracy := run.series("accuracy")).finite):
        found.append((training_accuracy_plot(accuracy, sets, last), False))
    if len((rate := run.series("learning_rate")).finite):
        found.append((learning_rate_plot(rate, last), False))
    if len((norm := run.series("grad_norm")).finite):
        clip = run.config.get("optimizer", {}).get("clip_norm")
        found.append((grad_norm_plot(norm, last, clip), False))
    return found


def key_figures(run: Run) -> list[tuple[str, bool]]:
    """Those of `figures` that the report of a chain shows."""
    return [] if run.reward.get("sets") else figures(run)[:1]


def sections(run: Run) -> list[Markup]:
    """The parts below the figures, as HTML."""
    return [section(run.reward)]


def key_sections(run: Run) -> list[Markup]:
    """Those of `sections` that the report of a chain shows."""
    return sections(run)


def key_result(run: Run) -> str:
    """What the run came to, in a few words."""
    for name, found in run.reward.get("sets", {}).items():
        accuracy = found["accuracy"]
        interval = f"{accuracy['low']:.3f} to {accuracy['high']:.3f}"
        return f"accuracy {accuracy['value']:.3f} ({interval}) on {name}"
    accuracy = run.series("accuracy").finite.values
    return f"training accuracy {accuracy[-1]:.3f}" if len(accuracy) else ""


def _sets(run: Run) -> list[str]:
    names = (name for name in run.names("eval/") if name.endswith("/accuracy"))
    return [name.removesuffix("/accuracy") for name in names]


def _held_out(run: Run) -> list[Fact]:
    facts = []
    for name, found in run.reward.get("sets", {}).items():
        accuracy = found["accuracy"]
        note = f"{accuracy['low']:.3f} to {accuracy['high']:.3f}, share of pairs"
        facts.append(Fact(f"Accuracy on {name}", f"{accuracy['value']:.3f}", note))
    return facts


def section(results: Mapping[str, Any]) -> Markup:
    """The section as HTML; empty where there are no results."""
    sets = results.get("sets", {})
    if not sets:
        return Markup("")
    rows = Markup("").join(_row(name, found) for name, found in sets.items())
    head = Markup("").join(Markup("<th>{}</th>").format(each) for each in _HEAD)
    figures = Markup("").join(
        Markup("<figure{}>{}</figure>").format(Markup(' class="wide"' * wide), Markup(svg))
        for svg, wide in drawn(sets)
    )
    return Markup(
        "<h2>Rated texts</h2>\n"
        '<table class="numbers"><tr>{}</tr>{}</table>\n'
        '<p class="note">Of two texts, how often the one that people rated higher has the higher '
        "score; the interval is that of drawing the texts anew. ECE is the mean distance between "
        "the probability that the model gives to a preference and how often it holds. Words: a "
        "linear model on words and pairs of words that learnt from the same ratings. One person: "
        "how often one rater agrees with the mean of the others; alpha: Krippendorff's, of the "
        "raters' scores.</p>\n"
        '<div class="plots">{}</div>\n'
    ).format(head, rows, figures)


def _row(name: str, found: Mapping[str, Any]) -> Markup:
    accuracy = found["accuracy"]
    cells = (
        name,
        f"{found['texts']:,}",
        f"{accuracy['value']:.3f}",
        f"{accuracy['low']:.3f} to {accuracy['high']:.3f}",
        ", ".join(f"{value:.3f}" for value in found["members"]),
        _number(found["disagreement"]),
        _number(found["calibration"]["error"]),
        *(_number(found[key]) for key in ("baseline", "person", "alpha")),
    )
    return Markup("<tr>{}</tr>").format(
        Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells)
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
