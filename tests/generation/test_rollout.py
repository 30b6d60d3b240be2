"""Rollouts, against sampling one token at a time from whole forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from examples import LLAMA, PREFIX, random_params

from instar.generation.rollout import Trajectories, join, rollout
from instar.generation.sampling import uniforms
from instar.models.language_model import LanguageModel

PROMPTS = [[5, 9, 0, 30], [7], [1, 1, 1, 12, 3, 25], [0, 0], [8] * 6]
SEEDS = np.asarray([3, 2**32 - 1, 0, 11, 3], np.uint32)
# 0 stops too, though it is also what stands behind prompts and responses.
NEW, STOPS, TEMPERATURE = 8, (0, 9, 38), 1.7


@functools.cache
def model_and_params() -> tuple[LanguageModel, dict]:
    model = LanguageModel(LLAMA)
    return model, random_params(model, 1)


def padded(prompts: list[list[int]], width: int, filler: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    tokens = np.full((len(prompts), width), filler, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


@functools.cache
def roll(width: int, filler: int, rows: tuple[int, ...] = (0, 1, 2, 3, 4)) -> Trajectories:
    model, params = model_and_params()
    tokens, lengths = padded([PROMPTS[row] for row in rows], width, filler)
    options = {"max_new_tokens": NEW, "stop_ids": STOPS, "temperature": TEMPERATURE}
    run = jax.jit(functools.partial(rollout, model, **options))
    return jax.device_get(run(params, tokens, lengths, SEEDS[list(rows)]))


@functools.cache
def jitted_logits():
    return jax.jit(model_and_params()[0].logits)


def whole_logits(row: np.ndarray) -> np.ndarray:
    return np.asarray(jitted_logits()(model_and_params()[1], row)[0], np.float64)


def one_by_one(prompt: list[int], seed: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities, each from a pass over all that stands before it."""
    tokens, found = list(prompt), []
    numbers = np.asarray(uniforms(np.full(NEW, seed, np.uint32), np.arange(NEW)), np.float64)
    for number in numbers:
        row = np.zeros((1, 6 + NEW), np.int32)
        row[0, : len(tokens)] = tokens
        logits = whole_logits(row)[len(tokens) - 1] / TEMPERATURE
        log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        tokens.append(int(np.searchsorted(np.cumsum(np.exp(log_probs)), number, side="right")))
        found.append(log_probs[tokens[-1]])
        if tokens[-1] in STOPS:
            break
    return tokens[len(prompt) :], found


def test_it_draws_what_whole_forward_passes_draw():
    found = roll(width=6, filler=0)
    for i, prompt in enumerate(PROMPTS):
        tokens, log_probs = one_by_one(prompt, int(SEEDS[i]))
        count, start = len(tokens), len(prompt)
        assert found.lengths[i] == count and found.prompt_lengths[i] == start
        assert found.responses[i].tolist() == tokens + [0] * (NEW - count)
        whole = [*prompt, *tokens]
        assert found.tokens[i].tolist() == whole + [0] * (6 + NEW - len(whole))
        assert found.finished[i] == (tokens[-1] in STOPS)
        np.testing.assert_allclose(found.log_probs[i, :count], log_probs, rtol=1e-4, atol=1e-4)
        assert not found.log_probs[i, count:].any()
    # Some end and one breaks off; equal seeds behind unlike prompts differ.
    assert {True, False} == set(found.finished.tolist())
    ends = {int(row[n - 1]) for row, n in zip(found.responses, found.lengths, strict=True)}
    assert ends >= set(STOPS) and len(set(found.lengths.tolist())) > 2


def test_what_a_model_with_a_prefix_draws_is_what_it_says_of_it_later():
    """A rollout reads the prompt by itself; whole passes see prompt and response at once."""
    model = LanguageModel(PREFIX)
    params, (start, mask) = random_params(model, 2), (5, 6)
    prompts = [[1, 2, 3, mask, start], [8, mask, start], [0, 12, mask, start]]
    tokens, lengths = padded(prompts, 6, 0)
    options = {"max_new_tokens": NEW, "stop_ids": (9,), "temperature": TEMPERATURE}
    run = jax.jit(functools.partial(rollout, model, **options))
    found = jax.device_get(run(params, tokens, lengths, SEEDS[:3]))
    real = np.arange(6 + NEW) < (lengths + found.lengths)[:, None]
    logits = jax.jit(model.logits)(params, found.tokens, segment_ids=real.astype(np.int32))
    log_probs = np.asarray(jax.nn.log_softmax(np.asarray(logits) / TEMPERATURE))
    for row, (begin, count) in enumerate(zip(lengths, found.lengths, strict=True)):
        places = np.arange(begin, begin + count)
        expected = log_probs[row, places - 1, found.tokens[row, places]]
        np.testing.assert_allclose(found.log_probs[row, :count], expected, rtol=1e-4, atol=1e-4)


def test_neither_padding_nor_neighbours_change_a_response():
    plain, other, rows = roll(6, 0), roll(9, 4, (3, 1)), [3, 1]
    for name in ("responses", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(plain, name)[rows], getattr(other, name))
    np.testing.assert_allclose(plain.log_probs[rows], other.log_probs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(plain.tokens[rows], other.tokens[:, : 6 + NEW])
    assert not other.tokens[:, 6 + NEW :].any()


def test_join_puts_responses_right_behind_prompts():
    rng = np.random.default_rng(0)
    prompts, responses = rng.integers(1, 99, (40, 5)), rng.integers(1, 99, (40, 7))
    starts, counts = rng.integers(1, 6, 40), rng.integers(0, 8, 40)
    found = np.asarray(join(*map(jnp.asarray, (prompts, starts, responses, counts))))
    assert found.shape == (40, 12)
    for row, prompt, response, start, count in zip(
        found, prompts, responses, starts, counts, strict=True
    ):
        whole = [*prompt[:start], *response[:count]]
        assert row.tolist() == whole + [0] * (12 - len(whole))
