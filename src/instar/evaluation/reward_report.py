"""What the report says of a run that trains a reward model, and of what `reward.json` holds."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from instar.evaluation import plots, run_facts
from instar.evaluation.report_words import Fact, number
from instar.evaluation.reward_plots import drawn, training_accuracy_plot
from instar.evaluation.run_files import Run

FORMULA = run_facts.TRAINED_ONCE
_UNIT = "nats / comparison"
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
        run_facts.last_mean(run, "loss", "Training loss", _UNIT),
        run_facts.last_mean(run, "accuracy", "Training accuracy", "in pairs", 3),
        *(
            Fact(
                f"Accuracy on {name}",
                number(found["accuracy"]["value"]),
                _ends(found["accuracy"]),
            )
            for name, found in _sets(run).items()
        ),
        *run_facts.speed(run),
    ]


def figures(run: Run) -> list[tuple[str, bool]]:
    """(SVG, whether it takes the whole width) of what there is data for."""
    last, shown = run.last_step, _loss(run)
    if len((accuracy := run.series("accuracy")).finite):
        names = (name for name in run.names("eval/") if name.endswith("/accuracy"))
        sets = {name.removesuffix("/accuracy"): run.series(f"eval/{name}") for name in names}
        shown.append((training_accuracy_plot(accuracy, sets, last), False))
    if len((rate := run.series("learning_rate")).finite):
        shown.append((plots.learning_rate_plot(rate, last), False))
    if len((norm := run.series("grad_norm")).finite):
        clip = run.config.get("optimizer", {}).get("clip_norm")
        shown.append((plots.grad_norm_plot(norm, last, clip), False))
    return shown + list(drawn(_sets(run)))


def key_figures(run: Run) -> list[tuple[str, bool]]:
    """Those of `figures` that the report of a chain shows."""
    return list(drawn(_sets(run))) or _loss(run)


def sections(run: Run) -> list[Markup]:
    """The parts below the figures, as HTML."""
    return [table(_sets(run))] if _sets(run) else []


def key_sections(run: Run) -> list[Markup]:
    """Those of `sections` that the report of a chain shows."""
    return sections(run)


def key_result(run: Run) -> str:
    """What the run came to, in a few words."""
    parts = (f"{name} {number(found['accuracy']['value'])}" for name, found in _sets(run).items())
    if found := ", ".join(parts):
        return f"accuracy in pairs: {found}"
    trained = run.series("accuracy").finite.values
    return f"accuracy in the last pairs of training: {trained[-1]:.3f}" if len(trained) else ""


def _loss(run: Run) -> list[tuple[str, bool]]:
    loss = run.series("loss")
    if not len(loss.finite):
        return []
    flags, held_out = (run.flagged("skipped"), run.flagged("spike")), run.series("eval/loss")
    return [(plots.loss_plot(loss, held_out, run.last_step, *flags, unit=_UNIT), True)]


def _sets(run: Run) -> Mapping[str, Any]:
    return run.reward.get("sets", {})


def table(sets: Mapping[str, Any]) -> Markup:
    """A row for each set."""
    rows = Markup("").join(_row(name, found) for name, found in sets.items())
    head = Markup("").join(Markup("<th>{}</th>").format(each) for each in _HEAD)
    return Markup(
        "<h2>Rated texts</h2>\n"
        '<div class="scroll"><table class="named"><tr>{}</tr>{}</table></div>\n'
        '<p class="note">Of two texts that are compared, how often the one that people rated '
        "higher has the higher score; the interval is that of drawing texts, or prompts, anew. ECE "
        "is the mean distance between the probability that the model gives to a preference and how "
        "often it holds. Words: a linear model on words and pairs of words that learnt from the "
        "same ratings. One person: how often one rater agrees with the mean of the others; alpha: "
        "Krippendorff's, of the raters' scores.</p>\n"
    ).format(head, rows)


def _row(name: str, found: Mapping[str, Any]) -> Markup:
    accuracy = found["accuracy"]
    cells = (
        name,
        f"{found['texts']:,}",
        number(accuracy["value"]),
        _ends(accuracy),
        ", ".join(map(number, found["members"])),
        number(found["disagreement"]),
        number(found["calibration"]["error"]),
        *(number(found[key]) for key in ("baseline", "person", "alpha")),
    )
    return Markup("<tr>{}</tr>").format(
        Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells)
    )


def _ends(interval: Mapping[str, float | None]) -> str:
    return f"{number(interval['low'])} to {number(interval['high'])}"
