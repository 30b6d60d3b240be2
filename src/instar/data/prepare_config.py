"""What `instar prepare` is told, and which documents are held out by it."""

import hashlib
from dataclasses import dataclass, field

from instar.data.chat_template import NAMES
from instar.data.packing import Strategy
from instar.data.sources import SourceConfig
from instar.data.tokenizer import TokenizerConfig
from instar.errors import UserError


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that `instar prepare` is told.

    A document is held out with probability `held_out` by a hash of `seed` and its text, so that
    copies of a text fall on one side. A shard is closed after `shard_tokens` tokens; a document of
    more than `record_tokens` is stored in several records.

    Dialogues are written by `chat_template`, the name of one that comes with Instar or the path of
    a .jinja file. They are cut after the last of the assistant's turns that fits into the longest
    rows, and packed by "best_fit" whatever `packing` says. A template that writes earlier turns
    otherwise than the last makes a document of each answer, with the turns before it as its prompt.
    """

    sources: tuple[SourceConfig, ...]
    sequence_lengths: tuple[int, ...]
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    chat_template: str | None = None
    packing: Strategy = "concat"
    held_out: float = 0.01
    seed: int = 0
    shard_tokens: int = 2**26
    record_tokens: int = 2**14

    def check(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise UserError("sources must name at least one source")
        if len(set(names)) < len(names):
            raise UserError(f"sources must have different names, not {', '.join(names)}")
        if not self.sequence_lengths or min(self.sequence_lengths) < 1:
            raise UserError("sequence_lengths must be at least one positive length")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out must be in [0, 1), not {self.held_out}")
        if self.shard_tokens < 1 or self.record_tokens < 1:
            raise UserError("shard_tokens and record_tokens must each be at least 1")
        self._check_template()

    def _check_template(self) -> None:
        dialogues = [source.name for source in self.sources if source.dialogue is not None]
        name = self.chat_template
        if dialogues and name is None:
            raise UserError(
                f"chat_template must say how the dialogues of source {dialogues[0]} are written: "
                f"one of {', '.join(NAMES)}, or the path of a .jinja file"
            )
        if name is not None and not dialogues:
            raise UserError(
                "chat_template is for dialogues, and no source has any: leave it out, or set "
                "sources.dialogue"
            )
        if name is not None and name not in NAMES and not name.endswith(".jinja"):
            raise UserError(
                f"chat_template must be one of {', '.join(NAMES)}, or the path of a .jinja file, "
                f"not {name!r}"
            )


def is_held_out(text: str, config: PrepareConfig) -> bool:
    """Whether a document is kept from training."""
    return draw(text, str(config.seed)) < config.held_out


def draw(text: str, salt: str) -> float:
    """A number in [0, 1] that is uniform over texts, and the same for the same text and salt."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
