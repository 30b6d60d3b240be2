"""What the report says of a run that trains a language model: pretraining and fine-tuning."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from instar.evaluation import plots, run_facts
from instar.evaluation.report_page import fill
from instar.evaluation.report_words import Fact, median, perplexity, spread
from instar.evaluation.run_files import Run

FORMULA = run_facts.TRAINED_ONCE
_SAMPLED_STEPS, _EVALUATIONS = 4, 12


def summary(run: Run) -> list[Fact | None]:
    """The figures at the top; None for what the files do not hold."""
    return [
        run_facts.steps(run),
        run_facts.tokens(run),
        run_facts.training_time(run),
        run_facts.last_mean(run, "loss", "Training loss", "nats / token"),
        *_held_out(run),
        *run_facts.speed(run),
    ]


def figures(run: Run) -> list[tuple[str, bool]]:
    """(SVG, whether it takes the whole width) of what there is data for."""
    last = run.last_step
    drawn = key_figures(run)[:1]
    if len((rate := run.series("learning_rate")).finite):
        drawn.append((plots.learning_rate_plot(rate, last), False))
    if len((norm := run.series("grad_norm")).finite):
        clip = run.config.get("optimizer", {}).get("clip_norm")
        drawn.append((plots.grad_norm_plot(norm, last, clip), False))
    if len((tokens := run.series("tokens_per_second")).finite):
        share, typical = median(run.series("mfu")), median(tokens)
        mfu_at_rate = share / typical if share and typical else None
        drawn.append((plots.throughput_plot(tokens, last, mfu_at_rate), False))
    if len((bits := run.series("eval/bits_per_byte")).finite):
        drawn.append((plots.bits_plot(bits, last), False))
    return drawn


def key_figures(run: Run) -> list[tuple[str, bool]]:
    """Those of `figures` that the report of a chain shows."""
    loss, held_out = run.series("loss"), run.series("eval/loss")
    if not len(loss.finite) and not len(held_out.finite):
        return []
    flags = run.flagged("skipped"), run.flagged("spike")
    return [(plots.loss_plot(loss, held_out, run.last_step, *flags), True)]


def sections(run: Run) -> list[Markup]:
    """The parts below the figures, as HTML."""
    return [
        fill(
            "language.html.jinja",
            evaluations=spread(run.evaluations, _EVALUATIONS),
            samples=_chosen(run.samples),
            perplexity=perplexity,
        )
    ]


def key_sections(run: Run) -> list[Markup]:
    """Those of `sections` that the report of a chain shows."""
    return []


def key_result(run: Run) -> str:
    """What the run came to, in a few words."""
    if not run.evaluations:
        return ""
    last = run.evaluations[-1]
    parts = [f"held-out loss {last['eval/loss']:.3f}"]
    if "eval/perplexity" in last:
        parts.append(f"perplexity {perplexity(last['eval/perplexity'])}")
    if "eval/bits_per_byte" in last:
        parts.append(f"{last['eval/bits_per_byte']:.3f} bits / byte")
    return ", ".join(parts)


def _held_out(run: Run) -> list[Fact]:
    if not run.evaluations:
        return []
    last = run.evaluations[-1]
    at = f"held out, step {int(last['step']):,}"
    facts = [Fact("Held-out loss", f"{last['eval/loss']:.4f}", f"nats / token, {at}")]
    if "eval/perplexity" in last:
        facts.append(Fact("Perplexity", perplexity(last["eval/perplexity"]), at))
    if "eval/bits_per_byte" in last:
        facts.append(Fact("Bits per byte", f"{last['eval/bits_per_byte']:.4f}", at))
    return facts


def _chosen(samples: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[dict]]]:
    """(step, samples) of a few steps spread over the run, the newest first."""
    by_step: dict[int, list[dict]] = {}
    for sample in samples:
        texts = {key: str(sample.get(key, "")) for key in ("prompt", "completion")}
        by_step.setdefault(int(sample["step"]), []).append(texts)
    chosen = spread(sorted(by_step), _SAMPLED_STEPS)
    return [(step, by_step[step]) for step in reversed(chosen)]
