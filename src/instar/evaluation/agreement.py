"""How far people agree with one another on the ratings of texts.

Raters are anonymous: a text has a list of scores, and the k-th scores of two texts are not one
person's. So "a person" is, in each text of a pair apart, one of its scores drawn at random.
"""

from collections.abc import Sequence

import numpy as np

from instar.errors import UserError
from instar.evaluation.preference_metrics import pair_accuracy, pairs_of

Raters = Sequence[Sequence[float]]


def krippendorff_alpha(raters: Raters) -> float:
    """Krippendorff's alpha for interval data: 1 - observed / expected disagreement.

    Both disagreements are of the scores within a text and of all scores, whoever gave them: the
    measure needs no identities, and the row in which a score stands in the matrix of raters and
    texts does not matter. Texts with one score say nothing and are passed over.

    Args:
      raters: for each of N texts its scores, any number of them.

    Returns:
      At most 1 (all agree); 0 is chance; NaN where all scores are the same, or no text has two.

    Raises:
      UserError: the package krippendorff is missing.
    """
    try:
        import krippendorff
    except ImportError:
        raise UserError(
            'the agreement of raters needs krippendorff: install Instar with the extra "demo"'
        ) from None
    table = _table(raters)
    table = table[np.sum(~np.isnan(table), axis=1) > 1]
    if not len(table) or np.nanmin(table) == np.nanmax(table):
        return float("nan")
    return float(krippendorff.alpha(table.T, level_of_measurement="interval"))


def one_person(
    raters: Raters, groups: np.ndarray | None = None, pairs: int = 200_000, seed: int = 0
) -> float:
    """How often one person prefers the text that the mean of all others does.

    A person's own ties count half; pairs whose others tie do not count. It is what a reward model's
    accuracy in pairs compares with.

    Args:
      raters: N texts' scores; texts with fewer than two are passed over.
      groups: [N]; two texts are a pair where theirs are equal, and where it is None always.
      pairs: drawn at random.

    Returns:
      NaN where no pair counts.
    """
    drawn = _Drawn(raters, pairs, seed, groups)
    own, _ = drawn.people(1)
    others = (drawn.sums - own) / (drawn.counts - 1)
    return _agreement(own, others)


def person_against_person(raters: Raters, pairs: int = 200_000, seed: int = 0) -> float:
    """How often two different people prefer the same text, among pairs in which neither ties."""
    drawn = _Drawn(raters, pairs, seed)
    own, other = drawn.people(2)
    decided = own[0] != own[1]
    return _agreement(own[:, decided], other[:, decided])


def half_against_half(raters: Raters, seed: int = 0) -> float:
    """The accuracy in pairs of the mean of one half of each text's scores, drawn at random.

    The mean of the other half is what it is measured against; ties of the first count half.
    """
    rng = np.random.default_rng(seed)
    halves = []
    for scores in raters:
        if len(scores) > 1:
            mixed, middle = rng.permutation(np.asarray(scores, np.float64)), len(scores) // 2
            halves.append((mixed[:middle].mean(), mixed[middle:].mean()))
    return pair_accuracy(*np.asarray(halves).T) if halves else float("nan")


def _table(raters: Raters) -> np.ndarray:
    """float64 [N, R] with NaN behind the scores of each text."""
    table = np.full((len(raters), max(map(len, raters), default=0)), np.nan)
    for row, scores in zip(table, raters, strict=True):
        row[: len(scores)] = scores
    return table


class _Drawn:
    """P pairs of texts, and `sums` and `counts` [2, P] of the scores of each."""

    def __init__(self, raters: Raters, pairs: int, seed: int, groups: np.ndarray | None = None):
        several = [i for i, scores in enumerate(raters) if len(scores) > 1]
        self._table = _table([raters[i] for i in several])
        self._rng = np.random.default_rng(seed)
        total = len(several)
        if groups is None:
            texts = self._rng.integers(0, max(total, 1), (2, pairs if total else 0))
        else:
            known = np.stack(pairs_of(total, groups[several]))
            drawn = self._rng.integers(0, max(known.shape[1], 1), pairs if known.size else 0)
            texts = known[:, drawn]
        self._texts = texts[:, texts[0] != texts[1]]
        numbers = np.sum(~np.isnan(self._table), axis=1)
        self.sums = np.nansum(self._table, axis=1)[self._texts]
        self.counts = numbers[self._texts]

    def people(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The scores [2, P] of a person in each text, and of another one if `count` is 2."""
        first = self._rng.integers(0, self.counts)
        other = (first + self._rng.integers(1, self.counts)) % self.counts if count > 1 else first
        return self._table[self._texts, first], self._table[self._texts, other]


def _agreement(own: np.ndarray, others: np.ndarray) -> float:
    """How often `own` [2, P] prefers as `others` does; its ties count half, those of others not."""
    decided = others[0] != others[1]
    signs = np.sign(own[0] - own[1]) * np.sign(others[0] - others[1])
    return float(np.mean((signs[decided] + 1) / 2)) if decided.any() else float("nan")
