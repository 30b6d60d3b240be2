"""A run as one page: `report.html`, self-contained, made from nothing but the run's own files."""

import importlib.resources
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from instar.errors import UserError
from instar.evaluation import plots
from instar.evaluation.run_files import Run, Series, load_run

REPORT = "report.html"
_TEMPLATE = "report.html.jinja"
_SAMPLED_STEPS, _EVALUATIONS, _EVENTS = 4, 12, 20


@dataclass(frozen=True)
class Fact:
    """One figure of the summary: what, how much, and a remark in small print."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class ReportOptions:
    """Writes `report.html` into the folder of a run again."""

    workdir: str


def report(options: ReportOptions) -> None:
    """Writes the report of a run and says where it is."""
    print(write_report(options.workdir))


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes `report.html` into a run's folder and returns its path.

    Raises:
      UserError: the folder holds no run, or one of its JSON files is damaged.
    """
    run = load_run(epath.Path(workdir))
    path = epath.Path(workdir) / REPORT
    try:
        path.write_text(render(run))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None
    return path


def render(run: Run) -> str:
    """The page as HTML."""
    source = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        name=run.name,
        stage=run.lineage.get("stage", "training"),
        subtitle=_subtitle(run),
        summary=summarize(run),
        formula=_formula(run),
        perplexity=perplexity,
        plots=[(Markup(svg), wide) for svg, wide in _plots(run)],
        evaluations=_spread(run.evaluations, _EVALUATIONS),
        samples=_chosen_samples(run.samples),
        events=_events(run),
        tables=[
            (title, rows)
            for title, rows in (
                ("Hardware", _rows(run.facts.get("hardware", {}) | _mesh(run.facts))),
                ("Lineage", _rows(run.lineage)),
            )
            if rows
        ],
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )


# ---------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------


def summarize(run: Run) -> list[Fact]:
    """The figures at the top of the page; those that the files do not hold are left out."""
    facts = [Fact("Steps", *_steps(run)), _tokens(run), _time(run), _training_loss(run)]
    if run.evaluations:
        last = run.evaluations[-1]
        at = f"held out, step {int(last['step']):,}"
        facts.append(Fact("Held-out loss", f"{last['eval/loss']:.4f}", f"nats / token, {at}"))
        if "eval/perplexity" in last:
            facts.append(Fact("Perplexity", perplexity(last["eval/perplexity"]), at))
        if "eval/bits_per_byte" in last:
            facts.append(Fact("Bits per byte", f"{last['eval/bits_per_byte']:.4f}", at))
    rate = _median(run.series("tokens_per_second"))
    if rate is not None:
        facts.append(Fact("Throughput", f"{rate:,.0f}", "tokens / s, median"))
    share = _median(run.series("mfu"))
    if share is not None:
        measured = _measured(run)
        note = "of the measured matmul peak" if measured else "of the chips' peak"
        facts.append(Fact("MFU", f"{'~' if measured else ''}{100 * share:.1f} %", note))
    total = run.facts.get("parameters")
    if isinstance(total, int | float):
        facts.append(Fact("Parameters", quantity(total)))
    return [fact for fact in facts if fact is not None]


def perplexity(value: float) -> str:
    """16.50, 1,234."""
    return f"{value:.2f}" if not value >= 1000 else f"{value:,.0f}"


def quantity(value: float, unit: str = "") -> str:
    """16.4 M, 211 GFLOP/s, 950."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            prefix = {"G": "B"}.get(prefix, prefix) if not unit else prefix
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:,.0f} {unit}".rstrip()


def duration(seconds: float) -> str:
    """42 s, 4 min 12 s, 3 h 05 min, 2 d 03 h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d} h"
    if hours:
        return f"{hour} h {minute:02d} min"
    return f"{minute} min {second:02d} s" if minute else f"{second} s"


def _steps(run: Run) -> tuple[str, str]:
    total = run.config.get("steps")
    note = "" if total is None else "complete" if total == run.last_step else f"of {total:,}"
    return f"{run.last_step:,}", note


