"""Where a model comes from, as a table, from the lineage that its checkpoint holds."""

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from instar.evaluation.report_page import fill
from instar.evaluation.report_words import quantity

_DIGITS = 12


def own(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What a lineage says of the model itself, without the models that it comes from."""
    return {key: value for key, value in lineage.items() if not _is_model(value)}


def family(lineage: Mapping[str, Any]) -> Markup:
    """The table of the models that one comes from, the nearest first; empty where there are none.

    A model that is in several places of the family stands in each.
    """
    return fill("family.html.jinja", models=list(_ancestors(lineage, "")))


def _ancestors(lineage: Mapping[str, Any], descent: str) -> Iterator[dict[str, str]]:
    for role, facts in lineage.items():
        if not _is_model(facts):
            continue
        digest = facts.get("params") or facts.get("files") or ""
        yield {
            "role": descent + role,
            "stage": str(facts["stage"]),
            "step": f"{facts['step']:,}" if "step" in facts else "–",
            "tokens": quantity(facts["tokens"]) if facts.get("tokens") else "–",
            "digest": str(digest)[:_DIGITS],
            "path": str(facts.get("path", "")),
        }
        yield from _ancestors(facts, f"{descent}{role} › ")


def _is_model(value: Any) -> bool:
    return isinstance(value, Mapping) and "stage" in value
