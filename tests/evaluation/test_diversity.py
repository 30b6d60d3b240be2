"""Diversity against loops, counts by hand, and sacrebleu."""

import time

import numpy as np
import pytest
import sacrebleu

from instar.evaluation.diversity import distinct_n, repetition, self_bleu, words

WORDS = "the film is a moving and funny story about two old friends who lie , cry .".split()


def draw(seed: int, count: int, longest: int) -> list[str]:
    """Texts of 0 to `longest` words, the frequent words first."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, len(WORDS) + 1)
    return [
        " ".join(rng.choice(WORDS, rng.integers(0, longest + 1), p=shares / shares.sum()))
        for _ in range(count)
    ]


def test_words_are_cut_at_spaces_and_punctuation():
    assert words("It isn't bad,  it’s (very) good.") == (
        ["It", "isn't", "bad", ",", "it’s", "(", "very", ")", "good", "."]
    )


def test_distinct_n_by_hand():
    texts = ["a b a b", "a b", "c"]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 2 / 4
    assert distinct_n(texts, 3) == 1.0
    assert distinct_n(texts, 5) == 0.0
    assert distinct_n([], 1) == 0.0
    assert distinct_n([[1, 2, 1, 2], (1, 2), np.array([3])], 2) == 2 / 4  # ids


def test_n_grams_do_not_reach_over_the_end_of_a_text():
    assert distinct_n(["a b", "a b"], 2) == 1 / 2


def test_repetition_by_hand():
    assert repetition(["a b c d"], 2) == 0.0
    assert repetition(["x x x x x"], 2) == 3 / 4
    assert repetition(["x x x x x", "a b c", "a"], 2) == 3 / 8  # the last has no pair of words
    assert repetition(["a b"], 4) == 0.0


@pytest.mark.parametrize(("seed", "count", "longest"), [(0, 3, 9), (1, 17, 9), (2, 64, 30)])
def test_self_bleu_equals_sacrebleu(seed, count, longest):
    texts = draw(seed, count, longest)
    expected = []
    for index, text in enumerate(texts):
        others = texts[:index] + texts[index + 1 :]
        bleu = sacrebleu.sentence_bleu(
            text,
            others,
            smooth_method="floor",
            smooth_value=0.1,
            tokenize="none",
            use_effective_order=True,
        )
        expected.append(bleu.score / 100)
    assert 0 < np.mean(expected) < 1
    assert self_bleu(texts) == pytest.approx(np.mean(expected), rel=1e-9)


def test_self_bleu_of_equal_and_of_foreign_texts():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(1)
    assert self_bleu(["one two three four", "five six seven eight"]) == 0
    assert self_bleu(["alone among none"]) == 0
    assert self_bleu(["", ""]) == 0


def test_self_bleu_takes_the_first_texts():
    texts = draw(3, 12, 20)
    assert self_bleu(texts, max_texts=5) == self_bleu(texts[:5]) != self_bleu(texts)


def test_self_bleu_is_fast_enough_to_watch_a_run():
    texts = [" ".join(np.random.default_rng(seed).choice(WORDS, 20)) for seed in range(64)]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        self_bleu(texts)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
