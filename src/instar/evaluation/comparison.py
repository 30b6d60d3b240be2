"""What several models' completions of the same prompts have to say about the models."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from instar.evaluation.diversity import distinct_n, repetition, self_bleu
from instar.evaluation.preference_metrics import Interval, percentile_ends

_RESAMPLES = 1000


@dataclass(frozen=True)
class Completions:
    """One model's completions of N prompts, in the order of the prompts.

    Attributes:
      texts: what it said, without end tokens.
      lengths: [N], in tokens.
      ended: [N], whether it ended by itself and not at the limit of tokens.
    """

    texts: Sequence[str]
    lengths: Sequence[int]
    ended: Sequence[bool]


def mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """The mean of `values` [N], one for each prompt, with a percentile bootstrap interval."""
    values = np.asarray(values, np.float64)
    count = len(values)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    return Interval(float(values.mean()), *percentile_ends(draws @ values / count))


def win_rate(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Interval:
    """On how many prompts `first` [N] scores above `second` [N]; ties count half.

    Prompts are what the bootstrap draws anew, each with both scores.
    """
    gaps = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return mean_interval((np.sign(gaps) + 1) / 2, seed)


def compare(
    models: Mapping[str, Completions],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    seed: int = 0,
) -> dict[str, Any]:
    """All figures, ready for JSON.

    Args:
      models: by name, from the earliest to the latest.
      scores: by judge and model, float [N], the higher the better.

    Returns:
      `prompts`, their number N; `models`, for each one the judges' means with intervals
      (`judges`), `distinct_1`, `distinct_2`, `self_bleu`, `repetition`, the mean `length` in tokens
      and the share that `ended`; and `wins`, for each judge and two models how often the later
      `model` beats the earlier one, `against`, with an interval. An interval is {"value", "low",
      "high"} and covers 95 %.

    Raises:
      ValueError: numbers of completions or scores differ, or there are none.
    """
    count = _common_count(models, scores)
    return {
        "prompts": count,
        "models": {
            name: {
                "judges": {
                    judge: asdict(mean_interval(given[name], seed))
                    for judge, given in scores.items()
                }
            }
            | describe(completions)
            for name, completions in models.items()
        },
        "wins": [
            {"judge": judge, "model": later, "against": earlier}
            | asdict(win_rate(given[later], given[earlier], seed))
            for judge, given in scores.items()
            for earlier, later in combinations(models, 2)
        ],
    }


def describe(completions: Completions) -> dict[str, float]:
    """What can be said of a model's completions without a judge."""
    return {
        "distinct_1": distinct_n(completions.texts, 1),
        "distinct_2": distinct_n(completions.texts, 2),
        "self_bleu": self_bleu(completions.texts),
        "repetition": repetition(completions.texts),
        "length": float(np.mean(completions.lengths)),
        "ended": float(np.mean(completions.ended)),
    }


def _common_count(
    models: Mapping[str, Completions], scores: Mapping[str, Mapping[str, np.ndarray]]
) -> int:
    counts = {f"texts of {name}": len(each.texts) for name, each in models.items()}
    counts |= {f"lengths of {name}": len(each.lengths) for name, each in models.items()}
    counts |= {f"ends of {name}": len(each.ended) for name, each in models.items()}
    for judge, given in scores.items():
        counts |= {f"scores of {name} by {judge}": len(given[name]) for name in models}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"every model must complete the same prompts, one or more: {counts}")
    return next(iter(counts.values()))
