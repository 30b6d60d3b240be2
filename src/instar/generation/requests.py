"""What is asked of the engine and what comes back, on the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from instar.errors import UserError
from instar.generation.sampling import SamplingConfig
from instar.models.spec import ModelSpec

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Request:
    """A prompt to be continued, and when to stop.

    What is drawn depends on the prompt, the settings and `seed` (0 <= seed < 2^32), and on nothing
    else. Generation ends with the first of `stop_ids`, with the token that completes one of
    `stop_strings`, or after `sampling.max_new_tokens`; with fewer where the model has no more
    positions.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def limit(self, spec: ModelSpec) -> int:
        """The most new tokens that there may be."""
        return min(self.sampling.max_new_tokens, spec.max_positions - len(self.prompt))

    def check(self, spec: ModelSpec, name: str = "prompt") -> None:
        """Raises UserError where the model cannot do it; `name` is what the sentence calls it."""
        self.sampling.check()
        if not len(self.prompt):
            raise UserError(f"{name} has no tokens: begin it with one, such as the tokenizer's BOS")
        if not 0 <= min(self.prompt) <= max(self.prompt) < spec.vocab_size:
            raise UserError(
                f"{name} has token ids {min(self.prompt)} to {max(self.prompt)}, and the model's "
                f"are 0 to {spec.vocab_size - 1}: encode it with the model's tokenizer"
            )
        if len(self.prompt) >= spec.max_positions:
            raise UserError(
                f"{name} has {len(self.prompt)} tokens, which leave no room for a new one in the "
                f"model's {spec.max_positions} positions: shorten it"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be at least 0 and below 2^32, not {self.seed}")
        if not all(self.stop_strings):
            raise UserError("stop_strings must not be empty strings")


@dataclass(frozen=True)
class Completion:
    """What a request came to.

    `tokens` are the new ones, up to and with the one that ended it. `log_probs` are theirs under
    the model itself, whatever they were drawn by: of temperature 1, no filter and no penalty, from
    float32 logits. `text` ends before the stop string, or without the stop id; it is None where the
    engine has no `decode`. `reason` is "length" where the most new tokens were reached.
    """

    tokens: list[int]
    log_probs: list[float]
    text: str | None
    reason: Literal["stop", "length"]


class Progress:
    """One request on its way: the tokens so far, and whether they end it."""

    def __init__(self, request: Request, limit: int, decode: Decode | None):
        self._request, self._limit = request, limit
        self._decode = decode
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self.completion: Completion | None = None

    def extend(self, tokens: Sequence[int], log_probs: Sequence[float]) -> list[int]:
        """Adds tokens, up to the one that ends the request; returns those that were added."""
        known = len(self._tokens)
        self._tokens += tokens
        self._log_probs += log_probs
        cut = self._first_stop(known)
        if cut is not None:
            count, text = cut
            self._finish(count, text, "stop")
        elif self._tokens and self._tokens[-1] in self._request.stop_ids:
            self._finish(len(self._tokens), self._text(self._tokens[:-1]), "stop")
        elif len(self._tokens) >= self._limit:
            self._finish(len(self._tokens), self._text(self._tokens), "length")
        return self._tokens[known:]

    def _first_stop(self, known: int) -> tuple[int, str] | None:
        """How many tokens complete a stop string, and the text before it.

        Tokens up to `known` are known not to. Texts are decoded from the start, since what a token
        adds depends on those before it.
        """
        if not self._request.stop_strings or self._cut(self._tokens) is None:
            return None
        for count in range(known + 1, len(self._tokens) + 1):
            text = self._cut(self._tokens[:count])
            if text is not None:
                return count, text
        return None

    def _cut(self, tokens: Sequence[int]) -> str | None:
        """The text of tokens before the first stop string in it; None if there is none."""
        text = self._decode(tokens)
        found = [text.find(stop) for stop in self._request.stop_strings]
        starts = [start for start in found if start >= 0]
        return text[: min(starts)] if starts else None

    def _text(self, tokens: Sequence[int]) -> str | None:
        return None if self._decode is None else self._decode(tokens)

    def _finish(self, count: int, text: str | None, reason: Literal["stop", "length"]) -> None:
        self._tokens, self._log_probs = self._tokens[:count], self._log_probs[:count]
        self.completion = Completion(self._tokens, self._log_probs, text, reason)
