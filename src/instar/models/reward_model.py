"""A reward model: one or several networks that give a number to a whole text."""

import jax
import jax.numpy as jnp
import numpy as np

from instar.models.language_model import LanguageModel, Params
from instar.models.parameters import Initialization
from instar.models.spec import ModelSpec
from instar.models.transformer import Execution

LANGUAGE_HEAD, SCORE_HEAD = "head", "score_head"


class RewardModel:
    """`members` networks of one spec, each with its own parameters and scalar head.

    The score of a text is read at its last token, the end token, which alone has seen all of it.
    Members that were trained on different draws disagree where the data does not tell what people
    prefer (Coste et al. 2023, section 4). `params` is {"member_0": {...}, ...}; `axes` and `shapes`
    are trees of that form, and `names` its keys.
    """

    def __init__(self, spec: ModelSpec, members: int = 1, execution: Execution | None = None):
        self.spec = spec.replace(output="scalar")
        self.members = members
        self.model = LanguageModel(self.spec, execution)
        self.execution = self.model.execution
        self.names = [f"member_{index}" for index in range(members)]
        self.axes = dict.fromkeys(self.names, self.model.axes)
        self.shapes = dict.fromkeys(self.names, self.model.shapes)

    def init(self, key: jax.Array, initialization: Initialization | None = None) -> Params:
        """Fresh float32 parameters."""
        keys = jax.random.split(key, self.members)
        return {
            name: self.model.init(key, initialization)
            for name, key in zip(self.names, keys, strict=True)
        }

    def from_language(self, params: Params, key: jax.Array) -> Params:
        """Members with the body of a language model's parameters, each with a fresh head."""
        body = {name: value for name, value in params.items() if name != LANGUAGE_HEAD}
        fresh = self.init(key)
        return {name: body | {SCORE_HEAD: fresh[name][SCORE_HEAD]} for name in self.names}

    def member(self, params: Params, index: int) -> Params:
        """The parameters of one member, those of `self.model`."""
        return params[self.names[index]]

    def scores(
        self,
        params: Params,
        tokens: jax.Array,
        lengths: jax.Array,
        *,
        dropout: float = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """What each member gives to each text.

        Args:
          tokens: int [B, T], right-padded. lengths: int [B], at least 1.
          dropout: rate, of each member by a draw of its own; needs `key`.

        Returns:
          float32 [members, B].
        """
        keys = [None] * self.members if key is None else jax.random.split(key, self.members)
        each = [
            self._score(params[name], tokens, lengths, dropout, key)
            for name, key in zip(self.names, keys, strict=True)
        ]
        return jnp.stack(each)

    def rescaled(self, params: Params, gain: np.ndarray, offset: np.ndarray) -> Params:
        """Parameters whose scores are gain * score + offset, by float [members] of each."""

        def rescale(params: Params, gain: float, offset: float) -> Params:
            head = params[SCORE_HEAD]
            return params | {
                SCORE_HEAD: {
                    "kernel": head["kernel"] * gain,
                    "bias": head["bias"] * gain + offset,
                }
            }

        each = zip(self.names, map(float, gain), map(float, offset), strict=True)
        return {name: rescale(params[name], *values) for name, *values in each}

    def packed_scores(
        self,
        params: Params,
        batch: dict[str, jax.Array],
        *,
        dropout: float = 0.0,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """What one member gives to texts that share rows.

        Args:
          params: of that member, see `member`.
          batch: int `tokens`, `positions` and `segment_ids` [R, L], and `ends` [...], the places
            row * L + column of the texts' last tokens.

        Returns:
          float32, of the shape of `ends`.
        """
        hidden, _ = self.model.apply(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            dropout=dropout,
            key=key,
        )
        # One number a position is little to bring together where the rows are on several devices.
        return self.model.value_head(params)(hidden).reshape(-1)[batch["ends"]]

    def _score(
        self,
        params: Params,
        tokens: jax.Array,
        lengths: jax.Array,
        dropout: float,
        key: jax.Array | None,
    ) -> jax.Array:
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        hidden, _ = self.model.apply(
            params, tokens, segment_ids=real.astype(jnp.int32), dropout=dropout, key=key
        )
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.model.value_head(params)(last)
