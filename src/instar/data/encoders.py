"""From records to documents: their tokens, and in dialogues those that are to be learnt."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from etils import epath

from instar.data.chat_template import NAMES, ChatTemplate
from instar.data.dialogues import encode_dialogue
from instar.data.formats import Broken
from instar.data.sources import Record
from instar.data.tokenizer import Tokenizer
from instar.errors import UserError


@dataclass(frozen=True)
class Document:
    """What is stored of a record.

    Attributes:
      ids: int [T], all that is around the text included.
      bytes: the length in UTF-8 of what is learnt: of a text all, of a dialogue mostly what the
        assistant says, of a blank to fill in what it hides.
      targets: bool [T], the tokens to learn; None where that is all of them.
      ends: where each of the assistant's turns in a dialogue ends: indexes behind its end token,
        ascending.
      sizes: what each of them adds to `bytes`.
    """

    ids: np.ndarray
    bytes: int
    targets: np.ndarray | None = None
    ends: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class Encoder(Protocol):
    """What makes documents of records.

    Attributes:
      marks_targets: whether its documents have targets, and have to be packed whole.
    """

    marks_targets: bool

    def __call__(self, records: Sequence[Record]) -> list[list[Document] | Broken]:
        """The documents of each whole record, in their order, or why there are none."""
        ...


class TextEncoder:
    """Encodes texts, between a BOS and an EOS."""

    marks_targets = False

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, records: Sequence[Record]) -> list[list[Document]]:
        """The one document of each whole record, in their order."""
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        encoded = self._tokenizer.encode_batch([record.text for record in records])
        return [
            [Document(np.concatenate([[bos], ids, [eos]]), len(record.text.encode()))]
            for record, ids in zip(records, encoded, strict=True)
        ]


class DialogueEncoder:
    """Encodes dialogues by a chat template, all turns of each: what fits is a row's business."""

    marks_targets = True

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self._tokenizer, self._template = tokenizer, template

    def __call__(self, records: Sequence[Record]) -> list[list[Document] | Broken]:
        """The documents of each whole record, in their order, or why there are none."""
        return [self._encode(record) for record in records]

    def _encode(self, record: Record) -> list[Document] | Broken:
        try:
            texts = encode_dialogue(self._tokenizer, self._template, record.messages)
        except UserError as error:
            return Broken(str(error))
        return [
            Document(text.ids, sum(text.sizes), text.targets, text.ends, text.sizes)
            for text in texts
        ]


def open_template(name: str, saved: epath.Path) -> ChatTemplate:
    """The template that a config names.

    Args:
      name: one of `NAMES`, or the path of a file.
      saved: where the data set keeps it, and has it from then on, whatever becomes of that file.

    Raises:
      UserError: the file cannot be read, or is not a template.
    """
    if name in NAMES:
        return ChatTemplate.named(name)
    return ChatTemplate(name, _read(saved if saved.exists() else epath.Path(name)))


def with_bos(template: ChatTemplate, tokenizer: Tokenizer) -> ChatTemplate:
    """A named template that writes the BOS too, where texts of the tokenizer begin with one.

    Its source alone then gives the ids that are trained on. One from a file is taken as it is.
    """
    if template.name not in NAMES or not (template.bos and tokenizer.adds_bos):
        return template
    return dataclasses.replace(template, source="{{ bos_token }}" + template.source)


def _read(file: epath.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template {file} cannot be read ({error}); name another") from None


def check_template(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Sees that the two go together.

    Raises:
      UserError: the template needs a token that the tokenizer lacks, refuses a question and its
        answer, or ends the answer with no special token.
    """
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    encode_dialogue(tokenizer, template, probe)
