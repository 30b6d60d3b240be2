"""`instar chat`, in a terminal and by its parts."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

import instar
from instar.data.stream_decoder import StreamDecoder
from instar.errors import UserError
from instar.generation.sampling import SamplingConfig
from instar.serving.chat import Conversation, TextStream, talk

pytestmark = pytest.mark.smoke

GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)


class Terminal:
    """A command in a pseudo-terminal, as somebody sits before it."""

    def __init__(self, *words: object):
        self._end, inner = pty.openpty()
        command = [sys.executable, "-m", "instar", *map(str, words)]
        self._process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
        )
        os.close(inner)
        self._seen = b""

    def until(self, pattern: str, seconds: float = 120) -> str:
        """Waits for a text; returns what was shown up to its end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(pattern, self._seen.decode("utf-8", "ignore"))
            if found:
                shown = found.string[: found.end()]
                self._seen = self._seen[len(shown.encode()) :]
                return shown
            if select.select([self._end], [], [], 0.1)[0]:
                try:
                    self._seen += os.read(self._end, 4096)
                except OSError:  # its other side is closed
                    break
        raise AssertionError(f"{pattern!r} did not come; shown was {self._seen!r}")

    def say(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupt(self) -> None:
        os.killpg(self._process.pid, signal.SIGINT)

    def close(self) -> int:
        try:
            return self._process.wait(60)
        finally:
            self._process.kill()
            os.close(self._end)


def test_a_conversation_in_a_terminal(model_folder):
    terminal = Terminal("chat", "--model", model_folder, "--max_new_tokens=5", "--temperature=0")
    terminal.until(r"/exit or Ctrl-D ends\.\r\n> ")
    terminal.say("hello\n")
    first = terminal.until(r"hello\r\n[^>]*\r\n> ")
    terminal.say("你好 😀\n")
    terminal.until(r"你好 😀\r\n[^>]*\r\n> ")
    terminal.say("/reset\n")
    terminal.until(r"\(a new conversation, with no system prompt\)\r\n> ")
    terminal.say("hello\n")
    assert terminal.until(r"hello\r\n[^>]*\r\n> ") == first  # nothing was remembered
    terminal.say("\x04")
    assert terminal.close() == 0


def test_the_real_model_answers_in_a_terminal(smollm2):
    terminal = Terminal("chat", "--model", smollm2, "--max_new_tokens=40", "--temperature=0")
    terminal.until("> ")
    terminal.say("What is the capital of France?\n")
    assert "Paris" in terminal.until(r"France\?\r\n.*\r\n> ")
    terminal.say("And of which country is it the capital?\n")
    assert "France" in terminal.until(r"capital\?\r\n.*\r\n> ")
    terminal.say("/exit\n")
    assert terminal.close() == 0


@pytest.fixture(scope="module")
def model(model_folder):
    return instar.load(model_folder)


@pytest.fixture
def conversation(model):
    return Conversation(model, model.chat_template(), GREEDY, system="be kind")


def test_an_answer_is_that_of_the_whole_dialogue(conversation, model):
    """What is streamed is what the engine gives at once, with all that was said before it."""
    dialogue = [{"role": "system", "content": "be kind"}]
    for words in ("hello", "the sea, 你好"):
        dialogue.append({"role": "user", "content": words})
        (expected,) = model.generate([dialogue], sampling=GREEDY)
        assert "".join(conversation.say(words)) == expected.text
        dialogue.append({"role": "assistant", "content": expected.text})
    assert conversation.messages == dialogue[1:]


def test_the_oldest_turns_are_forgotten_and_said_to_be(model):
    conversation = Conversation(model, model.chat_template(), GREEDY)
    said = io.StringIO("a fisherman\n" * 12)
    out = io.StringIO()
    talk(conversation, said, out)
    notices = re.findall(r"\((\d+) messages from the beginning no longer fit\.\)", out.getvalue())
    assert notices and notices == sorted(notices, key=int)
    assert len(conversation.messages) == 24, "they are kept, should the next prompt be shorter"


def test_a_message_that_is_too_long_is_refused_and_the_talk_goes_on(conversation):
    with pytest.raises(UserError, match="this message is too long"):
        list(conversation.say("the sea " * 60))
    assert conversation.messages == []
    out = io.StringIO()
    talk(conversation, io.StringIO("the sea " * 60 + "\nhello\n/nonsense\n"), out)
    assert "(this message is too long" in out.getvalue()
    assert len(conversation.messages) == 2
    assert "(/reset begins anew" in out.getvalue()


def test_commands(conversation):
    list(conversation.say("hello"))
    out = io.StringIO()
    talk(conversation, io.StringIO("/system speak Latin\n/exit\nhello\n"), out)
    assert (conversation.system, conversation.messages) == ("speak Latin", [])
    talk(conversation, io.StringIO("/system\n"), out)
    assert conversation.system is None


def test_a_stop_string_is_never_shown(model):
    """Text that may begin one is held back until it is known not to."""
    stream = TextStream(StreamDecoder(model.tokenizer), ("fisher\nman",))
    text = "a fish, a fisherman and fisher\nman"
    shown = [stream.push([token]) for token in model.tokenizer.encode(text)]
    assert "".join(shown) == "a fish, a fisherman and "
    assert len([piece for piece in shown if piece]) > 3
