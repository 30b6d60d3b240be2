"""Layers with a window keep so many tokens as they see, and compute what all of them would give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import packed_batch, random_params, telling

from instar.families.registry import FAMILIES
from instar.models.cache import init_cache
from instar.models.language_model import LanguageModel
from instar.models.spec import ModelSpec
from instar.models.transformer import Execution

SMALL = {"depth": 8, "width": 12, "heads": 2, "head_dim": 4, "mlp_width": 8, "vocab_size": 13}
WINDOW, ALL = 5, 40
# The slots of each layer: Mistral's all see a window, Gemma 2's and 3's all but every second and
# sixth, and of GPT-3 with bands every second does.
SLOTS = {
    "mistral": [WINDOW] * 8,
    "gemma2": [WINDOW, ALL] * 4,
    "gemma3": [WINDOW] * 5 + [ALL] + [WINDOW] * 2,
    "gpt3": [ALL, WINDOW] * 4,
}


def spec_of(name: str) -> ModelSpec:
    return FAMILIES[name].build(**SMALL, window=WINDOW, max_positions=64)


@pytest.mark.parametrize("name", SLOTS)
def test_what_a_cache_holds(name):
    """Slots by layer, in the order in which layers run; and so its bytes."""
    spec = spec_of(name)
    cache = jax.eval_shape(lambda: init_cache(spec, 3, ALL, jnp.dtype(jnp.bfloat16)))
    found = []
    for (repeat, _), layers in zip(spec.layers, cache.layers, strict=True):
        found += [k.shape[3] for k, v in layers] * repeat
    assert found == SLOTS[name]
    kv_heads = spec.each_layer()[0].mixer.kv_heads
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    assert kept == 2 * 2 * 3 * kv_heads * 4 * sum(SLOTS[name])
    # Less than a window in all, and nothing is a ring.
    short = jax.eval_shape(lambda: init_cache(spec, 3, 4, jnp.dtype(jnp.bfloat16)))
    assert {x.shape[3] for x in jax.tree.leaves(short.layers)} == {4}


@pytest.mark.parametrize("name", telling(SLOTS, ("gemma3", "gpt3")))
def test_it_equals_the_full_forward_however_tokens_come(name):
    """One, a few, more than a window; in rows of unequal lengths, all beyond the window."""
    widths, lengths = (11, 1, 1, 3, 1, 11, 1), np.array([29, 20, 7])
    with jax.enable_x64(True):
        model = LanguageModel(spec_of(name), Execution(dtype=jnp.dtype(np.float64)))
        params = random_params(model, 3, np.float64)
        batch = packed_batch(4, [[n] for n in lengths], lengths.max(), 13)
        expected, _ = jax.jit(model.apply)(params, batch["tokens"])
        cache = init_cache(model.spec, len(lengths), ALL, model.execution.dtype)
        read = jax.jit(model.apply)
        for end, width in zip(np.cumsum(widths), widths, strict=True):
            now = slice(end - width, end)
            real = batch["segment_ids"][:, now]
            places = {"positions": batch["positions"][:, now], "segment_ids": real}
            hidden, aux = read(params, batch["tokens"][:, now], cache=cache, **places)
            cache = aux["cache"]
            np.testing.assert_allclose(
                np.asarray(hidden)[real > 0], np.asarray(expected)[:, now][real > 0], atol=1e-10
            )
    np.testing.assert_array_equal(cache.length, lengths)
