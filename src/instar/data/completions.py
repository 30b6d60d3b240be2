"""Prompts and their completions as token ids, the same wherever a model or a judge reads them.

What a completion is encoded to does not depend on where it comes from: a sample of a policy, a
comparison and a rated text of the same words have the same ids behind the same prompt.
"""

import hashlib
from collections.abc import Sequence

from instar.data.chat import ChatTemplate, Message, stop_ids
from instar.data.chat_template import checked_messages
from instar.data.dialogues import encode_dialogue
from instar.data.tokenizer_formats import Tokenizer
from instar.errors import UserError

# A text is what the user says; a list is a dialogue up to where the assistant begins to speak.
Prompt = str | Sequence[Message]


def prompt_messages(prompt: Prompt) -> list[Message]:
    """The messages of a prompt, of which the assistant has not said the last.

    Raises:
      UserError: it is neither a text nor a dialogue, or the assistant has spoken last.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        messages = checked_messages(prompt)
    except UserError as error:
        raise UserError(f"prompt: {error}") from None
    if messages[-1]["role"] == "assistant":
        raise UserError("prompt must end with the user's message, not with the assistant's")
    return messages


class CompletionEncoder:
    """Encodes prompts, and prompts with a completion, by a chat template.

    Attributes:
      tokenizer, template: what it encodes with.
      begin: ids before every prompt, such as a BOS that the template does not write.
      stop_ids: the tokens, in order, any of which ends a completion.
      digest: the SHA-256 of all that the ids depend on besides the texts, in hexadecimal.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, begin: Sequence[int] = ()):
        """Sees that the tokenizer and the template go together.

        Raises:
          UserError: the template needs a token that the tokenizer lacks, refuses a question and
            its answer, or ends the answer with no special token.
        """
        self.tokenizer, self.template, self.begin = tokenizer, template, tuple(map(int, begin))
        self.stop_ids = tuple(stop_ids(tokenizer, template))
        parts = [tokenizer.digest, template.source, *map(str, self.begin)]
        self.digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        self.whole("question", "answer")

    def prompt(self, prompt: Prompt) -> list[int]:
        """The ids up to where the assistant begins to speak.

        Raises:
          UserError: the prompt is malformed, the template refuses it, or there are no ids.
        """
        ids = self._encode(prompt, "")[0]
        if not ids:
            raise UserError("prompt is empty, and the chat template writes nothing before it")
        return ids

    def whole(self, prompt: Prompt, completion: str) -> list[int]:
        """The ids of `prompt`, then those of what the assistant says, its end token the last.

        What the template writes around the completion is among them; the completion may be empty.

        Raises:
          UserError: the prompt or the completion is malformed, or the template refuses them.
        """
        before, said = self._encode(prompt, completion)
        return before + said

    def _encode(self, prompt: Prompt, completion: str) -> tuple[list[int], list[int]]:
        """The ids before the completion and those of it."""
        if not isinstance(completion, str):
            raise UserError(f"completion must be a text, not {type(completion).__name__}")
        messages = [*prompt_messages(prompt), {"role": "assistant", "content": completion}]
        dialogue = encode_dialogue(self.tokenizer, self.template, messages, self.begin)[-1]
        ids, first = dialogue.ids.tolist(), dialogue.begins[-1]
        return ids[:first], ids[first:]
