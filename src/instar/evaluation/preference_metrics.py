"""How well scores order texts as people's ratings do: exact, over all pairs of N texts.

A pair counts where its ratings differ; scores that tie get half of it. With `groups` [N], two texts
are a pair where theirs are equal: what a model that learnt to rank the completions of one prompt
says of two prompts means nothing. Time and memory grow as N^2: a second and 100 MB for 2,000 texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def pairs_of(count: int, groups: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of `count` texts, each once: the indexes of their first and of their second."""
    first, second = np.triu_indices(count, 1)
    if groups is None:
        return first, second
    together = groups[first] == groups[second]
    return first[together], second[together]


def pair_accuracy(
    scores: np.ndarray, ratings: np.ndarray, groups: np.ndarray | None = None
) -> float:
    """Concordant pairs / pairs of unequal ratings, both [N]; NaN where no pair is unequal."""
    right, counted = _concordance(scores, ratings, groups)
    return _divide(right.sum(), counted.sum())


def pair_accuracy_interval(
    scores: np.ndarray,
    ratings: np.ndarray,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 200,
) -> Interval:
    """`pair_accuracy` with a percentile bootstrap interval.

    Texts are drawn anew, and not pairs, because the pairs of one text are not independent. A text
    that is drawn k times stands in k times as many pairs. Of groups whole ones are drawn.
    """
    right, counted = _concordance(scores, ratings, groups)
    units = np.arange(len(right)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(units.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    weights = draws[:, units].astype(np.float64)
    # A text meets others of its group as often as that is drawn, and else as often as they are too.
    met = weights if groups is None else np.ones_like(weights)
    won = np.einsum("bi,bi->b", weights @ right, met)
    pairs = np.einsum("bi,bi->b", weights @ counted, met)
    shares = won[pairs > 0] / pairs[pairs > 0]
    value = _divide(right.sum(), counted.sum())
    return Interval(value, *(percentile_ends(shares) if len(shares) else (np.nan, np.nan)))


def accuracy_by_gap(
    scores: np.ndarray,
    ratings: np.ndarray,
    edges: Sequence[float],
    groups: np.ndarray | None = None,
) -> list[tuple[float, int]]:
    """(accuracy, pairs) of the pairs whose ratings are apart by [edges[k], edges[k + 1]).

    Args:
      edges: K + 1 ascending numbers; the last gap takes its upper end in.

    Returns:
      K tuples; the accuracy is NaN where there are no pairs.
    """
    right, gaps = _won(scores, ratings, *pairs_of(len(ratings), groups))
    result = []
    for low, high in pairwise(edges):
        below = gaps <= high if high == edges[-1] else gaps < high
        inside = (gaps >= low) & below & (gaps > 0)
        result.append((_divide(right[inside].sum(), inside.sum()), int(inside.sum())))
    return result


def calibration(
    scores: np.ndarray, ratings: np.ndarray, groups: np.ndarray | None = None, bins: int = 10
) -> tuple[float, list[tuple[float, float, int]]]:
    """How far sigmoid(difference of scores) is the probability that people prefer a text.

    Args:
      scores, ratings: [N]. bins: of equal width over the probability of the text that the scores
        prefer, from 0.5 to 1.

    Returns:
      (the expected calibration error of Naeini et al. 2015: the mean over pairs of
      |observed - predicted| of their bin; and for each bin that has pairs its mean predicted
      probability, the share observed, and the number of pairs).
    """
    scores = np.asarray(scores, np.float64)
    first, second = pairs_of(len(scores), groups)
    right, gaps = _won(scores, ratings, first, second)
    counted = gaps > 0
    sure = 1 / (1 + np.exp(-np.abs(scores[first] - scores[second])[counted]))
    right = right[counted]
    place = np.minimum(((2 * sure - 1) * bins).astype(int), bins - 1)
    curve = []
    for each in np.unique(place):
        inside = place == each
        curve.append((float(sure[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    error = sum(abs(predicted - observed) * pairs for predicted, observed, pairs in curve)
    return _divide(error, len(right)), curve


def ensemble_disagreement(members: np.ndarray, groups: np.ndarray | None = None) -> float:
    """How often two members, of scores [M, N], prefer different texts of a pair.

    It is the mean over the pairs of members and of texts that are not tied for the first of them;
    0 for one member.
    """
    members = np.asarray(members, np.float64)
    first, second = np.triu_indices(len(members), 1)
    shares = [
        1 - pair_accuracy(members[other], members[one], groups)
        for one, other in zip(first, second, strict=True)
    ]
    return float(np.mean(shares)) if shares else 0.0


def percentile_ends(values: np.ndarray) -> tuple[float, float]:
    """The ends between which the middle 95 % of `values` lie."""
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def _concordance(
    scores: np.ndarray, ratings: np.ndarray, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N, N]: what each ordered pair earns, 0 to 1, and whether it counts, 0 or 1."""
    scores, ratings = np.asarray(scores, np.float64), np.asarray(ratings, np.float64)
    signs = np.sign(ratings[:, None] - ratings)
    if groups is not None:
        signs *= groups[:, None] == groups
    agreement = np.sign(scores[:, None] - scores) * signs
    counted = np.abs(signs)
    return (agreement + 1) / 2 * counted, counted


def _won(
    scores: np.ndarray, ratings: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For pairs: what each earns, and by how much its ratings are apart (0: it does not count)."""
    scores, ratings = np.asarray(scores, np.float64), np.asarray(ratings, np.float64)
    gaps = ratings[first] - ratings[second]
    return (np.sign(scores[first] - scores[second]) * np.sign(gaps) + 1) / 2, np.abs(gaps)


def _divide(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
