"""What a stage did not take of the records it was given, told as it begins."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from instar.data.formats import in_words
from instar.evaluation.report_words import plural

# Of the `facts` of what was read those that count what was left out: of what, and why.
_LEFT_OUT = {
    "skipped": ("record", "broken"),
    "too_long": ("text", "too long"),
    "too_small": ("group", "of fewer than two texts"),
    "tied": ("group", "of nothing but ties"),
}
_SHOWN = 3


def tell_left_out(
    field: str, facts: Mapping[str, int], skipped: Sequence[Mapping[str, Any]]
) -> None:
    """Says on stderr how much was left out, and which records are broken; nothing if all is well.

    Of several processes, which have all read the same, the first one says it.

    Args:
      field: the setting that names what was read.
      facts, skipped: those of `Comparisons`, `RatedTexts` or `PromptSet`.
    """
    left_out = [
        f"{plural(facts[name], noun)} {why}"
        for name, (noun, why) in _LEFT_OUT.items()
        if facts.get(name)
    ]
    if not left_out or jax.process_index() != 0:
        return
    taken = (
        plural(count, name.removesuffix("s"))
        for name, count in facts.items()
        if name not in _LEFT_OUT
    )
    print(f"{field}: {', '.join(taken)}; left out: {', '.join(left_out)}", file=sys.stderr)
    for each in skipped[:_SHOWN]:
        print(f"  {in_words(each)}", file=sys.stderr)
