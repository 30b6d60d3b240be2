"""A reward model with all that is needed to use it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instar.data.chat import NAMES, ChatTemplate
from instar.data.completions import CompletionEncoder, Prompt
from instar.data.encoders import with_bos
from instar.data.text_rows import pack_texts
from instar.data.tokenizer import Tokenizer
from instar.errors import UserError
from instar.interchange.card import ModelCard
from instar.models.language_model import Params
from instar.models.reward_model import RewardModel
from instar.models.spec import ModelSpec
from instar.sharding.inputs import fetch, place_rows
from instar.sharding.rules import batch_shards, replicated

LEAST_ROW = 64
# Tokens that are on the devices at once.
TOKENS = 4096


class TextScores:
    """Scores any number of encoded texts with any parameters of a reward model.

    Texts are packed into rows, so that little is computed in vain; the length of a row, a power of
    two, is that of the longest text of a call, and is the only thing that a program is compiled
    for.
    """

    def __init__(self, model: RewardModel, mesh: Mesh):
        self._model, self._mesh = model, mesh
        self._values = jax.jit(self._all_members)

    def _all_members(self, params: Params, rows: dict, ends: jax.Array) -> jax.Array:
        each = [
            self._model.packed_scores(self._model.member(params, index), rows | {"ends": ends})
            for index in range(self._model.members)
        ]
        return jnp.stack(each)

    def __call__(self, params: Params, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """The scores of each member, float64 [members, N], of N texts of at least one token.

        Raises:
          UserError: a text is longer than the model's positions.
        """
        if not len(texts):
            return np.zeros((self._model.members, 0))
        longest = max(map(len, texts))
        if longest > self._model.spec.max_positions:
            raise UserError(
                f"a text of {longest} tokens is longer than the reward model's "
                f"{self._model.spec.max_positions} positions: shorten it"
            )
        length = max(LEAST_ROW, 1 << (longest - 1).bit_length())
        shards = batch_shards(self._mesh)
        count = max(TOKENS // length // shards, 1) * shards
        rows = pack_texts(texts, length)
        whole = rows.padded(-(-len(rows) // count) * count)
        # Every position of a block of rows gets a value; the texts' ends are chosen of all blocks.
        everywhere = jax.device_put(
            jnp.arange(count * length, dtype=jnp.int32), replicated(self._mesh)
        )
        blocks = [
            self._values(
                params,
                place_rows(
                    self._mesh, {name: x[first : first + count] for name, x in whole.items()}
                ),
                everywhere,
            )
            for first in range(0, len(whole["tokens"]), count)
        ]
        values = np.concatenate(fetch(blocks), axis=1).astype(np.float64)
        return values[:, rows.ends]


@dataclass(frozen=True)
class LoadedRewardModel:
    """What `instar.load` returns of a reward model.

    Attributes:
      card: what the model is; `spec` and `tokenizer` are its.
      model: the pure functions of it.
      params: its parameters.
      mesh: the devices that hold them.
    """

    card: ModelCard
    model: RewardModel
    params: Params
    mesh: Mesh

    @property
    def spec(self) -> ModelSpec:
        return self.card.spec

    @property
    def tokenizer(self) -> Tokenizer:
        return self.card.tokenizer

    @functools.cached_property
    def encoder(self) -> CompletionEncoder:
        """What makes token ids of prompts and completions, as in the model's training."""
        return encoder_of(self.card)

    @functools.cached_property
    def _scores(self) -> TextScores:
        return TextScores(self.model, self.mesh)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """How good each completion of the prompt beside it is: float64 [N], the members' mean.

        Raises:
          UserError: see `member_scores`.
        """
        return self.member_scores(prompts, completions).mean(axis=0)

    def member_scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """What each member gives, float64 [members, N].

        Raises:
          UserError: a prompt or a completion is malformed, there are more of one than of the other,
            or both together are longer than the model's positions.
        """
        if len(prompts) != len(completions):
            raise UserError(
                f"{len(prompts)} prompts and {len(completions)} completions: give one for each"
            )
        pairs = zip(prompts, completions, strict=True)
        return self._scores(self.params, [self.encoder.whole(*pair) for pair in pairs])


def encoder_of(card: ModelCard) -> CompletionEncoder:
    """What encodes prompts and completions for the model of a card.

    Raises:
      UserError: it has no tokenizer or no chat template, or the two do not go together.
    """
    for name, found in (("tokenizer", card.tokenizer), ("chat template", card.chat_template)):
        if found is None:
            raise UserError(
                f"the model came without a {name}, and texts are encoded by it: add its files "
                "(tokenizer.json, chat_template.jinja) to the folder of the model"
            )
    return CompletionEncoder(card.tokenizer, ChatTemplate("of the model", card.chat_template))


def template_source(card: ModelCard, name: str | None, path: str) -> str:
    """The chat template of a language model from which a reward model is made.

    Args:
      name: that of a template for a model that has none of its own.
      path: what errors call the model.

    Raises:
      UserError: there is no template or one too many, or the model has no tokenizer.
    """
    if card.tokenizer is None:
        raise UserError(f"parent {path} has no tokenizer, with which preferences are encoded")
    if name is not None and name not in NAMES:
        raise UserError(f"chat_template: there is none named {name!r}; choose {', '.join(NAMES)}")
    named = None if name is None else with_bos(ChatTemplate.named(name), card.tokenizer).source
    own = card.chat_template
    if own is None and named is None:
        raise UserError(
            f"parent {path} has no chat template of its own: set chat_template to one of "
            f"{', '.join(NAMES)}"
        )
    if own is not None and named not in (None, own):
        raise UserError(f"parent {path} has a chat template of its own: leave chat_template out")
    return own or named
