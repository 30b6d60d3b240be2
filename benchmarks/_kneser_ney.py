"""An interpolated, modified Kneser-Ney n-gram model of token ids, in sorted NumPy arrays.

Chen & Goodman 1998, "An empirical study of smoothing techniques for language modeling", section 3:

    p_k(w | c) = (n_k(c w) - D(n_k(c w))) / n_k(c) + g_k(c) * p_{k-1}(w | c without its first token)

where n_k counts occurrences at the highest order and distinct preceding tokens below it, D is one
of three discounts by the count (1, 2, or more), g_k(c) is the mass that discounting freed in c, and
p_0 is uniform over the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Level:
    """The n-grams of one length k and their contexts, the k - 1 tokens before the last.

    Each is numbered by the rank of its key. A context's key is made of its first token and the
    number of the shorter context behind that, an n-gram's of its context's number and last token.

    Attributes:
      contexts: int64 [C], the keys of the contexts, ascending; grams: int64 [G], of the n-grams.
      share: float64 [G], the first term of the formula; freed: float64 [C], its g_k.
    """

    contexts: np.ndarray
    grams: np.ndarray
    share: np.ndarray
    freed: np.ndarray


class KneserNey:
    """A model of documents, whose first token (BOS) is given and whose others are predicted."""

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int, order: int = 5):
        """Counts the n-grams of `documents`, int arrays of at least two tokens each."""
        self.order, self.vocab_size = order, vocab_size
        windows = make_windows(documents, order)
        contexts, grams, numbers = self._number(windows)
        self.levels = []
        for k in range(order):
            if k == order - 1:
                counts = np.bincount(numbers[k])
            else:
                shorter = np.empty(len(grams[k + 1]), np.int64)
                shorter[numbers[k + 1]] = numbers[k]
                counts = np.bincount(shorter)
            share, freed = estimate(counts, grams[k] // vocab_size)
            self.levels.append(Level(contexts[k], grams[k], share, freed))

    def _number(self, windows: np.ndarray) -> tuple[list, list, list]:
        """Returns, for each order, the keys of contexts and n-grams, and each window's n-gram."""
        contexts, grams, numbers = [], [], []
        keys, context = np.zeros(1, np.int64), np.zeros(windows.shape[1], np.int64)
        for k in range(1, self.order + 1):
            if k > 1:
                key = windows[-k].astype(np.int64) * len(keys) + context
                keys, context = np.unique(key, return_inverse=True)
            contexts.append(keys)
            found = np.unique(context * self.vocab_size + windows[-1], return_inverse=True)
            grams.append(found[0])
            numbers.append(found[1])
        return contexts, grams, numbers

    def probabilities(self, windows: np.ndarray) -> np.ndarray:
        """p(last token | those before it) of windows, int [order, N]: float64 [N]."""
        p = np.full(windows.shape[1], 1 / self.vocab_size)
        context, known, shorter = np.zeros(len(p), np.int64), np.ones(len(p), bool), 1
        for k, level in enumerate(self.levels, start=1):
            if k > 1:
                key = windows[-k].astype(np.int64) * shorter + context
                context, found = _find(level.contexts, key)
                known &= found
            gram, seen = _find(level.grams, context * self.vocab_size + windows[-1])
            own = np.where(seen, level.share[gram], 0.0)
            p = np.where(known, own + level.freed[context] * p, p)
            shorter = len(level.contexts)
        return p

    def bits(self, documents: Sequence[np.ndarray]) -> float:
        """The length of a code for `documents`, their ends (EOS) included."""
        return float(-np.log2(self.probabilities(make_windows(documents, self.order))).sum())


def make_windows(documents: Sequence[np.ndarray], order: int) -> np.ndarray:
    """Each predicted token with the order - 1 before it, the oldest first: int32 [order, N].

    Where fewer stand before it in its document, the document's first token is repeated.
    """
    padded = [np.concatenate([np.repeat(d[:1], order - 2), d]) for d in documents]
    tokens = np.concatenate(padded).astype(np.int32)
    ends = np.cumsum([len(document) for document in padded])
    predicted = np.ones(len(tokens), bool)
    for back in range(order - 1):
        predicted[np.concatenate([[0], ends[:-1]]) + back] = False
    at = np.flatnonzero(predicted)
    return np.stack([tokens[at - back] for back in reversed(range(order))])


def estimate(counts: np.ndarray, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first term of the formula for each n-gram, and g for each context."""
    discount = discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(contexts, weights=counts)
    return (counts - discount) / total[contexts], np.bincount(contexts, weights=discount) / total


def discounts(counts: np.ndarray) -> np.ndarray:
    """D for counts of 0, 1, 2 and more: float64 [4] (Chen & Goodman 1998, equation 26).

    A text so small that the formula gives none that can be used gets half of each count.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    result = np.array([0.0, 0.5, 1.0, 1.5])
    if n[1:5].all():
        y = n[1] / (n[1] + 2 * n[2])
        exact = np.array([k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)])
        if (exact > 0).all():
            result[1:] = exact
    return result


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each of `wanted` in ascending `keys`, and whether it is there at all."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
