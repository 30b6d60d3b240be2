"""What a reward model is worth on texts that people rated: `reward.json`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from instar.data.rated_texts import RatedTexts
from instar.errors import UserError
from instar.evaluation.agreement import krippendorff_alpha, one_person
from instar.evaluation.preference_metrics import (
    accuracy_by_gap,
    calibration,
    ensemble_disagreement,
    pair_accuracy,
    pair_accuracy_interval,
)

RESULTS = "reward.json"
_GAPS = 8

# (parameters, N texts as token ids) -> scores float64 [members, N].
Score = Callable[[Any, Sequence[Sequence[int]]], np.ndarray]


class RewardEvaluation:
    """Measures a reward model on sets of rated texts.

    Args:
      sets: by name.
      limit: about so many texts of each at most, spread over it, are read on the way; `final`, at
        the end. All pairs of them are compared, of texts of one group where there are several.
    """

    def __init__(self, sets: Mapping[str, RatedTexts], score: Score, *, limit: int, final: int):
        self._sets, self._score, self._limit, self._final = sets, score, limit, final

    def quick(self, params: Any) -> dict[str, float]:
        """`SET/accuracy` and, of several members, `SET/disagreement`, on a part of each set."""
        scalars = {}
        for name, rated in self._sets.items():
            chosen, members = self._scored(params, rated, self._limit)
            scores, ratings = members.mean(axis=0), rated.ratings[chosen]
            groups = rated.among(chosen)
            scalars[f"{name}/accuracy"] = pair_accuracy(scores, ratings, groups)
            if len(members) > 1:
                scalars[f"{name}/disagreement"] = ensemble_disagreement(members, groups)
        return scalars

    def whole(
        self, params: Any, baseline: Callable[[list, list], np.ndarray] | None = None
    ) -> dict[str, Any]:
        """What `measure` gives, by set.

        Args:
          baseline: prompts and completions -> scores [N] of another model, to compare with.
        """
        found = {}
        for name, rated in self._sets.items():
            chosen, members = self._scored(params, rated, self._final)
            other = None
            if baseline is not None:
                prompts = [rated.prompts[i] for i in chosen]
                other = baseline(prompts, [rated.completions[i] for i in chosen])
            raters = None if rated.raters is None else [rated.raters[i] for i in chosen]
            groups = rated.among(chosen)
            found[name] = measure(members, rated.ratings[chosen], raters, other, groups) | {
                "too_long": rated.facts["too_long"]
            }
        return found

    def _scored(self, params: Any, rated: RatedTexts, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Which texts of a set are read, and their scores [M, N]."""
        chosen = rated.spread(most)
        return chosen, self._score(params, [rated.tokens[i, : rated.lengths[i]] for i in chosen])


def measure(
    members: np.ndarray,
    ratings: np.ndarray,
    raters: Sequence[Sequence[float]] | None = None,
    baseline: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """All figures of one set, ready for JSON; those of which nothing is known are None.

    Args:
      members: scores float64 [M, N] of each member; the model's own are their mean.
      ratings: [N]. raters: single people's scores of each text.
      baseline: another model's scores, [N].
      groups: [N]; two texts are compared where theirs are equal, and where it is None always.
    """
    scores = members.mean(axis=0)
    interval = pair_accuracy_interval(scores, ratings, groups)
    error, curve = calibration(scores, ratings, groups)
    return {
        "texts": len(ratings),
        "accuracy": {"value": interval.value, "low": interval.low, "high": interval.high},
        "members": [pair_accuracy(each, ratings, groups) for each in members],
        "disagreement": ensemble_disagreement(members, groups) if len(members) > 1 else None,
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "by_gap": _by_gap(scores, ratings, groups),
        "calibration": {
            "error": error,
            "bins": [
                {"predicted": predicted, "observed": observed, "pairs": pairs}
                for predicted, observed, pairs in curve
            ],
        },
        "person": None if raters is None else one_person(raters, groups),
        "alpha": None if raters is None else _alpha(raters),
        "baseline": None if baseline is None else pair_accuracy(baseline, ratings, groups),
    }


def _alpha(raters: Sequence[Sequence[float]]) -> float | None:
    """None where the package that computes it is missing: no reason to fail a finished run."""
    try:
        return krippendorff_alpha(raters)
    except UserError:
        return None


def _by_gap(
    scores: np.ndarray, ratings: np.ndarray, groups: np.ndarray | None
) -> list[dict[str, float]]:
    """The accuracy over the gap of the ratings, in `_GAPS` steps up to the largest."""
    edges = np.linspace(0, np.ptp(ratings), _GAPS + 1)
    found = accuracy_by_gap(scores, ratings, edges.tolist(), groups)
    return [
        {"gap": float(middle), "accuracy": accuracy, "pairs": pairs}
        for middle, (accuracy, pairs) in zip((edges[:-1] + edges[1:]) / 2, found, strict=True)
        if pairs
    ]
