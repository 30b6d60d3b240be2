"""Packing, padding and the cache are ways of computing the same thing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import CAUSAL, LATENT, SPECS, packed_batch, random_params, telling

from instar.errors import UserError
from instar.models.cache import init_cache
from instar.models.language_model import LanguageModel
from instar.models.transformer import Execution
from instar.objectives.language import next_token_sums

LENGTH = 13
PACKED = [[5, 3, 4], [7, 6], [], [], []]
DOUBLE = Execution(dtype=jnp.dtype(np.float64))


def unpack(batch: dict) -> dict:
    """Each document of a packed batch in a row of its own, right-padded."""
    alone = {name: np.zeros((len(PACKED), LENGTH), x.dtype) for name, x in batch.items()}
    for row, (source, start, size) in enumerate(spans()):
        for name, values in batch.items():
            alone[name][row, :size] = values[source, start : start + size]
        alone["segment_ids"][row, :size] = 1
    return alone


def spans():
    """(row, start, size) of each document in PACKED."""
    for row, documents in enumerate(PACKED):
        for i, size in enumerate(documents):
            yield row, sum(documents[:i]), size


def inputs(batch: dict) -> dict:
    return {name: batch[name] for name in ("positions", "segment_ids")}


@pytest.mark.parametrize("name", telling(SPECS, ("gpt", "mixed", "prefix")))
def test_packed_documents_equal_the_documents_alone(name):
    with jax.enable_x64(True):
        model = LanguageModel(SPECS[name], DOUBLE)
        params = random_params(model, 1, np.float64)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def run(params, batch):
            hidden, _ = model.apply(params, batch["tokens"], **inputs(batch))
            sums = next_token_sums(hidden, model.head(params), batch["targets"], batch["weights"])
            return sums["nats"], (hidden, sums)

        packed = packed_batch(2, PACKED, LENGTH, model.spec.vocab_size)
        (_, (together, sums)), gradient = run(params, packed)
        (_, (alone, sums_alone)), gradient_alone = run(params, unpack(packed))

        close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
        for row, (source, start, size) in enumerate(spans()):
            close(together[source, start : start + size], alone[row, :size])
        jax.tree.map(close, sums, sums_alone)
        jax.tree.map(close, gradient, gradient_alone)
        assert all(np.any(g) for g in jax.tree.leaves(gradient))

        # Nor does it matter that a row is longer than its document.
        tokens = unpack(packed)["tokens"][:1, : PACKED[0][0]]
        bare, _ = jax.jit(model.apply)(params, tokens)
        close(bare[0], alone[0, : PACKED[0][0]])


@pytest.mark.parametrize("name", telling(CAUSAL, ("gpt", "latent")))
def test_reading_in_pieces_with_a_cache_equals_the_full_forward(name):
    """Each row advances by its own number of tokens, with padding wherever it has none."""
    with jax.enable_x64(True):
        model = LanguageModel(SPECS[name], DOUBLE)
        params = random_params(model, 3, np.float64)
        documents = [[9], [4, 6], [2], [12]]
        batch = packed_batch(4, documents, LENGTH, model.spec.vocab_size)
        expected, _ = jax.jit(model.apply)(params, batch["tokens"], **inputs(batch))

        read = jax.jit(model.apply)
        cache = init_cache(model.spec, len(documents), LENGTH, DOUBLE.dtype)
        rng, done = np.random.default_rng(5), np.zeros(len(documents), int)
        totals = np.array([sum(row) for row in documents])
        found = np.zeros(expected.shape)
        for width in (6, *[3] * 9):
            piece = {name: np.zeros((len(documents), width), np.int32) for name in batch}
            taken = []
            for row, total in enumerate(totals):
                count = rng.integers(0, min(width, total - done[row]) + 1)
                to = np.sort(rng.permutation(width)[:count])
                taken.append((row, to, done[row] + np.arange(count)))
                done[row] += count
                for key in piece:
                    piece[key][row, to] = batch[key][taken[-1][0], taken[-1][2]]
            hidden, aux = read(params, piece["tokens"], cache=cache, **inputs(piece))
            cache = aux["cache"]
            for row, to, source in taken:
                found[row, source] = hidden[row, to]
            np.testing.assert_array_equal(cache.length, done)
        assert (done == totals).all(), "the pieces above must cover every row"
        real = batch["segment_ids"] > 0
        np.testing.assert_allclose(found[real], np.asarray(expected)[real], rtol=0, atol=1e-10)


def test_a_cache_keeps_its_own_dtype():
    model = LanguageModel(SPECS["llama"])
    cache = init_cache(model.spec, 2, 5, jnp.dtype(jnp.bfloat16))
    tokens = np.ones((2, 3), np.int32)
    hidden, aux = jax.jit(model.apply)(random_params(model, 1), tokens, cache=cache)
    assert hidden.dtype == jnp.float32
    kept = jax.tree.leaves(aux["cache"].layers)
    assert {x.dtype for x in kept} == {jnp.dtype(jnp.bfloat16)}
    assert [x.shape for x in kept] == [x.shape for x in jax.tree.leaves(cache.layers)]


def test_of_latents_a_cache_keeps_one_for_all_heads_and_nothing_is_made_of_them():
    """Neither keys nor values of the tokens in it, which would have a size of their own."""
    model, capacity = LanguageModel(LATENT), 11
    mixer = LATENT.each_layer()[0].mixer
    cache = init_cache(LATENT, 2, capacity, jnp.dtype(jnp.float32), parts=3)
    kept = [layer for group in cache.layers for layer in group]
    size = mixer.rank + mixer.rotary_dim
    assert [[x.shape for x in layer] for layer in kept] == [
        [(repeat, 2, 1, capacity, size)] for repeat, _ in LATENT.layers
    ]
    read = functools.partial(model.apply, cache=cache)
    text = str(jax.make_jaxpr(read)(model.shapes, np.ones((2, 1), np.int32)))
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\[(\d[\d,]*)\]", text)}
    cached = [shape for shape in shapes if capacity in shape]
    assert (2, capacity, 1, size) in cached
    made = {mixer.head_dim, mixer.value_dim, mixer.query_dim}
    assert not any(made & set(shape) for shape in cached), cached


def test_more_tokens_than_learned_positions_are_refused():
    """A look-up past the end of a table gives its last row, silently."""
    gpt, llama = LanguageModel(SPECS["gpt"]), LanguageModel(SPECS["llama"].replace(max_positions=9))
    too_long = np.zeros((1, gpt.spec.max_positions + 1), np.int32)
    with pytest.raises(UserError, match="30 tokens exceed the 29 learned positions"):
        jax.eval_shape(gpt.apply, gpt.shapes, too_long)
    with pytest.raises(UserError, match="exceed the 29 learned positions"):
        init_cache(gpt.spec, 1, 30, jnp.dtype(jnp.float32))
    jax.eval_shape(gpt.apply, gpt.shapes, too_long[:, 1:])
    jax.eval_shape(llama.apply, llama.shapes, too_long)
