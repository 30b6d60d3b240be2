"""Texts as blanks to fill in, for models whose texts begin with a prefix (GLM, Du et al. 2022).

A span of a text is taken out, a mask token stands in its place, and the span is learnt behind the
start token: all that stands before that is the prefix, which all of the text sees.

    long blank      before [gMASK] <sop> the rest <eop>
    short blank     before [MASK] after <sop> span <eop>
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instar.data.encoders import Document
from instar.data.formats import Broken
from instar.data.prepare_config import InfillingConfig, draw
from instar.data.sources import Record
from instar.data.tokenizer import Tokenizer
from instar.errors import UserError

# What a blank adds to a text: its mask, its start and its end.
ADDED = 3
# The lengths of short blanks: 1, 2, ... with the chances of a Poisson variable of mean 3 that is
# not 0 (Du et al. 2022, section 2.1, without the blanks of nothing), added up.
_LENGTHS = np.cumsum([3.0**length / math.factorial(length) for length in range(1, 32)])
_LENGTHS /= _LENGTHS[-1]


@dataclass(frozen=True)
class BlankTokens:
    """The ids of the tokens that `InfillingConfig` names."""

    long_mask: int
    short_mask: int
    start: int
    end: int

    @classmethod
    def of(cls, config: InfillingConfig, tokenizer: Tokenizer) -> "BlankTokens":
        """Those of a tokenizer.

        Raises:
          UserError: it has no such token, or one that a text can spell.
        """
        names, special = config.tokens, tokenizer.special_tokens
        for field, name in names.items():
            if name not in special:
                raise UserError(
                    f"infilling.{field}: the tokenizer has no special token {name!r}; name one of "
                    f"those that it has ({', '.join(special)}), or take another tokenizer"
                )
        return cls(**{field: special[name] for field, name in names.items()})


class InfillingEncoder:
    """Encodes texts as blanks to fill in, each in at most `limit` tokens.

    A text that is longer becomes several, for none can be read in pieces: each goes on with the
    last token of the one before, and has a blank of its own. A blank lies between what tells where
    it begins and where it ends. So it holds neither the first token of a piece that does not begin
    the record's text, nor, where it is short, the last of one that does not end it. A long blank
    that is cut off with its piece has no end token: there is nothing to stop for.

    A text has one blank, because a model's text has one start token (`instar.models.prefix`). GLM
    fills in several of the short ones, which make up 15 % of a text; here they are a smaller part
    of what is learnt. Where a blank lies depends on the record's text and on `seed` alone.
    """

    marks_targets = True

    def __init__(self, tokenizer: Tokenizer, config: InfillingConfig, limit: int, seed: int):
        """Raises UserError where the tokenizer lacks a token."""
        self._tokenizer, self._config, self._seed = tokenizer, config, seed
        self._tokens = BlankTokens.of(config, tokenizer)
        self._room = limit - ADDED

    def __call__(self, records: Sequence[Record]) -> list[list[Document] | Broken]:
        """The documents of each whole record, in their order, or why there are none."""
        encoded = self._tokenizer.encode_batch([record.text for record in records])
        return [
            self._documents(record.text, ids) if len(ids) else Broken("it has no token")
            for record, ids in zip(records, encoded, strict=True)
        ]

    def _documents(self, text: str, ids: np.ndarray) -> list[Document]:
        # Not the text itself, which would be hashed again for each of its pieces.
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        starts = range(0, max(len(ids) - 1, 1), self._room - 1)
        return [self._document(name, ids, start) for start in starts]

    def _document(self, name: str, ids: np.ndarray, first: int) -> Document:
        """The piece of a text that begins with its token `first`."""
        end = min(first + self._room, len(ids))
        begins, ends = first == 0, end == len(ids)
        kind, length, place = (
            draw(name, f"{what}\0{first}\0{self._seed}") for what in ("kind", "length", "place")
        )
        low, tokens = first if begins else first + 1, self._tokens
        if kind < self._config.short_share:
            high = end if ends else end - 1
            span = min(1 + int(np.searchsorted(_LENGTHS, length, side="right")), high - low)
            at = low + _below(high - low - span + 1, place)
            mask, behind, closing = tokens.short_mask, at + span, [tokens.end]
        else:
            at = low + _below(end - low, place)
            mask, behind, closing = tokens.long_mask, end, [tokens.end] if ends else []
        prefix = (ids[first:at], [mask], ids[behind:end])
        parts = (*prefix, [tokens.start], ids[at:behind], closing)
        whole = np.concatenate([np.asarray(part, np.int32) for part in parts])
        targets = np.arange(len(whole)) >= sum(map(len, prefix))
        return Document(whole, self._size(ids, at, behind), targets)

    def _size(self, ids: np.ndarray, begin: int, end: int) -> int:
        """The bytes in UTF-8 of what the tokens from `begin` to before `end` add to the text.

        Where a tokenizer does not tell the bytes of a token, those of these tokens alone.
        """
        span = ids[begin:end].tolist()
        spelled = [self._tokenizer.token_bytes(token) for token in span]
        if None in spelled:
            return len(self._tokenizer.decode(span).encode())
        prefix = self._tokenizer.decoded_prefix if begin == 0 else ""
        return len(b"".join(spelled).removeprefix(prefix.encode()))


def _below(count: int, share: float) -> int:
    """The whole number below `count` at this share of the way, in [0, 1]."""
    return min(int(share * count), count - 1)
