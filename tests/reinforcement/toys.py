"""A small stand-in for the models, written in JAX for the update and in NumPy for its tests."""

import types

import jax.numpy as jnp
import numpy as np

EMBED = 3


class Toy:
    """A token's hidden state is tanh of the sum of the embeddings of its segment so far."""

    execution = types.SimpleNamespace(constrain=lambda x, axes: x)

    def apply(self, params, tokens, *, segment_ids, positions=None):
        same = jnp.tril(segment_ids[:, :, None] == segment_ids[:, None, :])
        return jnp.tanh(same.astype(params["embedding"].dtype) @ params["embedding"][tokens]), {}

    def head(self, params):
        return lambda hidden: hidden @ params["head"]

    def value_head(self, params):
        return lambda hidden: hidden @ params["head"][:, 0]


def draw_params(rng: np.random.Generator, vocab: int, outputs: int) -> dict:
    return {
        "embedding": rng.normal(size=(vocab, EMBED)),
        "head": rng.normal(size=(EMBED, outputs)),
    }


def outputs_after(params: dict, tokens: list[int]) -> np.ndarray:
    """What the head says of these tokens."""
    return np.tanh(sum(params["embedding"][token] for token in tokens)) @ params["head"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
