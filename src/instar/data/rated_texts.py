"""Texts that people rated, to judge a reward model by."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath

from instar.data.completion_files import padded, read_json_lines
from instar.data.completions import CompletionEncoder, Prompt
from instar.data.preference_records import READERS, Group, RatedText, kind_of, prompt_key
from instar.errors import UserError


@dataclass(frozen=True)
class RatedTexts:
    """Rated completions to evaluate on, in the order of their file.

    Attributes:
      prompts, completions: the texts.
      ratings: float64 [N], higher is better.
      groups: int64 [N]: two texts are compared where theirs are equal.
      raters: single people's scores of each; None where a record has none.
      tokens: int32 [N, T], prompt and completion; zeros behind.
      lengths: int32 [N], how many of them are real.
      facts: counts: records, skipped, too_long, texts.
      skipped: the broken records: dicts with "file", "position" and "reason".
      digest: the SHA-256 of the file's content and of what encodes it, in hexadecimal.
    """

    prompts: list[Prompt]
    completions: list[str]
    ratings: np.ndarray
    groups: np.ndarray
    raters: tuple[tuple[float, ...], ...] | None
    tokens: np.ndarray
    lengths: np.ndarray
    facts: dict[str, int]
    skipped: list[dict]
    digest: str

    @classmethod
    def open(
        cls,
        path: epath.PathLike,
        encoder: CompletionEncoder,
        max_length: int,
        group: Group = "any",
        field: str = "ratings",
    ) -> "RatedTexts":
        """Reads JSON lines of rankings, pairs or ratings, see `PreferenceConfig`.

        Broken records are skipped, and texts of more than `max_length` = T tokens left out.

        Args:
          group: which ratings are compared; the texts of a ranking or a pair always are.
          field: what errors call the setting that names the path.

        Raises:
          UserError: the file cannot be read, is mostly broken, or has no two texts that are short
            enough and can be compared.
        """
        read = read_json_lines(
            path, field, encoder, lambda record: (record, READERS[kind_of(record)](record, encoder))
        )
        groups: dict[str | int, int] = {}
        rated: list[RatedText] = []
        places: list[int] = []
        for number, (record, texts) in enumerate(read.items):
            key: str | int = number
            if kind_of(record) == "ratings":
                key = "" if group == "any" else prompt_key(texts[0].prompt)
            fitting = [text for text in texts if len(text.ids) <= max_length]
            rated += fitting
            places += [groups.setdefault(key, len(groups))] * len(fitting)
        total = sum(len(texts) for _, texts in read.items)
        if not rated:
            raise UserError(
                f"{field} {path}: none of its {total} texts fits into {max_length} tokens: allow "
                "longer ones"
            )
        if len(set(places)) == len(places):
            raise UserError(
                f"{field} {path} has no two texts to compare: give a prompt several completions, "
                'or set data.group "any" where all ratings are on one scale'
            )
        tokens, lengths = padded([each.ids for each in rated], max_length)
        raters = tuple(each.raters for each in rated)
        return cls(
            [each.prompt for each in rated],
            [each.completion for each in rated],
            np.asarray([each.rating for each in rated], np.float64),
            np.asarray(places),
            None if None in raters else raters,
            tokens,
            lengths,
            {
                "records": len(read.items) + len(read.skipped),
                "skipped": len(read.skipped),
                "too_long": total - len(rated),
                "texts": len(rated),
            },
            read.skipped,
            read.digest,
        )

    def __len__(self) -> int:
        """How many texts there are."""
        return len(self.prompts)

    def spread(self, most: int) -> np.ndarray:
        """Which texts to read where `most` are enough: from all over the file, in its order.

        Of groups whole ones, so that there may be a few more than `most`.
        """
        if len(self) <= most:
            return np.arange(len(self))
        if self.among(np.arange(len(self))) is None:
            return _spread(len(self), most)
        numbers = np.unique(self.groups)
        chosen = numbers[_spread(len(numbers), max(1, most * len(numbers) // len(self)))]
        return np.flatnonzero(np.isin(self.groups, chosen))

    def among(self, chosen: Sequence[int]) -> np.ndarray | None:
        """The groups of the chosen texts; None where any two of all texts are compared."""
        return None if (self.groups == self.groups[0]).all() else self.groups[chosen]


def _spread(total: int, count: int) -> np.ndarray:
    """`count` of the numbers below `total`, evenly."""
    return np.linspace(0, total - 1, count).round().astype(int)
