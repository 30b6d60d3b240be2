"""What people prefer: groups of completions to learn a reward from, and rated texts to judge by."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from etils import epath

from instar.data.completion_files import (
    Records,
    finite,
    joined,
    padded,
    read_json_lines,
    required,
)
from instar.data.completions import CompletionEncoder, Prompt, prompt_messages
from instar.data.epochs import shuffled_epochs
from instar.data.permutation import derive_keys, permute
from instar.errors import UserError

Kind = Literal["rankings", "pairs", "ratings"]


@dataclass(frozen=True)
class PreferenceConfig:
    """Which completions are compared.

    Attributes:
      path: JSON lines: a file, or a folder of them.
      kind: what a line holds.
        rankings: `{"prompt": P, "completions": [text, ...], "ranks": [number, ...]}`, lower is
        better, ties allowed; pairs: `{"prompt": P, "chosen": text, "rejected": text}`; ratings:
        `{"prompt": P, "completion": text, "rating": number}`, higher is better. P is a text (what
        the user says) or a list of messages.
      completions: at most so many are compared at once; of a larger group so many are drawn anew
        in each epoch.
      max_length: the tokens of a prompt and its completion; longer ones are left out.
      group: which ratings are compared: "prompt", those with the same prompt; "any", random ones,
        drawn anew in each epoch: where all ratings are on one scale.
      extra: more ratings, of another scale perhaps, to compare with one another and with those of
        `path`, to whose mean and standard deviation they are brought; where `group` is "any".
      repeat: how often each text of `path` is in an epoch, so that the extra ones weigh less.
    """

    path: str
    kind: Kind
    completions: int
    max_length: int
    group: Literal["prompt", "any"] = "prompt"
    extra: str | None = None
    repeat: int = 1

    def check(self) -> None:
        """Raises UserError for values that no comparison can have."""
        if not self.path:
            raise UserError("data.path must name a .jsonl file or a folder of them")
        if self.completions < 2:
            raise UserError(f"data.completions must be at least 2, not {self.completions}")
        if self.max_length < 1:
            raise UserError(f"data.max_length must be at least 1, not {self.max_length}")
        if self.group == "any" and self.kind != "ratings":
            raise UserError(f'data.group "any" is for ratings alone, and data.kind is {self.kind}')
        if self.extra is not None and self.group != "any":
            raise UserError(f'data.extra ({self.extra}) goes with data.group "any": set that')
        if self.repeat != 1 and self.extra is None:
            raise UserError(f"data.repeat ({self.repeat}) goes with data.extra: set epochs instead")
        if self.repeat < 1:
            raise UserError(f"data.repeat must be at least 1, not {self.repeat}")


@dataclass(frozen=True)
class _Group:
    """Completions that are compared with one another: their ids and their ranks (lower better)."""

    texts: list[list[int]]
    ranks: list[float]


@dataclass(frozen=True)
class RatedText:
    """A line of a file of ratings. `raters` are single people's scores, where they are known."""

    prompt: Prompt
    completion: str
    rating: float
    raters: tuple[float, ...] | None
    ids: list[int]


