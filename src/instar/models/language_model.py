"""The functional boundary: a model as pure functions over a tree of parameters."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from instar.errors import UserError
from instar.models.cache import KVCache, advance, slots_for
from instar.models.parameters import Initialization, logical_axes
from instar.models.prefix import NOWHERE, marks_of_texts, marks_of_tokens, places_and_blocks
from instar.models.spec import ModelSpec
from instar.models.transformer import Context, Execution, Transformer

Params = dict
Head = Callable[[jax.Array], jax.Array]

LEAST_NORM = 1e-12  # of a row of a head, so that rows of zeros stay zeros


class LanguageModel:
    """The functional boundary: a spec as pure functions over a tree of parameters.

    The NNX modules are split once, here. `params` is a nested dict of arrays (float32 masters);
    `axes` is the same tree with an `Axes` in place of each array.
    """

    def __init__(self, spec: ModelSpec, execution: Execution | None = None):
        spec.check()
        self.spec = spec
        self.execution = execution or Execution()
        abstract = nnx.eval_shape(lambda: self._build(jax.random.key(0), Initialization()))
        self._graphdef, state = nnx.split(abstract)
        self.axes = logical_axes(state)
        self.shapes: Params = nnx.to_pure_dict(state)

    def _build(self, key: jax.Array, initialization: Initialization) -> Transformer:
        return Transformer(self.spec, initialization, nnx.Rngs(params=key))

    def with_execution(self, execution: Execution) -> "LanguageModel":
        """The same model, run in another way."""
        return LanguageModel(self.spec, execution)

    def init(self, key: jax.Array, initialization: Initialization | None = None) -> Params:
        """Fresh float32 parameters."""
        return nnx.to_pure_dict(nnx.state(self._build(key, initialization or Initialization())))

    def apply(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        dropout: float = 0.0,
        embedding_dropout: float | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """The hidden states that the head reads.

        Args:
          tokens: int [B, S]; `positions` and `segment_ids` likewise, by default 0.. and all 1.
          cache: keys and values of earlier tokens; the new ones are added to it.
          dropout: rate on the embeddings and on both residual branches; needs `key`.
          embedding_dropout: that on the embeddings, where it is another.

        Returns:
          hidden [B, S, embed] in the compute dtype, and `aux`: "cache" where one was given, and
          "routing" where there are layers of experts: their `experts.Statistics`, each with the
          leading axis of its stack, in a dict like that of the layers' parameters.

        Raises:
          UserError: the rows are longer than the learned positions, which would repeat the last.
        """
        if positions is None:
            limit = self.spec.max_positions
            if self.spec.learned_positions and tokens.shape[1] > limit:
                raise UserError(
                    f"{tokens.shape[1]} tokens exceed the {limit} learned positions of the model"
                )
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        places = slots = None
        if self.spec.prefix is not None:
            marks = marks_of_tokens(tokens, positions, self.spec.prefix)
            if cache is None:
                marks = marks_of_texts(marks, segment_ids)
            else:
                marks = jnp.where((segment_ids > 0)[..., None], marks, NOWHERE)
                cache = dataclasses.replace(cache, marks=jnp.minimum(cache.marks, marks.min(1)))
                marks = cache.marks[:, None]
            places, positions = places_and_blocks(positions, marks)
        if cache is not None:
            slots = slots_for(cache, segment_ids)
            cache = advance(cache, slots, positions, segment_ids)
        of_embeddings = dropout if embedding_dropout is None else embedding_dropout
        context = Context(
            positions, segment_ids, self.execution, cache, slots, dropout, of_embeddings, places
        )
        key = key if dropout or of_embeddings else None
        hidden, cache, routing = nnx.merge(self._graphdef, params)(tokens, context, key)
        aux = {"cache": cache} if cache is not None else {}
        return hidden, aux | ({"routing": routing} if routing else {})

    def head(self, params: Params) -> Head:
        """The callable hidden [..., embed] -> logits [..., vocab] in at least float32."""
        spec, kernel = self.spec, self.head_table(params).T
        bias = params["head"]["bias"] if spec.head_bias else None

        def logits(hidden: jax.Array) -> jax.Array:
            accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
            padded = jnp.matmul(hidden, kernel, preferred_element_type=accumulate)
            found = padded[..., : spec.vocab_size]
            found = found if bias is None else found + bias.astype(accumulate)
            cap = spec.logit_softcap
            return found if cap is None else cap * jnp.tanh(found / cap)

        return logits

    def head_table(self, params: Params) -> jax.Array:
        """The matrix [vocab, embed] of the head as it is used, see `Execution.vocabulary`."""
        table = params["embedding"] if self.spec.tied else params["head"]["kernel"].T
        if self.spec.head_normed:
            norms = jnp.linalg.norm(table, axis=-1, keepdims=True)
            table = table / jnp.maximum(norms, LEAST_NORM)
        return self.execution.vocabulary(table)

    def value_head(self, params: Params) -> Head:
        """The callable hidden [..., embed] -> one number each [...], of a spec with that output."""
        kernel, bias = params["score_head"]["kernel"][:, 0], params["score_head"]["bias"][0]

        def values(hidden: jax.Array) -> jax.Array:
            wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
            return wide @ kernel + bias

        return values

    def logits(self, params: Params, tokens: jax.Array, **inputs: object) -> jax.Array:
        """Full logits [B, S, vocab]: for tests and short texts; training never forms them."""
        hidden, _ = self.apply(params, tokens, **inputs)
        logits = self.head(params)(hidden)
        # A vocabulary that the mesh does not split evenly cannot leave a program in parts.
        return self.execution.constrain(logits, ("batch", "sequence", "vocab"))
