"""Texts that are nearly the same, found by the runs of words that they share.

Two texts are compared as the sets of their shingles, the runs of `SHINGLE` words in them (Broder
1997), without regard to case and punctuation. They are near duplicates where at least `SHARE` of
the shingles of the shorter one are in the other: its containment. A text of fewer words is one
shingle as a whole, so that it is near its equals alone.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

SHINGLE = 5
SHARE = 0.5

Words = tuple[str, ...]


def words_of(text: str) -> Words:
    """The words of a text, in lower case and without punctuation."""
    return tuple(re.findall(r"\w+", text.casefold()))


def shingles(words: Words) -> set[Words]:
    """The runs of `SHINGLE` words; all words as one where there are fewer."""
    return {words[at : at + SHINGLE] for at in range(max(1, len(words) - SHINGLE + 1))}


class NearDuplicates:
    """Finds which of some texts are near duplicates of another."""

    def __init__(self, texts: Sequence[str]):
        self._sizes: list[int] = []
        self._holders: dict[Words, list[int]] = {}
        for index, text in enumerate(texts):
            found = shingles(words_of(text))
            self._sizes.append(len(found))
            for shingle in found:
                self._holders.setdefault(shingle, []).append(index)

    def of(self, text: str) -> set[int]:
        """The indices of the texts that `text` is a near duplicate of."""
        found = shingles(words_of(text))
        shared = self._shared(found)
        return {i for i, n in shared.items() if n >= SHARE * min(self._sizes[i], len(found))}

    def inside(self, document: str, sentences: Sequence[str]) -> set[int]:
        """The indices of the texts that stand in a document, word for word or nearly.

        Args:
          sentences: the document's; a text of fewer than `SHINGLE` words stands in it where it is
            one of them.
        """
        found = shingles(words_of(document))
        found |= {words for words in map(words_of, sentences) if len(words) < SHINGLE}
        return {i for i, n in self._shared(found).items() if n >= SHARE * self._sizes[i]}

    def _shared(self, found: Iterable[Words]) -> Counter[int]:
        """How many of the shingles found each text has, of those that have any."""
        return Counter(i for shingle in found for i in self._holders.get(shingle, ()))