def _tokens(run: Run) -> Fact | None:
    """Tokens seen: those of the lineage where it is of the last step, else summed up.

    Where not every step is logged the sum is an estimate, and says so.
    """
    last = run.lines[-1] if run.lines else {}
    epochs = {key.removeprefix("epoch/"): n for key, n in last.items() if key.startswith("epoch/")}
    most = sorted(epochs, key=epochs.get, reverse=True)[:3]
    note = ", ".join(f"{epochs[name]:.2f} epochs of {name}" for name in most)
    note += f" (of {len(epochs)} sources)" if len(epochs) > len(most) else ""
    if run.lineage.get("step") == run.last_step and "tokens" in run.lineage:
        return Fact("Tokens", quantity(run.lineage["tokens"]), note)
    tokens = run.series("tokens").finite.values
    if not len(tokens):
        return None
    whole = len(tokens) == run.last_step
    seen = tokens.sum() if whole else tokens.mean() * run.last_step
    return Fact("Tokens", f"{'' if whole else '≈ '}{quantity(seen)}", note)


def _time(run: Run) -> Fact | None:
    """Time between the lines, without what passed between a stop and the next start."""
    times = sorted(line["time"] for line in run.lines if "time" in line)
    if not times:
        return None
    starts = sorted(start["time"] for start in run.starts if "time" in start)
    seconds = 0.0
    for earlier, later in zip([starts[0] if starts else times[0], *times], times, strict=False):
        resumed = [start for start in starts if earlier < start <= later]
        seconds += later - max([earlier, *resumed])
    restarts = max(len(run.starts) - 1, 0)
    note = f"without the time lost in {_plural(restarts, 'restart')}" if restarts else "wall clock"
    return Fact("Training time", duration(max(seconds, 0.0)), note)


