"""Dialogues as token ids, by a chat template.

A text in a message cannot pose as control: a user that writes ``<|im_end|>`` ends no turn, while
the template's own ``<|im_end|>`` is the token.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from instar.data.chat_template import NAMES, ChatTemplate, Message, checked_messages
from instar.data.tokenizer_formats import Tokenizer
from instar.errors import UserError

__all__ = ["NAMES", "ChatTemplate", "Message", "Rendering", "encode_chat", "stop_ids"]

# Unicode assigns these to no character, ever; text has them by mistake only.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> list[int]:
    """Returns the ids of a dialogue; only what the template itself writes becomes a special token.

    Raises:
      UserError: a message is malformed, the template refuses the dialogue, or it needs a token
        that the tokenizer lacks.
    """
    rendering = Rendering(tokenizer, template, messages)
    return rendering.encode(rendering.text(len(messages), add_generation_prompt))


class Rendering:
    """A dialogue as a template writes it, in which only the template spells special tokens."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]):
        """Raises UserError as `encode_chat` does."""
        self._tokenizer, self._template = tokenizer, template
        self._special = _special_tokens(tokenizer, template)
        messages = checked_messages(messages)
        self._mark, self._edge = _unused(messages)
        self._messages = _break_spellings(messages, self._special, self._mark)

    def text(self, count: int, add_generation_prompt: bool) -> str:
        """Returns the text of the first `count` messages, for `encode`."""
        return self.text_and_edges(count, add_generation_prompt)[0]

    def text_and_edges(
        self, count: int, add_generation_prompt: bool = False
    ) -> tuple[str, list[int]]:
        """Returns that text, and where in it blocks of the template begin and end in turn.

        They are the ``{% generation %}`` blocks, which tell what is to be learnt.
        """
        tokenizer = self._tokenizer
        marked = self._template.render(
            self._messages[:count],
            bos_token=tokenizer.special_name(tokenizer.bos_id),
            eos_token=tokenizer.special_name(tokenizer.eos_id),
            add_generation_prompt=add_generation_prompt,
            edge=self._edge,
        )
        pieces = marked.split(self._edge)
        return "".join(pieces), list(itertools.accumulate(map(len, pieces[:-1])))

    def split(self, text: str) -> list[str]:
        """Returns the pieces of a text: at odd places special tokens, at even ones the rest."""
        return re.split(f"({_any_of(self._special)})", text)

    def words(self, text: str) -> str:
        """Returns a text without its special tokens."""
        return "".join(self.split(text)[::2]).replace(self._mark, "")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, or of a part of one."""
        parts = [
            self._special[piece] if index % 2 else piece.replace(self._mark, "")
            for index, piece in enumerate(self.split(text))
        ]
        return self._tokenizer.encode_parts(parts)


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Returns the tokens, in order, that end an assistant's turn.

    They are the EOS, the special token that the template writes after an assistant's content, and
    those of its `stop_tokens` that the tokenizer has.
    """
    special = _special_tokens(tokenizer, template)
    probe = "the assistant's words"
    text = template.render(
        [{"role": "user", "content": "a question"}, {"role": "assistant", "content": probe}],
        bos_token=tokenizer.special_name(tokenizer.bos_id),
        eos_token=tokenizer.special_name(tokenizer.eos_id),
    )
    after = re.search(rf"{probe}\s*({_any_of(special)})", text)
    names = [*([after[1]] if after else []), *(n for n in template.stop_tokens if n in special)]
    return sorted({tokenizer.eos_id, *(special[name] for name in names)})


def _special_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, int]:
    """Returns the special tokens' ids by name, when all that the template needs are there."""
    for name in template.required:
        if name not in tokenizer.special_tokens:
            raise UserError(
                f"chat template {template.name} needs the token {name!r}, which the tokenizer "
                "lacks; choose another template or a tokenizer that has it"
            )
    return tokenizer.special_tokens


def _any_of(names: Iterable[str]) -> str:
    """Returns an expression for any of the names, the longest that matches."""
    return _alternatives(tuple(names))


@functools.cache
def _alternatives(names: tuple[str, ...]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


def _unused(messages: Sequence[Message]) -> tuple[str, str]:
    """Returns two characters that are in no message."""
    held = set().union(*(text for message in messages for text in message.values()))
    unused = [character for character in _NONCHARACTERS if character not in held]
    if len(unused) < 2:
        raise UserError(
            "messages hold nearly every noncharacter from U+FDD0 to U+FDEF; remove two of them"
        )
    return unused[0], unused[1]


def _break_spellings(
    messages: Sequence[Message], special: Mapping[str, int], mark: str
) -> list[Message]:
    """Returns the messages with a mark inside whatever spells a special token.

    Contents are else as they are, for templates look at them.
    """
    starts = re.compile(f"(?={_any_of(special)})")

    def broken(text: str) -> str:
        places = {match.start() for match in starts.finditer(text)}
        places |= _unfinished(text.rstrip(), special)
        for place in sorted(places, reverse=True):
            text = text[: place + 1] + mark + text[place + 1 :]
        return text

    return [
        {name: text if name == "role" else broken(text) for name, text in message.items()}
        for message in messages
    ]


def _unfinished(content: str, special: Mapping[str, int]) -> set[int]:
    """Returns where a special token starts that what comes after the content could complete."""
    beginnings, longest = _beginnings(tuple(special))
    starts = range(max(0, len(content) - longest + 1), len(content))
    return {start for start in starts if content[start:] in beginnings}


@functools.cache
def _beginnings(names: tuple[str, ...]) -> tuple[frozenset[str], int]:
    """Every beginning of the names, and the length of the longest name."""
    begun = {name[:end] for name in names for end in range(1, len(name) + 1)}
    return frozenset(begun), max(map(len, names))
