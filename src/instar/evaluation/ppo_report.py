"""What the report says of a PPO run.

Of metrics.jsonl it reads what `instar.reinforcement.update` watches, `gold/NAME`, `alarm/NAME`, and
`held_out/...`: what the policy comes to on the held-out prompts and, with `_reference` behind it,
the model that it was. Its samples have `completion` and `reference`, `score` and `reference_score`,
and `gold/NAME` and `reference_gold/NAME`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from instar.errors import UserError
from instar.evaluation import run_facts
from instar.evaluation.alarms import AlarmConfig, Alarms
from instar.evaluation.plots import grad_norm_plot, learning_rate_plot, throughput_plot
from instar.evaluation.ppo_plots import Curve, measure_plot, score_plot
from instar.evaluation.report_page import fill
from instar.evaluation.report_words import (
    Fact,
    median,
    plural,
    prompt_text,
    spread,
    steps_in_words,
)
from instar.evaluation.run_files import Run
from instar.schema import build

FORMULA = (
    "what each model reads of a response, and how often: the policy as it draws it, once more, and "
    "at the cost of three passes in each epoch, as does the critic, every other model once; "
    "and three passes of the policy over the pretraining text of each update, where there is any"
)
HELD_OUT = "held_out/"
# Of the held-out table: label, metric, format.
_COLUMNS = (
    ("KL (nats)", "kl", "{:.2f}"),
    ("perplexity", "perplexity", "{:.1f}"),
    ("distinct-2", "distinct_2", "{:.3f}"),
    ("length", "length", "{:.1f}"),
    ("ended", "eos_rate", "{:.0%}"),
)


def summary(run: Run) -> list[Fact | None]:
    """The figures at the top; None for what the files do not hold."""
    return [
        run_facts.steps(run, "Iterations"),
        _beside_reference(run, "score", "Score", "{:.3f}"),
        *(
            _beside_reference(run, f"gold/{name}", f"Score of {name}", "{:.3f}")
            for name in _gold(run)
        ),
        _win_rate(run),
        _beside_reference(run, "kl", "KL", "{:.2f}", "nats / response"),
        _beside_reference(run, "perplexity", "Perplexity", "{:.1f}", "by the base"),
        _beside_reference(run, "distinct_2", "Distinct-2", "{:.3f}"),
        _beside_reference(run, "eos_rate", "Ended by itself", "{:.0%}"),
        run_facts.tokens(run),
        run_facts.training_time(run),
        *run_facts.speed(run),
    ]


def figures(run: Run) -> list[tuple[str, bool]]:
    """(SVG, whether it takes the whole width) of what there is data for."""
    drawn = list(_of_scores(run))
    drawn += [(svg, False) for svg in (*_of_responses(run), *_of_updates(run))]
    return drawn


def key_figures(run: Run) -> list[tuple[str, bool]]:
    """Those of `figures` that the report of a chain shows."""
    known = [_measure(run, name) for name in ("kl", "perplexity", "entropy", "distinct")]
    drawn = [*_of_scores(run), *((svg, False) for svg in known if svg is not None)]
    return drawn if len(drawn) % 2 else drawn[:-1]  # one is wide, the others come in pairs


def sections(run: Run, evaluations: int = 12, samples: int = 16) -> list[Markup]:
    """The parts below the figures, as HTML: at most so many lines of each table."""
    return [
        fill(
            "ppo.html.jinja",
            columns=_header(run),
            lines=[_row(run, line) for line in spread(_held_out(run), evaluations)],
            samples=list(_samples(run))[:samples],
        )
    ]


def key_sections(run: Run) -> list[Markup]:
    """Those of `sections` that the report of a chain shows."""
    return sections(run, evaluations=3, samples=4)


def key_result(run: Run) -> str:
    """What the run came to, in a few words."""
    parts = []
    for name in ("score", *(f"gold/{name}" for name in _gold(run))):
        found = _last(run, name)
        if found is not None and found[1] is not None:
            label = name.removeprefix("gold/")
            parts.append(f"{label} {found[1]:.2f} → {found[0]:.2f}")
    if (kl := _last(run, "kl")) is not None:
        parts.append(f"KL {kl[0]:.1f} nats")
    if rung := sum(len(at) for _, at in alarms(run)):
        parts.append(plural(rung, "alarm"))
    return ", ".join(parts)


# --- Alarms -------------------------------------------------------------------------------------


def alarms(run: Run) -> list[tuple[str, list[int]]]:
    """(name, steps at which it rang) of each alarm that did."""
    rung = ((name, run.flagged(f"alarm/{name}")) for name in run.names("alarm/"))
    return [(name, at) for name, at in rung if at]


def banner(run: Run) -> Markup:
    """What makes alarms seen, at the top of the page; empty where none rang."""
    sentences = _sentences(run)
    rung = [
        (name.replace("_", " "), steps_in_words(at), sentences.get((name, at[0]), ""))
        for name, at in alarms(run)
    ]
    total = sum(len(at) for _, at in alarms(run))
    return fill("alarms.html.jinja", title=plural(total, "alarm"), alarms=rung)


def _sentences(run: Run) -> dict[tuple[str, int], str]:
    """What each alarm said when it rang, by name and step: the same alarms hear the run again."""
    try:
        bell = Alarms(build(run.config.get("alarms", {}), AlarmConfig))
    except UserError:
        return {}  # the run is of a version that watched something else
    return {
        (alarm.name, alarm.step): alarm.sentence
        for line in run.lines
        for alarm in bell.update(int(line["step"]), line)
    }


def _alarm_steps(run: Run) -> list[int]:
    return sorted({step for _, at in alarms(run) for step in at})


# --- Figures ------------------------------------------------------------------------------------

# label of the axis, (metric, label) of each curve, floor, ceiling
_MEASURES: dict[str, tuple[str, tuple[tuple[str, str | None], ...], float | None, float | None]] = {
    "kl": ("KL (nats / response)", (("kl", "k1"), ("kl_k2", "k2"), ("kl_k3", "k3")), None, None),
    "entropy": ("entropy (nats / token)", (("entropy", None),), 0, None),
    "perplexity": ("perplexity by the base", (("perplexity", None),), 0, None),
    "distinct": ("distinct n-grams", (("distinct_1", "n = 1"), ("distinct_2", "n = 2")), 0, 1),
    "self_bleu": ("self-BLEU", (("self_bleu", None),), 0, None),
    "length": ("tokens / response", (("length", None),), 0, None),
    "eos_rate": ("share that ended", (("eos_rate", None),), 0, 1.02),
    "disagreement": ("members' deviation", (("disagreement", None),), 0, None),
    "clip": (
        "clipped share",
        (("clip_fraction", "policy"), ("value_clip_fraction", "critic")),
        0,
        None,
    ),
    "value_loss": ("value loss", (("value_loss", None),), 0, None),
    "explained_variance": ("explained variance", (("explained_variance", None),), None, 1.02),
    "mismatch": ("|Δ log p|, sampler to trainer", (("mismatch", None),), 0, None),
}


def _of_scores(run: Run) -> Iterator[tuple[str, bool]]:
    names = {"score": "score", **{f"gold/{name}": f"score of {name}" for name in _gold(run)}}
    for name, label in names.items():
        curves = (
            Curve(run.series(name), "training prompts"),
            Curve(run.series(f"{HELD_OUT}{name}"), "held out", "policy"),
            Curve(run.series(f"{HELD_OUT}{name}_reference"), "reference", "reference"),
        )
        if any(len(curve.series.finite) for curve in curves):
            wide = name == "score"
            if not wide:
                curves = (Curve(curves[0].series), *curves[1:])
            drawn = score_plot(name, label, curves, run.last_step, _alarm_steps(run), wide)
            yield drawn, wide


def _of_responses(run: Run) -> Iterator[str]:
    """What the responses are like."""
    names = ("kl", "entropy", "perplexity", "distinct", "self_bleu", "length", "eos_rate")
    for name in names:
        if (drawn := _measure(run, name)) is not None:
            yield drawn
    if len((wins := run.series(f"{HELD_OUT}win_rate")).finite):
        curves = [Curve(wins, None, "policy")]
        label = "wins against the reference"
        yield measure_plot("wins", label, curves, run.last_step, floor=0, ceiling=1)


def _of_updates(run: Run) -> Iterator[str]:
    """How the two networks learn, and how fast."""
    for name in ("clip", "value_loss", "explained_variance", "disagreement", "mismatch"):
        if (drawn := _measure(run, name)) is not None:
            yield drawn
    if len((norm := run.series("grad_norm")).finite):
        clip = run.config.get("optimizer", {}).get("clip_norm")
        yield grad_norm_plot(norm, run.last_step, clip)
    if len((rate := run.series("learning_rate")).finite):
        yield learning_rate_plot(rate, run.last_step)
    if len((tokens := run.series("tokens_per_second")).finite):
        share, typical = median(run.series("mfu")), median(tokens)
        yield throughput_plot(tokens, run.last_step, share / typical if share and typical else None)


def _measure(run: Run, name: str) -> str | None:
    """The plot of a measure; None where there is nothing, or nothing but zeros, to see."""
    label, parts, floor, ceiling = _MEASURES[name]
    known = [(run.series(key), text) for key, text in parts]
    known = [(series, text) for series, text in known if series.finite.values.any()]
    if not known:
        return None
    if len(known) == 1:
        curves = [Curve(known[0][0])]
    else:
        styles = ("first", "second", "third")
        pairs = zip(known, styles, strict=False)
        curves = [Curve(series, text, style) for (series, text), style in pairs]
    beside = Curve(run.series("beta"), "β (right)", "reference") if name == "kl" else None
    return measure_plot(
        name,
        label,
        curves,
        run.last_step,
        _alarm_steps(run),
        floor=floor,
        ceiling=ceiling,
        beside=beside,
    )


# --- Held-out prompts ---------------------------------------------------------------------------


def _gold(run: Run) -> list[str]:
    return run.names("gold/")


def _held_out(run: Run) -> list[dict[str, float]]:
    return [line for line in run.others if f"{HELD_OUT}score" in line]


def _last(run: Run, name: str) -> tuple[float, float | None] | None:
    """The last held-out value of a metric and the reference's; before the first, in training."""
    held_out = run.series(f"{HELD_OUT}{name}").finite.values
    if len(held_out):
        reference = run.series(f"{HELD_OUT}{name}_reference").finite.values
        return float(held_out[-1]), float(reference[-1]) if len(reference) else None
    values = run.series(name).finite.values
    return (float(values[-1]), None) if len(values) else None


