"""Dialogues to learn from: what the files call them, and which of their tokens are targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from instar.data.chat import ChatTemplate, Message, Rendering
from instar.data.chat_template import checked_messages
from instar.data.tokenizer_formats import Tokenizer
from instar.errors import UserError

Format = Literal["messages", "alpaca", "sharegpt"]

# Of Stanford's two prompts the one for tasks with an input (tatsu-lab/stanford_alpaca).
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class EncodedDialogue:
    """A dialogue as the model reads it.

    Attributes:
      ids: int32 [T].
      targets: bool [T], the tokens that the assistant says, each turn's end token included.
      ends: where each of the assistant's turns ends: indexes behind its end token, ascending.
    """

    ids: np.ndarray
    targets: np.ndarray
    ends: tuple[int, ...]

    def cut(self, limit: int) -> "EncodedDialogue | None":
        """As many whole turns as fit into `limit` tokens; None where the first does not."""
        kept = tuple(end for end in self.ends if end <= limit)
        if not kept:
            return None
        return EncodedDialogue(self.ids[: kept[-1]], self.targets[: kept[-1]], kept)


def read_dialogue(record: Any, form: Format, place: str) -> list[Message]:
    """The messages of one record of a file.

    - `messages` (OpenAI): `{"messages": [{"role": ..., "content": ...}, ...]}`;
    - `alpaca` (Stanford): `{"instruction": ..., "input": ..., "output": ...}`;
    - `sharegpt`: `{"conversations": [{"from": "human", "value": ...}, ...]}`.

    Args:
      place: what errors call the record, such as "chats.jsonl, line 3".

    Raises:
      UserError: a field is missing or of another type, a role is unknown, a turn is empty, or the
        assistant says nothing.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: must be a JSON object, not {type(record).__name__}")
    readers = {"messages": _messages, "alpaca": _alpaca, "sharegpt": _sharegpt}
    try:
        messages = checked_messages(readers[form](record))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    for index, message in enumerate(messages):
        if not message["content"].strip():
            raise UserError(f"{place}: messages[{index}] ({message['role']}) is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{place}: the assistant says nothing in it")
    return messages


def _field(record: Mapping, name: str, kind: type, default: Any = None) -> Any:
    value = record.get(name, default)
    if not isinstance(value, kind):
        wanted = {str: "a text", list: "a list"}[kind]
        raise UserError(f"{name} must be {wanted}, not {type(value).__name__}")
    return value


def _messages(record: Mapping) -> list[Message]:
    return _field(record, "messages", list)


def _alpaca(record: Mapping) -> list[Message]:
    instruction, answer = _field(record, "instruction", str), _field(record, "output", str)
    given = _field(record, "input", str, default="")
    turns = [{"role": "assistant", "content": answer}]
    if not given.strip():
        return [{"role": "user", "content": instruction}, *turns]
    system = {"role": "system", "content": ALPACA_WITH_INPUT}
    return [system, {"role": "user", "content": f"{instruction}\n\n### Input:\n{given}"}, *turns]


def _sharegpt(record: Mapping) -> list[Message]:
    messages = []
    for index, turn in enumerate(_field(record, "conversations", list)):
        if not isinstance(turn, Mapping) or turn.get("from") not in SHAREGPT_ROLES:
            raise UserError(
                f'conversations[{index}] must have a "from" of {", ".join(SHAREGPT_ROLES)}'
            )
        role = SHAREGPT_ROLES[turn["from"]]
        messages.append({"role": role, "content": turn.get("value")})
    return messages


def encode_dialogue(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    begin: Sequence[int] = (),
) -> EncodedDialogue:
    """The tokens of a dialogue up to the assistant's last turn, and which of them are targets.

    What the assistant says is encoded apart from what stands before it, as it is when a model
    answers. What a template writes behind the end token belongs to the next turn.

    Args:
      begin: ids before the dialogue, such as a BOS that the template does not write.

    Raises:
      UserError: the template refuses the dialogue, does not write it from the beginning to the
        end, or ends the assistant's turns with no special token.
    """
    rendering = Rendering(tokenizer, template, messages)
    ids, targets, ends = list(begin), [False] * len(begin), []
    written = ""
    for count, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        before = rendering.text(count - 1, add_generation_prompt=True)
        after = rendering.text(count, add_generation_prompt=False)
        if not (before.startswith(written) and after.startswith(before)):
            raise UserError(
                f"chat template {template.name} writes messages[{count - 1}] into what stands "
                "before it, so that its tokens cannot be told apart: use another template"
            )
        answer = _to_its_end(rendering, after[len(before) :], template)
        for text, is_target in ((before[len(written) :], False), (answer, True)):
            encoded = rendering.encode(text)
            ids += encoded
            targets += [is_target] * len(encoded)
        ends.append(len(ids))
        written = before + answer
    return EncodedDialogue(np.asarray(ids, np.int32), np.asarray(targets, bool), tuple(ends))


def _to_its_end(rendering: Rendering, answer: str, template: ChatTemplate) -> str:
    """The assistant's turn up to and with its end token."""
    pieces = rendering.split(answer)
    if len(pieces) == 1:
        raise UserError(
            f"chat template {template.name} writes no special token behind what the assistant "
            "says, so that a model would not learn to stop: use another template"
        )
    return "".join(pieces[:-1])
