"""`instar chat`: a conversation in the terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

from instar.data.chat import ChatTemplate, Message
from instar.data.stream_decoder import StreamDecoder
from instar.errors import UserError
from instar.generation.sampling import SamplingConfig
from instar.interchange.loading import load_language_model
from instar.interchange.model import Model
from instar.serving.generate import SETTINGS

HELP = "/reset begins anew, /system TEXT sets the system prompt, /exit or Ctrl-D ends"


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingConfig):
    """Talks with a model: what it says appears word by word.

    `model` is a run's folder, a checkpoint, a Hugging Face folder or a GGUF file; `template` names
    a chat template where the model's own is not wanted. Where a conversation outgrows the model's
    positions, of which a quarter at most is kept for the answer, its oldest turns are forgotten,
    the system prompt never.
    """

    model: str
    system: str | None = None
    template: str | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9


def chat(options: ChatOptions) -> None:
    """Reads what is said from standard input until it ends.

    Raises:
      UserError: the model cannot be loaded, or has no template and none is named.
    """
    model = load_language_model(options.model, dtype=options.dtype)
    conversation = Conversation(
        model,
        model.chat_template(options.template),
        SamplingConfig(**{name: getattr(options, name) for name in SETTINGS}),
        seed=options.seed,
        system=options.system,
    )
    print(f"{HELP}.", file=sys.stderr)
    talk(conversation, sys.stdin, sys.stdout)


def talk(conversation: "Conversation", said: TextIO, out: TextIO) -> None:
    """The conversation, line by line, until `said` ends or says /exit."""

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    while True:
        write("> ")
        line = said.readline()
        words = line.strip()
        if not line or words == "/exit":
            write("\n" if not line else "")
            return
        if words.startswith("/"):
            write(f"{command(conversation, words)}\n")
        elif words:
            answer(conversation, words, write)


def command(conversation: "Conversation", words: str) -> str:
    """Does what a line that begins with / says; returns what to answer."""
    name, _, rest = words.partition(" ")
    if name == "/system":
        conversation.system = rest.strip() or None
    if name in ("/reset", "/system"):
        conversation.reset()
        prompt = "no system prompt" if conversation.system is None else "a system prompt"
        return f"(a new conversation, with {prompt})"
    return f"({HELP})"


def answer(conversation: "Conversation", words: str, write: Callable[[str], None]) -> None:
    """Writes the answer as it comes; Ctrl-C ends it early."""
    try:
        for text in conversation.say(words):
            write(text)
    except UserError as error:
        write(f"({error})")
    except KeyboardInterrupt:
        write(" ...")
    write("\n")
    if conversation.forgotten:
        write(f"({conversation.forgotten} messages from the beginning no longer fit.)\n")


class Conversation:
    """A dialogue under way.

    Attributes:
      system: the system prompt, None for none.
      messages: what was said besides.
      forgotten: how many of the oldest messages were left out of the last prompt.
    """

    def __init__(
        self,
        model: Model,
        template: ChatTemplate,
        sampling: SamplingConfig,
        *,
        seed: int = 0,
        system: str | None = None,
    ):
        self._model, self._template, self._sampling = model, template, sampling
        self._seed, self.system = seed, system
        self.reset()

    def reset(self) -> None:
        """Forgets what was said, the system prompt aside."""
        self.messages: list[Message] = []
        self.forgotten = 0

    def say(self, words: str) -> Iterator[str]:
        """Yields the answer to `words` in pieces.

        Raises:
          UserError: `words` alone are too long for the model; nothing is added to the dialogue.
        """
        model = self._model
        messages = [*self.messages, {"role": "user", "content": words}]
        request = model.request(
            self._fitting(messages), self._sampling, self._seed, (), self._template
        )
        self._seed += 1
        text = TextStream(StreamDecoder(model.tokenizer), request.stop_strings)
        said = ""
        try:
            for update in model.stream(request):
                piece = text.push(update.tokens)
                if update.completion is not None:
                    piece = update.completion.text[len(said) :]
                said += piece
                if piece:
                    yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": said}]

    def _fitting(self, messages: Sequence[Message]) -> list[Message]:
        """The messages without the oldest turns, as few of them as the positions ask for."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        positions = self._model.spec.max_positions
        room = positions - min(self._sampling.max_new_tokens, positions // 4)
        for first in range(0, len(messages), 2):
            kept = [*system, *messages[first:]]
            if len(self._model.encode_chat(kept, self._template)) <= room:
                self.forgotten = first
                return kept
        raise UserError(
            f"this message is too long: the model has {positions} positions, of which {room} are "
            "for what was said before its answer"
        )


class TextStream:
    """Text from tokens as they come, without what may turn out to begin a stop string."""

    def __init__(self, decoder: StreamDecoder, stop_strings: Sequence[str]):
        self._decoder, self._stops, self._held = decoder, stop_strings, ""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain now."""
        text = self._held + "".join(map(self._decoder.push, tokens))
        certain = len(text) - self._doubtful(text)
        self._held = text[certain:]
        return text[:certain]

    def _doubtful(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stops), default=0)
        return next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-size:]) for stop in self._stops)
            ),
            0,
        )
