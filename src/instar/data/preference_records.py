"""What a line of people's preferences says: a ranking, a pair or a rating, all as rated texts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from instar.data.completion_files import finite, required
from instar.data.completions import CompletionEncoder, Prompt, prompt_messages
from instar.errors import UserError

Kind = Literal["rankings", "pairs", "ratings"]
# Which ratings are compared: those with the same prompt, or any.
Group = Literal["prompt", "any"]


@dataclass(frozen=True)
class RatedText:
    """A completion and what it is worth beside those that it is compared with.

    Attributes:
      rating: higher is better: of a ranking the rank with its sign changed, of a pair 0 and -1.
      raters: single people's scores, where they are known.
      ids: of the prompt and the completion.
    """

    prompt: Prompt
    completion: str
    rating: float
    raters: tuple[float, ...] | None
    ids: list[int]


def kind_of(record: Mapping[str, Any]) -> Kind:
    """What a record is, by the fields that it has."""
    if "completions" in record or "ranks" in record:
        return "rankings"
    return "pairs" if "chosen" in record or "rejected" in record else "ratings"


def prompt_key(prompt: Prompt) -> str:
    """The same for prompts of the same messages, a text being what the user says."""
    return json.dumps(prompt_messages(prompt))


def _ranking(record: Mapping[str, Any], encoder: CompletionEncoder) -> list[RatedText]:
    completions, ranks = (required(record, name) for name in ("completions", "ranks"))
    for name, values in (("completions", completions), ("ranks", ranks)):
        if not isinstance(values, list) or not values:
            raise UserError(f"{name} must be a list with something in it")
    if len(completions) != len(ranks):
        raise UserError(f"there are {len(completions)} completions and {len(ranks)} ranks")
    ratings = [-finite(rank, f"ranks[{index}]") for index, rank in enumerate(ranks)]
    prompt = required(record, "prompt")
    return [
        RatedText(prompt, completion, rating, None, encoder.whole(prompt, completion))
        for completion, rating in zip(completions, ratings, strict=True)
    ]


def _pair(record: Mapping[str, Any], encoder: CompletionEncoder) -> list[RatedText]:
    prompt, chosen, rejected = (required(record, n) for n in ("prompt", "chosen", "rejected"))
    texts = [
        RatedText(prompt, completion, rating, None, encoder.whole(prompt, completion))
        for completion, rating in ((chosen, 0.0), (rejected, -1.0))
    ]
    if texts[0].ids == texts[1].ids:
        raise UserError("chosen and rejected are the same")
    return texts


def _rating(record: Mapping[str, Any], encoder: CompletionEncoder) -> list[RatedText]:
    prompt, completion = (required(record, name) for name in ("prompt", "completion"))
    raters = record.get("raters")
    if raters is not None:
        if not isinstance(raters, list):
            raise UserError(f"raters must be a list, not {type(raters).__name__}")
        raters = tuple(finite(score, f"raters[{index}]") for index, score in enumerate(raters))
    rating = finite(required(record, "rating"), "rating")
    return [RatedText(prompt, completion, rating, raters, encoder.whole(prompt, completion))]


# What reads the texts of a record that are compared with one another; of a rating the one text.
READERS: dict[Kind, Callable[[Mapping[str, Any], CompletionEncoder], list[RatedText]]] = {
    "rankings": _ranking,
    "pairs": _pair,
    "ratings": _rating,
}
