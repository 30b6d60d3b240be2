"""What `instar prepare` is told, and which documents are held out by it."""

import hashlib
from dataclasses import dataclass, field

from instar.data.chat_template import NAMES
from instar.data.packing import Strategy
from instar.data.sources import SourceConfig
from instar.data.tokenizer import TokenizerConfig
from instar.errors import UserError

# The shortest rows that hold a blank in every piece of a text (see `instar.data.infilling`).
LEAST_INFILLED = 5


@dataclass(frozen=True)
class InfillingConfig:
    """How texts become blanks to fill in.

    Attributes:
      long_mask: the token in the place of a blank that reaches to the end of the text.
      short_mask: that in the place of a blank of a few tokens.
      start, end: what the hidden tokens are learnt between.
      short_share: the share of short blanks; that of GLM-130B (Zeng et al. 2022, 2210.02414,
        section 2.2).
    """

    long_mask: str = "[gMASK]"
    short_mask: str = "[MASK]"
    start: str = "<sop>"
    end: str = "<eop>"
    short_share: float = 0.3

    @property
    def tokens(self) -> dict[str, str]:
        """The names of the tokens, by field."""
        fields = ("long_mask", "short_mask", "start", "end")
        return {field: getattr(self, field) for field in fields}

    def check(self) -> None:
        if not 0 <= self.short_share <= 1:
            raise UserError(f"infilling.short_share must be in [0, 1], not {self.short_share}")
        names = list(self.tokens.values())
        if len(set(names)) < len(names):
            raise UserError(f"infilling must name four different tokens, not {', '.join(names)}")


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that `instar prepare` is told.

    A document is held out with probability `held_out` by a hash of `seed` and its text, so that
    copies of a text fall on one side. A shard is closed after `shard_tokens` tokens; a document of
    more than `record_tokens` is stored in several records.

    Dialogues are written by `chat_template`, the name of one that comes with Instar or the path of
    a .jinja file. For each of `sequence_lengths` they are cut after the last of the assistant's
    turns that fits into a row, left out where the first does not, and packed by "best_fit" whatever
    `packing` says. A template that writes earlier turns otherwise than the last makes a document of
    each answer, with the turns before it as its prompt.

    With `infilling`, plain texts become blanks to fill in, for a model whose texts begin with a
    prefix: each is cut into pieces that fit into the longest rows, and these are packed as
    dialogues are. The blanks are drawn once, by `seed`.
    """

    sources: tuple[SourceConfig, ...]
    sequence_lengths: tuple[int, ...]
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    chat_template: str | None = None
    infilling: InfillingConfig | None = None
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
        self._check_infilling()

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

    def _check_infilling(self) -> None:
        if self.infilling is None:
            return
        if all(source.dialogue is not None for source in self.sources):
            raise UserError(
                "infilling is for plain texts, and all sources have dialogues: leave it out, or "
                "add a source of texts"
            )
        if max(self.sequence_lengths) < LEAST_INFILLED:
            raise UserError(
                f"sequence_lengths must have one of at least {LEAST_INFILLED} where texts become "
                "blanks to fill in (infilling)"
            )


def is_held_out(text: str, config: PrepareConfig) -> bool:
    """Whether a document is kept from training."""
    return draw(text, str(config.seed)) < config.held_out


def draw(text: str, salt: str) -> float:
    """A number in [0, 1] that is uniform over texts, and the same for the same text and salt."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
