"""Dialogues as token ids, by a chat template.

A text in a message cannot pose as control: a user that writes ``<|im_end|>`` ends no turn, while
the template's own ``<|im_end|>`` is the token.
"""

import functools
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
        self._messages, self._mark = _break_spellings(checked_messages(messages), self._special)

    def text(self, count: int, add_generation_prompt: bool) -> str:
        """Returns the text of the first `count` messages, for `encode`."""
        tokenizer = self._tokenizer
        return self._template.render(
            self._messages[:count],
            bos_token=tokenizer.special_name(tokenizer.bos_id),
            eos_token=tokenizer.special_name(tokenizer.eos_id),
            add_generation_prompt=add_generation_prompt,
        )

    def split(self, text: str) -> list[str]:
        """Returns the pieces of a text: at odd places special tokens, at even ones the rest."""
        return re.split(f"({_any_of(self._special)})", text)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, or of a part of one."""
        parts = [
            self._special[piece] if index % 2 else piece.replace(self._mark, "")
            for index, piece in enumerate(self.split(text))
        ]
        return self._tokenizer.encode_parts(parts)


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Returns the tokens, in order, that end an assistant's turn.

    They are the EOS, and the special token that the template writes after an assistant's content.
    """
    special = _special_tokens(tokenizer, template)
    probe = "the assistant's words"
    text = template.render(
        [{"role": "user", "content": "a question"}, {"role": "assistant", "content": probe}],
        bos_token=tokenizer.special_name(tokenizer.bos_id),
        eos_token=tokenizer.special_name(tokenizer.eos_id),
    )
    after = re.search(rf"{probe}\s*({_any_of(special)})", text)
    return sorted({tokenizer.eos_id, *([special[after[1]]] if after else [])})


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


def _break_spellings(
    messages: Sequence[Message], special: Mapping[str, int]
) -> tuple[list[Message], str]:
    """Returns the messages with a mark inside whatever spells a special token, and the mark.

    Contents are else as they are, for templates look at them.
    """
    contents = "".join(message["content"] for message in messages)
    mark = next((mark for mark in _NONCHARACTERS if mark not in contents), None)
    if mark is None:
        raise UserError(
            "messages hold every noncharacter from U+FDD0 to U+FDEF; remove one of them"
        )
    starts = re.compile(f"(?={_any_of(special)})")
    broken = []
    for message in messages:
        content = message["content"]
        places = {match.start() for match in starts.finditer(content)}
        places |= _unfinished(content.rstrip(), special)
        for place in sorted(places, reverse=True):
            content = content[: place + 1] + mark + content[place + 1 :]
        broken.append({**message, "content": content})
    return broken, mark


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