def _training_loss(run: Run) -> Fact | None:
    losses = run.series("loss").finite.values
    if not len(losses):
        return None
    count = min(len(losses), max(1, len(losses) // 40))
    note = "nats / token" + (f", mean of last {count} steps" if count > 1 else "")
    return Fact("Training loss", f"{losses[-count:].mean():.4f}", note)


def _formula(run: Run) -> str:
    """One sentence that says what the MFU of this run is made of; empty where there is none."""
    share, rate = _median(run.series("mfu")), _median(run.series("tokens_per_second"))
    if not share or not rate:
        return ""
    peak = run.facts.get("peak", {})
    flops = peak.get("flops")
    per_token = run.facts.get("flops_per_token") or (share * flops / rate if flops else None)
    if not flops or not per_token:
        return "MFU = FLOP per token x tokens/s / peak FLOP/s."
    source = (
        f"the fastest {peak.get('dtype', '')} matrix product measured on this machine at start, "
        "which is below what its maker would state, so that this MFU (~) flatters"
        if _measured(run)
        else f"the dense {peak.get('dtype', '')} peak of {peak.get('devices', 1)} x "
        f"{peak.get('device_kind', 'device')}"
    )
    return (
        f"MFU = FLOP per token × tokens/s ÷ peak = {quantity(per_token, 'FLOP')} × {rate:,.0f} /s "
        f"÷ {quantity(flops, 'FLOP/s')}. FLOP per token: 3 × the forward pass, which is 2 FLOP for "
        "each parameter of a matrix product (the head counts, embedding look-ups do not) and "
        "4 × heads × head size × visible keys for the attention of each layer, half of the keys "
        f"being visible under a causal mask; recomputation is not counted. The peak is {source}."
    )


def _measured(run: Run) -> bool:
    return run.facts.get("peak", {}).get("source") == "measured"


# ---------------------------------------------------------------------------------------------
# Plots, samples, events, tables
# ---------------------------------------------------------------------------------------------


def _plots(run: Run) -> list[tuple[str, bool]]:
    """(SVG, whether it takes the whole width) of what there is data for."""
    drawn: list[tuple[str, bool]] = []
    last, loss, held_out = run.last_step, run.series("loss"), run.series("eval/loss")
    if len(loss.finite) or len(held_out.finite):
        flags = run.flagged("skipped"), run.flagged("spike")
        drawn.append((plots.loss_plot(loss, held_out, last, *flags), True))
    if len((rate := run.series("learning_rate")).finite):
        drawn.append((plots.learning_rate_plot(rate, last), False))
    if len((norm := run.series("grad_norm")).finite):
        clip = run.config.get("optimizer", {}).get("clip_norm")
        drawn.append((plots.grad_norm_plot(norm, last, clip), False))
    if len((tokens := run.series("tokens_per_second")).finite):
        share, typical = _median(run.series("mfu")), _median(tokens)
        mfu_at_rate = share / typical if share and typical else None
        drawn.append((plots.throughput_plot(tokens, last, mfu_at_rate), False))
    if len((bits := run.series("eval/bits_per_byte")).finite):
        drawn.append((plots.bits_plot(bits, last), False))
    return drawn


def _chosen_samples(samples: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[dict]]]:
    """(step, samples) of a few steps spread over the run, the newest first."""
    by_step: dict[int, list[dict]] = {}
    for sample in samples:
        texts = {key: str(sample.get(key, "")) for key in ("prompt", "completion")}
        by_step.setdefault(int(sample["step"]), []).append(texts)
    chosen = _spread(sorted(by_step), _SAMPLED_STEPS)
    return [(step, by_step[step]) for step in reversed(chosen)]


def _events(run: Run) -> list[tuple[str, str]]:
    """(what, where) of restarts, loss spikes and skipped steps."""
    events = []
    for start in run.starts[1:]:
        when = _date(start["time"]) if "time" in start else ""
        events.append((f"Restarted at step {int(start.get('step', 0)):,}", when))
    for key, singular, remark in (
        ("spike", "loss spike", ""),
        ("skipped", "skipped step", ": loss or gradient not finite"),
    ):
        steps = run.flagged(key)
        if steps:
            shown = ", ".join(f"{step:,}" for step in steps[:_EVENTS])
            more = f" and {len(steps) - _EVENTS:,} more" if len(steps) > _EVENTS else ""
            events.append((_plural(len(steps), singular) + remark, f"at step {shown}{more}"))
    return events


def _subtitle(run: Run) -> str:
    hardware = run.facts.get("hardware", {})
    parts = []
    if run.lines and "time" in run.lines[-1]:
        parts.append(_date(run.lines[-1]["time"]))
    if hardware:
        kind = hardware.get("cpu") if hardware.get("platform") == "cpu" else None
        devices = hardware.get("devices", 1)
        cores = f", {hardware['cpu_count']} cores" if kind and "cpu_count" in hardware else ""
        count = f"{devices} × " if devices > 1 or not kind else ""
        parts.append(f"{count}{kind or hardware.get('device_kind', 'device')}{cores}")
    if version := run.lineage.get("instar"):
        parts.append(f"instar {version}")
    return " · ".join(parts)


def _mesh(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"mesh": facts["mesh"]} if facts.get("mesh") else {}


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested values as (words, text), without those that are missing."""
    rows = []
    for key, value in values.items():
        label = key.removesuffix("_bytes").replace("_", " ")
        if value is None or value == {} or value == []:
            continue
        if isinstance(value, Mapping):
            text = ", ".join(f"{name} {item}" for name, item in value.items())
        elif key.endswith("_bytes"):
            text = f"{value / 2**30:.1f} GiB"
        elif isinstance(value, int) and not isinstance(value, bool):
            text = f"{value:,}"
        else:
            text = str(value)
        rows.append((label, text))
    return rows


def _median(series: Series) -> float | None:
    values = series.finite.values
    return statistics.median(values) if len(values) else None


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, the first and the last among them, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[math.floor(i * (len(items) - 1) / (most - 1) + 0.5)] for i in range(most)]


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%-d %B %Y, %H:%M UTC")


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
