"""Numbers, times and tables of a report in words."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from instar.evaluation.run_files import Series


@dataclass(frozen=True)
class Fact:
    """One figure of a summary: what, how much, and a remark in small print."""

    label: str
    value: str
    note: str = ""


def perplexity(value: float) -> str:
    """16.50, 1,234."""
    return f"{value:.2f}" if not value >= 1000 else f"{value:,.0f}"


def number(value: float | None, form: str = ".3f") -> str:
    """0.123, or as `form` says; a dash for null, which a file has for what is no finite number."""
    return "–" if value is None else format(value, form)


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


def date(seconds: float) -> str:
    """1 January 2026, 00:00 UTC, of a time in seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%-d %B %Y, %H:%M UTC")


def plural(count: int, word: str) -> str:
    """1 step, 2 steps."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def steps_in_words(steps: Sequence[int], most: int = 20) -> str:
    """12, 13, 1,204 and 5 more."""
    shown = ", ".join(f"{step:,}" for step in steps[:most])
    return f"{shown} and {len(steps) - most:,} more" if len(steps) > most else shown


def prompt_text(prompt: Any) -> str:
    """A prompt to be read: a text as it is, of a dialogue who says what, token ids as a list."""
    if isinstance(prompt, Sequence) and all(isinstance(each, Mapping) for each in prompt):
        return "\n".join(f"{each.get('role')}: {each.get('content')}" for each in prompt)
    return str(prompt)


def rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested values as (words, text), without those that are missing."""
    found = []
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
        found.append((label, text))
    return found


def median(series: Series) -> float | None:
    """That of the finite values; None where there is none."""
    values = series.finite.values
    return statistics.median(values) if len(values) else None


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, the first and the last among them, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[math.floor(i * (len(items) - 1) / (most - 1) + 0.5)] for i in range(most)]