def _beside_reference(run: Run, name: str, label: str, form: str, unit: str = "") -> Fact | None:
    found = _last(run, name)
    if found is None:
        return None
    value, reference = found
    if reference is None:
        note = "last iteration"
    else:
        note = "held out" if name == "kl" else f"held out, reference {form.format(reference)}"
    return Fact(label, form.format(value), f"{unit}, {note}" if unit else note)


def _win_rate(run: Run) -> Fact | None:
    wins = run.series(f"{HELD_OUT}win_rate").finite.values
    return Fact("Wins", f"{wins[-1]:.0%}", "by score against the reference") if len(wins) else None


def _header(run: Run) -> list[str]:
    scores = ["score", *_gold(run)]
    return ["iteration", *scores, "wins", *(label for label, _, _ in _COLUMNS)]


def _row(run: Run, line: Mapping[str, float]) -> list[tuple[str, str]]:
    """(the policy's, the reference's) of each column."""
    cells = [(f"{int(line['step']):,}", "")]
    for name in ("score", *(f"gold/{name}" for name in _gold(run))):
        cells.append(_pair(line, name, "{:.3f}"))
    wins = line.get(f"{HELD_OUT}win_rate")
    cells.append(("–" if wins is None else f"{wins:.0%}", ""))
    cells += [_pair(line, name, form) for _, name, form in _COLUMNS]
    return cells


def _pair(line: Mapping[str, float], name: str, form: str) -> tuple[str, str]:
    values = (line.get(f"{HELD_OUT}{name}"), line.get(f"{HELD_OUT}{name}_reference"))
    own, reference = ("" if value is None else form.format(value) for value in values)
    return own or "–", "" if name == "kl" else reference


def _samples(run: Run) -> Iterator[dict[str, Any]]:
    """Those of the last evaluation, with what was said of them in small print."""
    with_reference = [sample for sample in run.samples if "reference" in sample]
    last = max((sample["step"] for sample in with_reference), default=None)
    for sample in [each for each in with_reference if each["step"] == last]:
        yield {
            "prompt": prompt_text(sample["prompt"]),
            "texts": [
                (str(sample["reference"]), _remark(sample, "reference_")),
                (str(sample.get("completion", "")), _remark(sample, "")),
            ],
            "step": int(sample["step"]),
        }


def _remark(sample: Mapping[str, Any], prefix: str) -> str:
    scores = {
        key.removeprefix(prefix).removeprefix("gold/"): value
        for key, value in sample.items()
        if key == f"{prefix}score" or key.startswith(f"{prefix}gold/")
    }
    return " · ".join(f"{name} {float(value):+.2f}" for name, value in scores.items())
