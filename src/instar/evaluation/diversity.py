"""How much the texts of a set differ from one another, and how much each repeats itself.

A text is a `str`, cut into words and punctuation marks, or a sequence of tokens or ids (the better
choice for a script that writes no spaces).
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

Text = str | Sequence[Hashable]

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_ORDERS = (1, 2, 3, 4)
_FLOOR = 0.1


def words(text: Text) -> Sequence[Hashable]:
    """The words and punctuation marks of a text, as they are spelt; tokens as they are."""
    return _WORD.findall(text) if isinstance(text, str) else text


def distinct_n(texts: Sequence[Text], n: int) -> float:
    """Different n-grams / all n-grams, both of the whole set (Li et al. 2016).

    It falls as a set grows, so only sets of about as many words can be compared.

    Returns:
      A number in (0, 1]; 0 where no text has n words.
    """
    counts = Counter(gram for text in texts for gram in _grams(words(text), n))
    return len(counts) / counts.total() if counts else 0.0


def repetition(texts: Sequence[Text], n: int = 4) -> float:
    """The share of a text's n-grams that stand earlier in it, a mean over texts with any.

    It is seq-rep-n of Welleck et al. (2020).

    Returns:
      A number in [0, 1); 0 where no text has n words.
    """
    shares = []
    for text in texts:
        grams = _grams(words(text), n)
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else 0.0


def self_bleu(texts: Sequence[Text], max_texts: int = 64) -> float:
    """The mean BLEU-4 of each text against all the others (Zhu et al. 2018).

    The BLEU of one sentence: counts are clipped at the largest of any reference, a precision
    without a match is 0.1 / (number of n-grams) (the first smoothing of Chen and Cherry 2014), a
    text of fewer than four words is judged on the n-grams that it has, the brevity penalty uses the
    reference of the nearest length (of two, the shorter), and a text that shares no word with the
    others gets 0.

    Args:
      max_texts: of more texts than this, the first ones are taken.

    Returns:
      A number in [0, 1]; the higher, the less diverse; 0 where there are fewer than two texts.
    """
    tokens = [words(text) for text in texts[:max_texts]]
    if len(tokens) < 2:
        return 0.0
    matches = np.stack([_matches(tokens, n) for n in _ORDERS], axis=1)
    lengths = sorted(len(text) for text in tokens)
    return float(
        np.mean(
            [
                _bleu(len(text), row, _nearest_other(lengths, len(text)))
                for text, row in zip(tokens, matches, strict=True)
            ]
        )
    )


def _grams(tokens: Sequence[Hashable], n: int) -> list[tuple]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def _matches(texts: Sequence[Sequence[Hashable]], n: int) -> np.ndarray:
    """For each text, how many of its n-grams the others have, each as often as one of them has it.

    The largest count among the others is the largest of all, or, for the text that has that one,
    the second largest: one pass over the texts finds both.
    """
    counts = [Counter(_grams(text, n)) for text in texts]
    largest: dict[tuple, tuple[int, int]] = {}
    for own in counts:
        for gram, count in own.items():
            first, second = largest.get(gram, (0, 0))
            largest[gram] = (count, first) if count > first else (first, max(second, count))
    result = np.zeros(len(texts))
    for index, own in enumerate(counts):
        for gram, count in own.items():
            first, second = largest[gram]
            result[index] += min(count, second if count == first else first)
    return result


def _nearest_other(lengths: list[int], length: int) -> int:
    """Of sorted lengths without one `length` among them the nearest; of two, the shorter."""
    place = bisect_left(lengths, length)
    others = lengths[max(place - 1, 0) : place] + lengths[place + 1 : place + 2]
    return min(others, key=lambda other: (abs(other - length), other))


def _bleu(length: int, matches: np.ndarray, reference: int) -> float:
    if not matches.any():
        return 0.0
    totals = [length - n + 1 for n in _ORDERS if length >= n]
    logs = [
        math.log((match or _FLOOR) / total) for match, total in zip(matches, totals, strict=False)
    ]
    brevity = min(0.0, 1 - reference / length)
    return math.exp(brevity + sum(logs) / len(logs))
