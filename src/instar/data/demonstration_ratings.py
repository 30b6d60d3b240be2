"""Sentences that people rated for their sentiment, from an archive inside a Python package.

The data are those of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text", ICWSM 2014: whoever uses them is asked to cite the paper.
"""

import html
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from instar.errors import UserError

_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
# What we call each collection, and its files; films come as sentences of reviews.
_COLLECTIONS = {
    "films": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
_TEXTS, _SCORES = "_GroundTruth.txt", "_anonDataRatings.txt"
# No file of the archive is so large; one that is was not made for this.
_MOST_BYTES = 50_000_000


@dataclass(frozen=True)
class RatedSentence:
    """A sentence and what people thought of it.

    Attributes:
      name: its id in the archive.
      text: words between single spaces.
      scores: one of each person, -4 (most negative) to 4. People are not told apart.
    """

    name: str
    text: str
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the scores."""
        return sum(self.scores) / len(self.scores)


def read_ratings(archive: str) -> dict[str, list[RatedSentence]]:
    """The sentences of each collection ("films", "amazon", "nyt", "tweets"), in their order.

    Nothing is unpacked to the disk.

    Args:
      archive: the path of the source distribution vaderSentiment-3.3.2.tar.gz.

    Raises:
      UserError: it cannot be read, or does not hold what it should.
    """
    wanted = {f"{stem}{ending}" for stem in _COLLECTIONS.values() for ending in (_TEXTS, _SCORES)}
    try:
        files = _read_members(archive, wanted)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(
            f"--ratings {archive} cannot be read as a .tar.gz ({error}): "
            "launch/local.sh ratings fetches it"
        ) from None
    missing = sorted(wanted - files.keys())
    if missing:
        raise UserError(
            f"--ratings {archive} has no {missing[0]} in its {_ARCHIVE}: give the source "
            "distribution vaderSentiment-3.3.2.tar.gz, which launch/local.sh ratings fetches"
        )
    return {
        name: _sentences(stem, files[stem + _TEXTS], files[stem + _SCORES])
        for name, stem in _COLLECTIONS.items()
    }


def _read_members(archive: str, wanted: set[str]) -> dict[str, bytes]:
    """The contents of the wanted files, by their names without a folder."""
    with tarfile.open(archive, "r:gz") as package:
        inner = next((each for each in package if each.name.endswith(_ARCHIVE)), None)
        if inner is None or not inner.isfile():
            return {}
        with tarfile.open(fileobj=package.extractfile(inner), mode="r:gz") as tar:
            return {
                member.name.rpartition("/")[2]: tar.extractfile(member).read()
                for member in tar
                if member.isfile()
                and member.name.rpartition("/")[2] in wanted
                and member.size < _MOST_BYTES
            }


def _sentences(stem: str, texts: bytes, scores: bytes) -> list[RatedSentence]:
    """The sentences of a collection, from its two files."""
    rated = {
        name: _scores(listed, f"{stem}{_SCORES}, sentence {name}")
        for name, _, _, listed in _rows(scores, 4, stem + _SCORES)
    }
    sentences = []
    for name, _, text in _rows(texts, 3, stem + _TEXTS):
        if name not in rated:
            raise UserError(f"{stem}{_SCORES} has no sentence {name}: fetch the archive again")
        # The mean of the middle column is not read: of some tweets it is another one.
        sentences.append(RatedSentence(name, " ".join(html.unescape(text).split()), rated[name]))
    return sentences


def _rows(content: bytes, columns: int, file: str) -> Iterator[list[str]]:
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error}): fetch the archive again") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = line.rstrip("\r").split("\t")
        if len(row) != columns:
            raise UserError(
                f"{file}, line {number} has {len(row)} columns, not {columns}: "
                "fetch the archive again"
            )
        yield row


def _scores(text: str, place: str) -> tuple[float, ...]:
    try:
        scores = tuple(json.loads(text))
        good = bool(scores) and all(-4 <= score <= 4 for score in scores)
    except (ValueError, TypeError):
        good = False
    if not good:
        raise UserError(f"{place} has no list of scores from -4 to 4: fetch the archive again")
    return scores
