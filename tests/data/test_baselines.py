"""The Kneser-Ney model of benchmarks/baselines.py, with which trained models are compared."""

import importlib.util
import pathlib
from collections import Counter, defaultdict

import numpy as np
import pytest

FILE = pathlib.Path(__file__).parents[2] / "benchmarks" / "_kneser_ney.py"
VOCAB_SIZE, BOS, EOS = 12, 0, 1


@pytest.fixture(scope="module")
def kneser_ney():
    spec = importlib.util.spec_from_file_location("kneser_ney", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def corpus(documents: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> list[np.ndarray]:
    """Documents in which some tokens are frequent and some rare; the last one never comes."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, vocab_size - 2)
    words = [
        2 + rng.choice(len(shares), rng.integers(0, 9), p=shares / shares.sum())
        for _ in range(documents)
    ]
    return [np.array([BOS, *document, EOS]) for document in words]


def by_definition(documents, vocab_size, order, window):
    """p(last token of `window` | the others), from dictionaries and the formula alone."""
    padded = [[BOS] * (order - 2) + document.tolist() for document in documents]
    grams = Counter(
        tuple(document[at - order + 1 : at + 1])
        for document in padded
        for at in range(order - 1, len(document))
    )
    p = 1 / vocab_size
    levels = [grams]
    for _ in range(order - 1):
        # Below the highest order, an n-gram counts once for each token that was seen before it.
        levels.insert(0, Counter(gram[1:] for gram in levels[0]))
    for k, counts in enumerate(levels, start=1):
        n = Counter(counts.values())
        y = n[1] / (n[1] + 2 * n[2])
        discount = [0] + [c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)]
        followers = defaultdict(dict)
        for gram, count in counts.items():
            followers[gram[:-1]][gram[-1]] = count
        *context, word = window[-k:]
        seen = followers.get(tuple(context))
        if not seen:
            break
        count, total = seen.get(word, 0), sum(seen.values())
        freed = sum(discount[min(c, 3)] for c in seen.values())
        p = (count - discount[min(count, 3)] + freed * p) / total
    return p


def test_it_is_the_formula(kneser_ney):
    # Of so many tokens that at each order some counts are 1, 2, 3 and 4, as the discounts need.
    documents = corpus(300, vocab_size=150)
    model = kneser_ney.KneserNey(documents, 150, order=3)
    seen = kneser_ney.make_windows(documents, 3)[:, ::10]
    others = np.random.default_rng(1).integers(0, 40, (3, 100))
    windows = np.concatenate([seen, others], axis=1)
    expected = [by_definition(documents, 150, 3, window) for window in windows.T.tolist()]
    np.testing.assert_allclose(model.probabilities(windows), expected, rtol=1e-12)


@pytest.mark.parametrize("documents", [2, 20, 500])
def test_probabilities_sum_to_one(kneser_ney, documents):
    training = corpus(documents)
    model = kneser_ney.KneserNey(training, VOCAB_SIZE, order=5)
    seen = kneser_ney.make_windows(training, 5)[:-1, ::7]
    unseen = np.random.default_rng(1).integers(0, VOCAB_SIZE, (4, 50))
    half_seen = seen.copy()
    half_seen[:2] = VOCAB_SIZE - 1
    contexts = np.concatenate([seen, unseen, half_seen], axis=1)
    words = np.arange(VOCAB_SIZE)
    windows = np.concatenate(
        [np.repeat(contexts, VOCAB_SIZE, axis=1), np.tile(words, contexts.shape[1])[None]]
    )
    p = model.probabilities(windows).reshape(-1, VOCAB_SIZE)
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)


def test_every_token_but_the_first_is_paid_for(kneser_ney):
    documents = [np.array([BOS, EOS]), np.array([BOS, 2, 3, EOS])]
    windows = kneser_ney.make_windows(documents, 3)
    assert windows.T.tolist() == [[0, 0, 1], [0, 0, 2], [0, 2, 3], [2, 3, 1]]
    model = kneser_ney.KneserNey(corpus(50), VOCAB_SIZE, order=3)
    assert model.bits(documents) == pytest.approx(-np.log2(model.probabilities(windows)).sum())


def test_text_like_the_training_text_costs_less(kneser_ney):
    model = kneser_ney.KneserNey(corpus(500), VOCAB_SIZE)
    alike = corpus(100, seed=1)
    rng = np.random.default_rng(2)
    shuffled = [np.array([BOS, *rng.integers(2, 11, len(d) - 2), EOS]) for d in alike]
    assert model.bits(alike) < 0.9 * model.bits(shuffled)
