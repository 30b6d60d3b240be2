"""The models that `instar compare` compares: opened, asked, and what they think of texts."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from instar.data.completion_files import padded
from instar.data.completions import CompletionEncoder
from instar.errors import UserError
from instar.evaluation.comparison import Completions
from instar.generation.requests import Completion
from instar.generation.sampling import SamplingConfig
from instar.interchange.card import ModelCard
from instar.interchange.loading import load, open_model, refuse_reward_model
from instar.interchange.model import Model
from instar.interchange.reward import encoder_of, template_source
from instar.models.language_model import LanguageModel, Params
from instar.models.spec import ModelSpec
from instar.objectives.language import token_log_probs
from instar.reinforcement.experience import response_hidden
from instar.stages.compare_config import CompareConfig


@dataclass(frozen=True)
class Contender:
    """A model by path, whose parameters are not read yet.

    Attributes:
      card: what it is, with the template that it is asked in and all the tokens at which it stops.
      digest: the fingerprint of its parameters, or of others' files.
    """

    path: str
    card: ModelCard
    encoder: CompletionEncoder
    digest: str

    def load(self) -> Model:
        """The model with its parameters."""
        return dataclasses.replace(load(self.path), card=self.card)


@dataclass(frozen=True)
class Answers:
    """What a model answered to N prompts.

    Attributes:
      prompts: their token ids, as this model reads them.
      completions: what it said.
      log_probs: float64 [tokens] for each, under the model itself.
    """

    prompts: list[list[int]]
    completions: list[Completion]
    log_probs: list[np.ndarray]

    @property
    def responses(self) -> list[list[int]]:
        """The tokens of each completion, with that which ended it."""
        return [completion.tokens for completion in self.completions]

    @property
    def ended(self) -> list[bool]:
        """Whether each completion ended by itself."""
        return [completion.reason == "stop" for completion in self.completions]

    def described(self) -> Completions:
        """What the statistics read."""
        lengths = [len(tokens) for tokens in self.responses]
        return Completions([each.text for each in self.completions], lengths, self.ended)


def open_contenders(config: CompareConfig) -> dict[str, Contender]:
    """The models by name, from the earliest to the latest.

    Raises:
      UserError: one is no language model, or reads other tokens than the baseline.
    """
    opened = {name: open_model(config.models[name], f"models.{name}") for name in config.names}
    for name, each in opened.items():
        refuse_reward_model(f"models.{name} {config.models[name]}", each.card, "writes none")
    path = config.models[config.baseline]
    baseline = opened[config.baseline].card
    source = template_source(baseline, config.chat_template, path)
    found = {}
    for name, each in opened.items():
        tokenizer = each.card.tokenizer
        if tokenizer is None or tokenizer.digest != baseline.tokenizer.digest:
            raise UserError(
                f"models.{name} {config.models[name]} reads other tokens than the baseline {path}: "
                "compare models of one tokenizer"
            )
        card = dataclasses.replace(each.card, chat_template=each.card.chat_template or source)
        encoder = encoder_of(card)
        lineage = each.lineage
        found[name] = Contender(
            config.models[name],
            card.stopping_at(encoder.stop_ids),
            encoder,
            lineage.get("params") or lineage.get("files", ""),
        )
    return found


class TokenLogProbs:
    """The log-probabilities of responses under any language model.

    A program is compiled once for each architecture: all batches have the same shape.

    Args:
      rows: responses of a batch.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._programs: dict[tuple[ModelSpec, int], jax.stages.Wrapped] = {}

    def __call__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        length: int,
        size: int,
    ) -> list[np.ndarray]:
        """Those of each response's tokens at temperature 1: float64 [tokens] each.

        Args:
          length: at least the tokens of any prompt. size: at least those of any response.
        """
        program = self._programs.setdefault(
            (model.spec, size), jax.jit(_log_probs(model.language_model, size))
        )
        found = []
        for first in range(0, len(prompts), self._rows):
            part = slice(first, first + self._rows)
            arrays = _batch(prompts[part], responses[part], self._rows, length, size)
            values = np.asarray(program(model.params, *arrays), np.float64)
            found += [
                row[: len(tokens)] for row, tokens in zip(values, responses[part], strict=False)
            ]
        return found


def _log_probs(model: LanguageModel, size: int) -> Callable[..., jax.Array]:
    def log_probs(
        params: Params,
        tokens: jax.Array,
        prompt_lengths: jax.Array,
        responses: jax.Array,
        lengths: jax.Array,
    ) -> jax.Array:
        hidden = response_hidden(model, params, tokens, prompt_lengths, lengths, size)
        return token_log_probs(model.head(params)(hidden), responses)

    return log_probs


def _batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rows: int,
    length: int,
    size: int,
) -> tuple[np.ndarray, ...]:
    """Tokens [rows, length + size], prompt lengths [rows], responses [rows, size] and lengths.

    Rows that fill the batch up have one token of a prompt and no response.
    """
    spare = rows - len(prompts)
    prompts, responses = [*prompts, *[[0]] * spare], [*responses, *[[]] * spare]
    both = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    tokens, _ = padded(both, length + size)
    _, prompt_lengths = padded(prompts, length)
    return tokens, prompt_lengths, *padded(responses, size)


def answer(
    contender: Contender,
    prompts: Sequence,
    config: CompareConfig,
    read: TokenLogProbs,
    length: int,
) -> Answers:
    """What a model answers, and how probable that is under itself.

    `length` is at least the number of tokens of any prompt.
    """
    model = contender.load()
    ids = [contender.encoder.prompt(prompt) for prompt in prompts]
    sampling = SamplingConfig(max_new_tokens=config.max_new_tokens)
    completions = model.generate(ids, sampling=sampling, seed=config.seed)
    responses = [completion.tokens for completion in completions]
    log_probs = read(model, ids, responses, length, config.max_new_tokens)
    return Answers(ids, completions, log_probs)
