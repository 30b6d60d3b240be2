"""What people prefer: groups of completions to learn a reward from."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from instar.data.completion_files import Records, joined, padded, read_json_lines
from instar.data.completions import CompletionEncoder
from instar.data.epochs import shuffled_epochs
from instar.data.permutation import derive_keys, permute
from instar.data.preference_records import READERS, Group, Kind, RatedText, prompt_key
from instar.errors import UserError


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
    group: Group = "prompt"
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
        reader = READERS[config.kind]

        def records(path: str, field: str) -> Records[list[RatedText]]:
            return read_json_lines(path, field, encoder, lambda record: reader(record, encoder))

        read = records(config.path, "data.path")
        count = len(read.items) + len(read.skipped)
        if config.extra is not None:
            more = records(config.extra, "data.extra")
            count += len(more.items) + len(more.skipped)
            read = joined(read, more, _with_more(read.items, more.items, config.repeat))
        groups = [_group(texts) for texts in _compared(read.items, config)]
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
                f"data.path {config.path} has nothing to compare ({_told(facts)}): "
                f"{_remedies(config, facts)}"
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


def _remedies(config: PreferenceConfig, facts: Mapping[str, int]) -> str:
    """What to look at where no group is left, by what it was left out for."""
    alone = "a group needs two completions"
    if config.kind == "ratings" and config.group == "prompt":
        alone = (
            'a prompt needs two ratings, or data.group="any", which compares all with one another'
        )
    remedies = {
        "too_long": f"some have more tokens than data.max_length ({config.max_length}): raise it",
        "too_small": alone,
        "tied": "all ranks or ratings of a group are equal: none is better than another",
    }
    return "; ".join(remedy for fact, remedy in remedies.items() if facts[fact])


def on_scale_of(ratings: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`others` with the mean and the standard deviation of `ratings`: float64, of any number."""
    others = np.asarray(others, np.float64)
    if not len(others):
        return others
    return (others - others.mean()) * (np.std(ratings) / (others.std() or 1.0)) + np.mean(ratings)


def _with_more(
    rated: Sequence[list[RatedText]], more: Sequence[list[RatedText]], repeat: int
) -> list[list[RatedText]]:
    """The records of one text each `repeat` times, and more of them on their scale."""
    ratings, others = (np.asarray([text.rating for (text,) in some]) for some in (rated, more))
    moved = on_scale_of(ratings, others).tolist()
    return [*rated] * repeat + [
        [dataclasses.replace(text, rating=rating)]
        for (text,), rating in zip(more, moved, strict=True)
    ]


def _compared(
    records: Sequence[list[RatedText]], config: PreferenceConfig
) -> list[list[RatedText]]:
    """The texts that are compared with one another, in the order of their first records."""
    if config.kind != "ratings":
        return [*records]
    members: dict[str, list[RatedText]] = {}
    for (text,) in records:
        key = "" if config.group == "any" else prompt_key(text.prompt)
        members.setdefault(key, []).append(text)
    return [*members.values()]


def _group(texts: Sequence[RatedText]) -> _Group:
    return _Group([text.ids for text in texts], [-text.rating for text in texts])
