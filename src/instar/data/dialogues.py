"""Dialogues to learn from: what the files call them, and which of their tokens are targets."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from instar.data.chat import ChatTemplate, Message, Rendering
from instar.data.chat_template import TOOL_FIELDS, checked_messages
from instar.data.formats import missing
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
      targets: bool [T], the tokens to be learnt, each turn's end token among them.
      begins: where each of the assistant's turns begins: how many of the ids it is given when it
        answers.
      ends: where each ends: indexes behind its end token, ascending.
      sizes: the bytes in UTF-8 of what is learnt up to each end, from the one before.
    """

    ids: np.ndarray
    targets: np.ndarray
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    sizes: tuple[int, ...]


def read_dialogue(record: Any, form: Format) -> list[Message]:
    """The messages of one record of a file.

    - `messages` (OpenAI): `{"messages": [{"role": ..., "content": ...}, ...]}`, where an
      assistant's message may have `chat_template.TOOL_FIELDS` besides;
    - `alpaca` (Stanford): `{"instruction": ..., "input": ..., "output": ...}`, of which the input
      may be missing, null or empty;
    - `sharegpt`: `{"conversations": [{"from": "human", "value": ...}, ...]}`. Where the assistant
      speaks first, as in many that were cut out of a longer one, that turn answers nothing that is
      there, and is left out.

    Raises:
      UserError: a field is missing or of another type, a role is unknown, a turn is empty, or the
        assistant speaks first or says nothing.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"a dialogue must be a JSON object, not {type(record).__name__}")
    readers = {"messages": _messages, "alpaca": _alpaca, "sharegpt": _sharegpt}
    messages = checked_messages(readers[form](record))
    if form == "sharegpt" and messages[0]["role"] == "assistant":
        messages = messages[1:]
    for index, message in enumerate(messages):
        if not message["content"].strip():
            raise UserError(f"messages[{index}] ({message['role']}) is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("the assistant says nothing in it")
    if messages[0]["role"] == "assistant":
        raise UserError("messages[0]: the assistant speaks first; begin with the user's")
    return messages


def _field(record: Mapping, name: str, kind: type, default: Any = None) -> Any:
    value = default if record.get(name) is None else record[name]
    if value is None:
        raise UserError(missing(record, name))
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
        # Not `in` the dict itself: a list or an object, which JSON may have there, is no key.
        if not isinstance(turn, Mapping) or turn.get("from") not in tuple(SHAREGPT_ROLES):
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
) -> list[EncodedDialogue]:
    """The tokens of a dialogue up to the assistant's last turn, and which of them are targets.

    Targets are what stands in the template's ``{% generation %}`` blocks, and where it has none,
    what the assistant says with its end token. What the assistant says is encoded apart from what
    stands before it, as it is when a model answers. What a template writes behind the end token
    belongs to the next turn.

    A template may write what was said before otherwise than the turn that is being said (ChatGLM-6B
    marks the last alone as an answer). A turn then begins a text of its own, with all rounds before
    it as its prompt.

    Args:
      begin: ids before each text, such as a BOS that the template does not write.

    Returns:
      The texts, each with one turn of the assistant or more, in their order.

    Raises:
      UserError: the template refuses the dialogue, does not write a turn from the beginning to the
        end, or ends the assistant's turns with no special token, or with one that is no target.
    """
    rendering = Rendering(tokenizer, template, messages)
    texts = [_Text(rendering, begin)]
    for count, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        prompt = rendering.text(count - 1, add_generation_prompt=True)
        whole, edges = rendering.text_and_edges(count)
        if edges and not whole.startswith(prompt) and set(TOOL_FIELDS) & set(message):
            # What it does with tools stands where its words would.
            prompt = rendering.text(count - 1, add_generation_prompt=False)
        if not whole.startswith(texts[-1].written):
            texts.append(_Text(rendering, begin))
        if not (prompt.startswith(texts[-1].written) and whole.startswith(prompt)):
            raise UserError(
                f"chat template {template.name} writes messages[{count - 1}] into what stands "
                "before it, so that its tokens cannot be told apart: use another template"
            )
        said = len(prompt)
        end = said + len(_to_its_end(rendering, whole[said:], template))
        learnt = list(zip(edges[::2], edges[1::2], strict=True)) if edges else [(said, end)]
        if not any(begins < end <= ends for begins, ends in learnt):
            raise UserError(
                f"chat template {template.name} leaves the end of what the assistant says out of "
                "its generation blocks, so that a model would not learn to stop: put it into them"
            )
        texts[-1].add_turn(whole[:end], said, learnt)
    return [text.encoded() for text in texts]


class _Text:
    """A text that grows turn by turn; `written` is all of it."""

    def __init__(self, rendering: Rendering, begin: Sequence[int]):
        self._rendering, self.written = rendering, ""
        self._ids, self._targets = list(begin), [False] * len(begin)
        self._begins, self._ends, self._sizes = [], [], []

    def add_turn(self, text: str, said: int, learnt: Sequence[tuple[int, int]]) -> None:
        """Makes `text` all of it: from `said` on the assistant's, with targets at `learnt`."""
        first, size = len(self.written), 0
        inside = {place for edges in learnt for place in edges if first < place < len(text)}
        for start, end in itertools.pairwise(sorted({first, said, len(text)} | inside)):
            if start == said:
                self._begins.append(len(self._ids))
            piece, is_target = text[start:end], any(a <= start and end <= b for a, b in learnt)
            ids = self._rendering.encode(piece)
            self._ids += ids
            self._targets += [is_target] * len(ids)
            size += len(self._rendering.words(piece).encode()) if is_target else 0
        self._ends.append(len(self._ids))
        self._sizes.append(size)
        self.written = text

    def encoded(self) -> EncodedDialogue:
        """What it is by now."""
        ids, targets = np.asarray(self._ids, np.int32), np.asarray(self._targets, bool)
        of_turns = map(tuple, (self._begins, self._ends, self._sizes))
        return EncodedDialogue(ids, targets, *of_turns)


def _to_its_end(rendering: Rendering, answer: str, template: ChatTemplate) -> str:
    """The assistant's turn up to and with its end token."""
    pieces = rendering.split(answer)
    if len(pieces) == 1:
        raise UserError(
            f"chat template {template.name} writes no special token behind what the assistant "
            "says, so that a model would not learn to stop: use another template"
        )
    return "".join(pieces[:-1])
