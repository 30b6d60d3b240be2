"""What the report of every run says, whatever its stage: how long, how fast, and from where."""

from collections.abc import Mapping
from typing import Any

from instar.evaluation.family_report import own
from instar.evaluation.report_words import (
    Fact,
    date,
    duration,
    median,
    plural,
    quantity,
    rows,
    steps_in_words,
)
from instar.evaluation.run_files import Run

# What the FLOP of a token are where a step reads each of them forwards and backwards.
TRAINED_ONCE = (
    "3 × the forward pass, which is 2 FLOP for each parameter of a matrix product (the head "
    "counts, embedding look-ups do not) and 4 × heads × head size × visible keys for the attention "
    "of each layer, half of the keys being visible under a causal mask; recomputation is not "
    "counted"
)


def steps(run: Run, label: str = "Steps") -> Fact:
    """How many steps are done, and of how many."""
    total = run.config.get("steps")
    note = "" if total is None else "complete" if total == run.last_step else f"of {total:,}"
    return Fact(label, f"{run.last_step:,}", note)


def tokens(run: Run) -> Fact | None:
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
    logged = run.series("tokens").finite.values
    if not len(logged):
        return None
    whole = len(logged) == run.last_step
    seen = logged.sum() if whole else logged.mean() * run.last_step
    return Fact("Tokens", f"{'' if whole else '≈ '}{quantity(seen)}", note)


def training_time(run: Run) -> Fact | None:
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
    note = f"without the time lost in {plural(restarts, 'restart')}" if restarts else "wall clock"
    return Fact("Training time", duration(max(seconds, 0.0)), note)


def last_mean(run: Run, key: str, label: str, unit: str, digits: int = 4) -> Fact | None:
    """The mean of a training metric over the last steps, one in forty of all."""
    values = run.series(key).finite.values
    if not len(values):
        return None
    count = min(len(values), max(1, len(values) // 40))
    note = unit + (f", mean of last {count} steps" if count > 1 else "")
    return Fact(label, f"{values[-count:].mean():.{digits}f}", note)


def speed(run: Run) -> list[Fact]:
    """Throughput, MFU and size, as far as they are known."""
    facts = []
    rate = median(run.series("tokens_per_second"))
    if rate is not None:
        facts.append(Fact("Throughput", f"{rate:,.0f}", "tokens / s, median"))
    share = median(run.series("mfu"))
    if share is not None:
        measured = peak_is_measured(run)
        note = "of the measured matmul peak" if measured else "of the chips' peak"
        facts.append(Fact("MFU", f"{'~' if measured else ''}{100 * share:.1f} %", note))
    total = run.facts.get("parameters")
    if isinstance(total, int | float):
        facts.append(Fact("Parameters", quantity(total)))
    return facts


def formula(run: Run, counted: str = TRAINED_ONCE) -> str:
    """One sentence that says what the MFU of this run is made of; empty where there is none.

    `counted` says what the FLOP of a token are.
    """
    share, rate = median(run.series("mfu")), median(run.series("tokens_per_second"))
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
        if peak_is_measured(run)
        else f"the dense {peak.get('dtype', '')} peak of {peak.get('devices', 1)} x "
        f"{peak.get('device_kind', 'device')}"
    )
    return (
        f"MFU = FLOP per token × tokens/s ÷ peak = {quantity(per_token, 'FLOP')} × {rate:,.0f} /s "
        f"÷ {quantity(flops, 'FLOP/s')}. FLOP per token: {counted}. The peak is {source}."
    )


def peak_is_measured(run: Run) -> bool:
    """Whether the peak was measured, for a chip that no table knows."""
    return run.facts.get("peak", {}).get("source") == "measured"


def events(run: Run) -> list[tuple[str, str]]:
    """(what, where) of restarts, loss spikes and skipped steps."""
    found = []
    for start in run.starts[1:]:
        when = date(start["time"]) if "time" in start else ""
        found.append((f"Restarted at step {int(start.get('step', 0)):,}", when))
    for key, singular, remark in (
        ("spike", "loss spike", ""),
        ("skipped", "skipped step", ": loss or gradient not finite"),
    ):
        at = run.flagged(key)
        if at:
            where = f"at step {steps_in_words(at)}"
            found.append((plural(len(at), singular) + remark, where))
    return found


def subtitle(run: Run) -> str:
    """When, on what, and by which version."""
    parts = []
    if run.lines and "time" in run.lines[-1]:
        parts.append(date(run.lines[-1]["time"]))
    parts += hardware_in_words(run.facts.get("hardware", {}))
    if version := run.lineage.get("instar"):
        parts.append(f"instar {version}")
    return " · ".join(parts)


def hardware_in_words(hardware: Mapping[str, Any]) -> list[str]:
    """The machine in a few words, none where it is unknown."""
    if not hardware:
        return []
    kind = hardware.get("cpu") if hardware.get("platform") == "cpu" else None
    devices = hardware.get("devices", 1)
    cores = f", {hardware['cpu_count']} cores" if kind and "cpu_count" in hardware else ""
    count = f"{devices} × " if devices > 1 or not kind else ""
    return [f"{count}{kind or hardware.get('device_kind', 'device')}{cores}"]


def tables(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """The tables at the end of a run's page: (title, rows)."""
    mesh = {"mesh": run.facts["mesh"]} if run.facts.get("mesh") else {}
    found = (
        ("Hardware", rows(run.facts.get("hardware", {}) | mesh)),
        ("Lineage", rows(own(run.lineage))),
    )
    return [(title, each) for title, each in found if each]
