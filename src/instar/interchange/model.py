"""A model with all that is needed to use it."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instar.data.chat import NAMES, ChatTemplate, Message, encode_chat, stop_ids
from instar.data.tokenizer import Tokenizer
from instar.errors import UserError
from instar.generation.engine import Engine, Update
from instar.generation.requests import Completion, Request
from instar.generation.sampling import SamplingConfig
from instar.generation.weights import for_decoding
from instar.interchange.card import ModelCard
from instar.models.language_model import LanguageModel, Params
from instar.models.spec import ModelSpec

Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True)
class Model:
    """What `instar.load` returns.

    Attributes:
      card: what the model is; `spec` and `tokenizer` are its.
      language_model: the pure functions of it.
      params: its parameters.
      mesh: the devices that hold them.
    """

    card: ModelCard
    language_model: LanguageModel
    params: Params
    mesh: Mesh

    @property
    def spec(self) -> ModelSpec:
        return self.card.spec

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.card.tokenizer

    def __call__(self, tokens: jax.typing.ArrayLike) -> jax.Array:
        """Logits float32 [batch, sequence, vocab] of int tokens [batch, sequence]."""
        return self._logits(self.params, jnp.asarray(tokens, jnp.int32))

    @functools.cached_property
    def _logits(self) -> jax.stages.Wrapped:
        def logits(params: Params, tokens: jax.Array) -> jax.Array:
            return self.language_model.logits(params, tokens).astype(jnp.float32)

        return jax.jit(logits)

    @functools.cached_property
    def _decoding(self) -> tuple[Engine, Params]:
        """What generates, with the parameters laid out for it; made at their first use and kept."""
        model, params = for_decoding(self.language_model, self.params)
        decode = None if self.tokenizer is None else self.tokenizer.decode
        return Engine(model, decode, mesh=self.mesh), params

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        template: ChatTemplate | None = None,
    ) -> list[Completion]:
        """Continues each prompt: a text, token ids, or a dialogue (messages).

        Args:
          seed: that of the first prompt; the next has the next.
          stop_strings: end a completion, besides the model's own end tokens.
          template: for dialogues; the model's own where None.

        Raises:
          UserError: a prompt cannot be encoded, or is too long for the model.
        """
        requests = [
            self.request(prompt, sampling, seed + index, stop_strings, template)
            for index, prompt in enumerate(prompts)
        ]
        engine, params = self._decoding
        return engine.generate(params, requests)

    def stream(self, request: Request) -> Iterator[Update]:
        """The new tokens of a `request`, as they come."""
        engine, params = self._decoding
        return engine.stream(params, [request])

    def request(
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        template: ChatTemplate | None = None,
    ) -> Request:
        """One prompt as the engine takes it, with the ids and strings that end its completion."""
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and not is_number(prompt[0])
        ends = set(self.card.stop_ids)
        if self.tokenizer is not None:
            ends.add(self.tokenizer.eos_id)
        if is_chat:
            template = template or self.chat_template()
            ends |= set(stop_ids(self._need_tokenizer(), template))
            stop_strings = (*stop_strings, *template.stop_strings)
            ids = self.encode_chat(prompt, template)
        else:
            ids = self.encode(prompt) if isinstance(prompt, str) else list(map(int, prompt))
        sampling = sampling or SamplingConfig()
        return Request(ids, sampling, seed, tuple(sorted(ends)), tuple(stop_strings))

    def encode(self, text: str) -> list[int]:
        """The ids of a text that begins a document, with the BOS where the model is used to it.

        Where a model's texts begin with a prefix, `text` is that: the mask of what follows (the
        first kind that the model knows) and the start token end it.
        """
        tokenizer, prefix = self._need_tokenizer(), self.spec.prefix
        ends = [] if prefix is None else [prefix.mask_ids[0], prefix.start_id]
        ids = [*tokenizer.encode(text), *ends]
        return [tokenizer.bos_id, *ids] if self.card.begins_with_bos or not ids else ids

    def encode_chat(self, messages: Sequence[Message], template: ChatTemplate) -> list[int]:
        """The ids of a dialogue and of what comes before the assistant's next words."""
        tokenizer = self._need_tokenizer()
        ids = encode_chat(tokenizer, template, messages, add_generation_prompt=True)
        # A template that came with a model writes the BOS itself, where the model wants one.
        begin = self.card.begins_with_bos and template.name in NAMES and template.bos
        return [tokenizer.bos_id, *ids] if begin else ids

    def chat_template(self, name: str | None = None) -> ChatTemplate:
        """The template of a name; the model's own where None.

        Raises:
          UserError: the model has none of its own, or there is none of that name.
        """
        if name is not None:
            return ChatTemplate.named(name)
        if self.card.chat_template is None:
            raise UserError(
                "the model has no chat template of its own: name one "
                f"(--template=NAME), of {', '.join(NAMES)}"
            )
        return ChatTemplate("of the model", self.card.chat_template)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("the model came without a tokenizer: give token ids")
        return self.tokenizer


def is_number(value: object) -> bool:
    """Whether a prompt's first entry is a token id and not a message."""
    return hasattr(value, "__index__")
