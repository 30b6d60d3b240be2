"""Prompts that a policy is to complete."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from instar.data.completion_files import padded, read_json_lines, required
from instar.data.completions import CompletionEncoder, Prompt
from instar.data.epochs import shuffled_epochs
from instar.errors import UserError


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file, in its order.

    Attributes:
      records: the objects of the file; other keys than "prompt" are left in them.
      prompts: what each says.
      tokens: int32 [N, P], up to where the assistant begins to speak; zeros behind.
      lengths: int32 [N], how many of them are real.
      facts: how many records there are, and how many were skipped or too long.
      skipped: the broken ones: dicts with "file", "position" and "reason".
      digest: the SHA-256 of the file's content and of what encodes it, in hexadecimal.
    """

    records: list[Mapping[str, Any]]
    prompts: list[Prompt]
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
        field: str = "prompts",
    ) -> "PromptSet":
        """Reads JSON lines `{"prompt": a text or messages, ...}`.

        Broken records are skipped, and prompts of more than `max_length` = P tokens left out.

        Args:
          field: what errors call the setting that names the path.

        Raises:
          UserError: the file cannot be read, is mostly broken, or has no prompt that is short
            enough.
        """

        def parse(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[int]]:
            return record, encoder.prompt(required(record, "prompt"))

        read = read_json_lines(path, field, encoder, parse)
        fitting = [(record, ids) for record, ids in read.items if len(ids) <= max_length]
        if not fitting:
            raise UserError(
                f"{field} {path}: none of its {len(read.items)} prompts fits into {max_length} "
                "tokens: allow longer ones"
            )
        tokens, lengths = padded([ids for _, ids in fitting], max_length)
        return cls(
            [record for record, _ in fitting],
            [record["prompt"] for record, _ in fitting],
            tokens,
            lengths,
            {
                "records": len(read.items) + len(read.skipped),
                "skipped": len(read.skipped),
                "too_long": len(read.items) - len(fitting),
                "prompts": len(fitting),
            },
            read.skipped,
            read.digest,
        )

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)

    def batch(self, seed: int, first: int, count: int) -> np.ndarray:
        """The indices int64 [count] of the prompts `first` to `first` + `count` - 1 of a run.

        A run goes through all prompts, in a new order each epoch; which is its k-th is a pure
        function of (seed, k).
        """
        return shuffled_epochs(seed, first, count, len(self), "prompts")[1]