class Comparisons:
    """Groups of completions for training, numbered from 0 without end.

    Group k is a pure function of (seed, k): each epoch has every group once, in an order of its
    own. Groups with fewer than two completions, or with nothing but ties, are left out. (Where
    completions are drawn, `config.completions` of a larger group or with `group` "any", the drawn
    ones may still be tied.)

    Attributes:
      facts: counts: records, and of them skipped; completions too_long; groups too_small and tied;
        groups (in an epoch), and the completions and tokens in them.
      skipped: the broken records: dicts with "file", "position" and "reason".
      digest: the SHA-256 of the files' contents and of what encodes them, in hexadecimal.
    """

    def __init__(
        self, config: PreferenceConfig, groups: Sequence[_Group], facts: dict, read: Records
    ):
        """Use `open`."""
        self._config, self._groups = config, groups
        self.facts, self.skipped, self.digest = facts, read.skipped, read.digest
        self._drawn_from_all = config.group == "any"
        self._epoch = len(groups)
        if self._drawn_from_all:
            self._epoch = max(1, len(groups[0].texts) // config.completions)

    @classmethod
    def open(cls, config: PreferenceConfig, encoder: CompletionEncoder) -> "Comparisons":
        """Reads and encodes the files.

        Raises:
          UserError: one cannot be read, is mostly broken, or there is nothing to compare.
        """
        reader = _READERS[config.kind]

        def records(path: str, field: str) -> Records:
            return read_json_lines(path, field, encoder, lambda record: reader(record, encoder))

        read = records(config.path, "data.path")
        count = len(read.items) + len(read.skipped)
        if config.extra is not None:
            more = records(config.extra, "data.extra")
            count += len(more.items) + len(more.skipped)
            read = joined(read, more, _with_more(read.items, more.items, config.repeat))
        groups = _grouped_ratings(read.items, config) if config.kind == "ratings" else read.items
        short = [_without(group, config.max_length) for group in groups]
        enough = [group for group in short if len(group.texts) > 1]
        told_apart = [group for group in enough if len(set(group.ranks)) > 1]
        facts = {
            "records": count,
            "skipped": len(read.skipped),
            "too_long": _completions(groups) - _completions(short),
            "too_small": len(short) - len(enough),
            "tied": len(enough) - len(told_apart),
        }
        if not told_apart:
            raise UserError(
                f"data.path {config.path} has nothing to compare ({_told(facts)}): look at "
                "data.max_length and at what the records hold"
            )
        comparisons = cls(config, told_apart, facts, read)
        tokens = sum(len(text) for group in told_apart for text in group.texts)
        facts |= {
            "groups": len(comparisons),
            "completions": _completions(told_apart),
            "tokens": tokens,
        }
        return comparisons

    def __len__(self) -> int:
        """How many groups an epoch has."""
        return self._epoch

    @property
    def group_tokens(self) -> tuple[float, float]:
        """The tokens of a group: their mean over the groups, and their standard deviation."""
        most = self._config.completions
        each = [np.asarray([len(text) for text in group.texts]) for group in self._groups]
        if self._drawn_from_all:
            drawn = min(most, len(each[0]))
            return drawn * float(each[0].mean()), drawn**0.5 * float(each[0].std())
        sums = [lengths.mean() * min(most, len(lengths)) for lengths in each]
        return float(np.mean(sums)), float(np.std(sums))

    def batch(self, seed: int, first_group: int, count: int) -> dict[str, np.ndarray]:
        """The groups `first_group` to `first_group` + `count` - 1 of a run.

        Returns:
          With K = config.completions and T = config.max_length: `tokens` int32 [count, K, T],
          zeros behind each text; `lengths` int32 [count, K]; `ranks` float32 [count, K], lower is
          better, and for ratings the rating with its sign changed; `mask` bool [count, K], which
          of them are completions. The others come last, as a text of one token 0 and rank 0.
        """
        most, length = self._config.completions, self._config.max_length
        tokens = np.zeros((count, most, length), np.int32)
        lengths = np.ones((count, most), np.int32)
        ranks = np.zeros((count, most), np.float32)
        mask = np.zeros((count, most), bool)
        epochs, numbers = shuffled_epochs(seed, first_group, count, len(self), "groups")
        for row, (epoch, number) in enumerate(zip(epochs.tolist(), numbers.tolist(), strict=True)):
            group, members = self._members(seed, epoch, number)
            size = len(members)
            tokens[row, :size], lengths[row, :size] = padded(
                [group.texts[member] for member in members], length
            )
            ranks[row, :size] = [group.ranks[member] for member in members]
            mask[row, :size] = True
        return {"tokens": tokens, "lengths": lengths, "ranks": ranks, "mask": mask}

    def _members(self, seed: int, epoch: int, number: int) -> tuple[_Group, np.ndarray]:
        """A group of an epoch, and which of its completions are compared there."""
        most = self._config.completions
        if self._drawn_from_all:
            # Stretches of one permutation: each comes once in an epoch.
            group, first, purpose = self._groups[0], number * most, "members"
        else:
            group, first, purpose = self._groups[number], 0, f"members of {number}"
        total = len(group.texts)
        places = np.arange(first, min(first + most, total))
        if total <= most:
            return group, places
        return group, permute(places, total, derive_keys(seed, purpose, epoch))


def _completions(groups: Sequence[_Group]) -> int:
    return sum(len(group.texts) for group in groups)


def _without(group: _Group, max_length: int) -> _Group:
    """A group without its texts of more than `max_length` tokens."""
    kept = [index for index, ids in enumerate(group.texts) if len(ids) <= max_length]
    return _Group([group.texts[i] for i in kept], [group.ranks[i] for i in kept])


def _told(facts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in facts.items())


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


def _ranking(record: Mapping[str, Any], encoder: CompletionEncoder) -> _Group:
    completions, ranks = (required(record, name) for name in ("completions", "ranks"))
    for name, values in (("completions", completions), ("ranks", ranks)):
        if not isinstance(values, list) or not values:
            raise UserError(f"{name} must be a list with something in it")
    if len(completions) != len(ranks):
        raise UserError(f"there are {len(completions)} completions and {len(ranks)} ranks")
    prompt = required(record, "prompt")
    return _Group(
        [encoder.whole(prompt, completion) for completion in completions],
        [finite(rank, f"ranks[{index}]") for index, rank in enumerate(ranks)],
    )


def _pair(record: Mapping[str, Any], encoder: CompletionEncoder) -> _Group:
    prompt = required(record, "prompt")
    texts = [encoder.whole(prompt, required(record, name)) for name in ("chosen", "rejected")]
    if texts[0] == texts[1]:
        raise UserError("chosen and rejected are the same")
    return _Group(texts, [0.0, 1.0])


def _rating(record: Mapping[str, Any], encoder: CompletionEncoder) -> RatedText:
    prompt, completion = (required(record, name) for name in ("prompt", "completion"))
    raters = record.get("raters")
    if raters is not None:
        if not isinstance(raters, list):
            raise UserError(f"raters must be a list, not {type(raters).__name__}")
        raters = tuple(finite(score, f"raters[{index}]") for index, score in enumerate(raters))
    rating = finite(required(record, "rating"), "rating")
    return RatedText(prompt, completion, rating, raters, encoder.whole(prompt, completion))


_READERS: dict[str, Callable[[Mapping[str, Any], CompletionEncoder], Any]] = {
    "rankings": _ranking,
    "pairs": _pair,
    "ratings": _rating,
}


def on_scale_of(ratings: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`others` with the mean and the standard deviation of `ratings`: float64, of any number."""
    others = np.asarray(others, np.float64)
    if not len(others):
        return others
    return (others - others.mean()) * (np.std(ratings) / (others.std() or 1.0)) + np.mean(ratings)


def _with_more(
    rated: Sequence[RatedText], more: Sequence[RatedText], repeat: int
) -> list[RatedText]:
    """The rated texts `repeat` times, and more of them on their scale."""
    ratings, others = (np.asarray([each.rating for each in some]) for some in (rated, more))
    moved = on_scale_of(ratings, others).tolist()
    return [*rated] * repeat + [
        dataclasses.replace(each, rating=rating) for each, rating in zip(more, moved, strict=True)
    ]


def _grouped_ratings(rated: Sequence[RatedText], config: PreferenceConfig) -> list[_Group]:
    """The groups in the order of their first records; one of all where any may be compared."""
    members: dict[str, list[RatedText]] = {}
    for each in rated:
        messages = prompt_messages(each.prompt) if config.group == "prompt" else None
        members.setdefault(json.dumps(messages), []).append(each)
    return [
        _Group([each.ids for each in group], [-each.rating for each in group])
        for group in members.values()
    ]


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatedTexts:
    """Rated completions to evaluate on, in the order of their file.

    Attributes:
      prompts, completions: the texts.
      ratings: float64 [N], higher is better.
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
        field: str = "ratings",
    ) -> "RatedTexts":
        """Reads JSON lines of ratings, see `PreferenceConfig`.

        Broken records are skipped, and texts of more than `max_length` = T tokens left out.

        Args:
          field: what errors call the setting that names the path.

        Raises:
          UserError: the file cannot be read, is mostly broken, or has no text that is short enough.
        """
        read = read_json_lines(path, field, encoder, lambda record: _rating(record, encoder))
        rated = [each for each in read.items if len(each.ids) <= max_length]
        if not rated:
            raise UserError(
                f"{field} {path}: none of its {len(read.items)} texts fits into {max_length} "
                "tokens: allow longer ones"
            )
        tokens, lengths = padded([each.ids for each in rated], max_length)
        raters = tuple(each.raters for each in rated)
        return cls(
            [each.prompt for each in rated],
            [each.completion for each in rated],
            np.asarray([each.rating for each in rated], np.float64),
            None if None in raters else raters,
            tokens,
            lengths,
            {
                "records": len(read.items) + len(read.skipped),
                "skipped": len(read.skipped),
                "too_long": len(read.items) - len(rated),
                "texts": len(rated),
            },
            read.skipped,
            read.digest,
        )

    def __len__(self) -> int:
        """How many texts there are."""
        return len(self.prompts)
