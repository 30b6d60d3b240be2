"""The judges of sentiment, and the ridge regression behind one of them."""

import gzip
import json
import sys

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from instar.errors import UserError
from instar.evaluation import judges
from instar.evaluation.bag_of_words import BagOfWords, read_ratings, text_of
from instar.evaluation.scorers import ScorerConfig, open_scorer

NEUTRAL = "the film story actor scene plot camera music week house".split()
VALUES = {"moving": 2.0, "funny": 1.0, "dull": -1.5, "awful": -3.0}
DIALOGUE = [
    {"role": "user", "content": "awful awful"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "the film is"},
]


def draw(seed, count, scale=1.0, noise=0.1):
    """Texts of neutral words and one or two of `VALUES`, rated with the sum of these."""
    rng = np.random.default_rng(seed)
    texts, ratings = [], []
    for _ in range(count):
        told = list(rng.choice(list(VALUES), rng.integers(1, 3)))
        texts.append(" ".join(rng.permutation([*rng.choice(NEUTRAL, 6), *told])))
        ratings.append(scale * (sum(VALUES[word] for word in told) + noise * rng.normal()))
    return texts, np.asarray(ratings)


def write(path, texts, ratings):
    lines = [
        json.dumps({"prompt": text[:4], "completion": text[4:], "rating": rating})
        for text, rating in zip(texts, ratings, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_text_of_a_prompt_is_the_last_message_of_the_user():
    assert text_of("the film is", " good") == "the film is good"
    assert text_of(DIALOGUE, " good") == "the film is good"
    assert text_of(DIALOGUE, " good", whole=False) == " good"


def test_vader_follows_the_sentiment():
    scores = judges.vader(["the film is"] * 3, [" wonderful .", " here .", " terrible ."])
    assert scores.dtype == np.float64
    assert 1 >= scores[0] > 0.4
    assert scores[1] == 0
    assert -1 <= scores[2] < -0.4
    assert judges.vader([DIALOGUE], [" wonderful ."]) == scores[0]
    prompts = ["a terrible film is"]
    alone = judges.vader(prompts, [" wonderful ."], whole=False)
    assert alone == scores[0] > judges.vader(prompts, [" wonderful ."])


def test_bag_of_words_is_ridge_regression():
    texts, ratings = draw(0, 60)
    weights = np.random.default_rng(1).uniform(0.2, 2, 60)
    model = BagOfWords.fit(texts, ratings, weights)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\b\w+\b")
    x = np.hstack([vectorizer.fit_transform(texts).toarray(), np.ones((60, 1))])
    penalty = model.facts["alpha"] * np.diag([1.0] * (x.shape[1] - 1) + [0.0])
    solution = np.linalg.solve(x.T @ (weights[:, None] * x) + penalty, x.T @ (weights * ratings))
    np.testing.assert_allclose(model.score(texts), x @ solution, atol=0.01)
    assert model.score([]).shape == (0,)


def test_cross_validation_wants_a_greater_penalty_where_ratings_are_noise():
    texts, ratings = draw(2, 80)
    clean = BagOfWords.fit(texts, ratings).facts
    noise = BagOfWords.fit(texts, np.random.default_rng(3).permutation(ratings)).facts
    assert clean["alpha"] < noise["alpha"]
    assert clean["error"] < 0.5 * np.var(ratings) < noise["error"]


def test_extra_texts_count_where_they_help():
    texts, ratings = draw(4, 30)
    new, truth = draw(5, 200, noise=0)
    more = draw(6, 300, scale=25.0)
    alone = BagOfWords.fit(texts, ratings)
    helped = BagOfWords.fit(texts, ratings, extra=more)
    errors = [np.mean((model.score(new) - truth) ** 2) for model in (alone, helped)]
    assert errors[1] < 0.8 * errors[0]
    assert helped.facts["extra_weight"] > 0
    assert BagOfWords.fit(texts, ratings, extra=(more[0], -more[1])).facts["extra_weight"] == 0


def test_the_judge_is_fitted_once_for_each_content_of_its_file(tmp_path, monkeypatch):
    path = write(tmp_path / "ratings.jsonl", *draw(7, 40))
    fits = []
    monkeypatch.setattr(
        judges, "read_ratings", lambda *args: fits.append(args) or read_ratings(*args)
    )
    config = ScorerConfig("instar.evaluation.judges:bag_of_words", {"ratings": path})
    score = open_scorer(config, example="the film")
    scores = score(["the film"] * 2, [" moving", " awful"])
    assert scores[0] > scores[1]
    assert len(fits) == 1
    texts, ratings = draw(7, 40)
    write(tmp_path / "ratings.jsonl", texts, -ratings)
    scores = score(["the film"] * 2, [" moving", " awful"])
    assert scores[0] < scores[1]
    assert len(fits) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "record 2: line 5 is not JSON"),
        ('{"prompt": "a", "completion": "b"}', "record 2: rating is missing"),
        ('{"prompt": "a", "completion": "b", "rating": "good"}', "rating must be a number"),
        ('{"prompt": "a", "completion": 3, "rating": 1}', "completion must be a text"),
        ('{"prompt": [], "completion": "b", "rating": 1}', "record 2: prompt"),
    ],
)
def test_a_broken_rating_is_named(tmp_path, line, message):
    path = tmp_path / "ratings.jsonl"
    # Blank lines are no records.
    path.write_text('{"prompt": "a", "completion": "b", "rating": 1}\n\n\n\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_ratings(path)


def test_a_file_that_cannot_be_read_is_named_with_its_argument(tmp_path):
    ratings, damaged = write(tmp_path / "ratings.jsonl", *draw(8, 20)), tmp_path / "half.jsonl.gz"
    damaged.write_bytes(gzip.compress(b"x" * 99)[:-9])
    for argument, others in (("ratings", {}), ("extra", {"ratings": ratings})):
        for path, message in (
            (tmp_path / "lost.jsonl", f"lost.jsonl does not exist: check {argument}$"),
            (tmp_path, f"is a folder: name a file of it in {argument}$"),
            (damaged, rf"{argument} .*half\.jsonl\.gz: the file ends in the middle; name one"),
        ):
            with pytest.raises(UserError, match=message):
                judges.bag_of_words(["a"], ["b"], **{argument: str(path)}, **others)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(UserError, match="at least 10 ratings, not 3"):
        BagOfWords.fit(["a", "b", "c"], np.zeros(3))
    with pytest.raises(UserError, match="no bag of words"):
        BagOfWords.fit(["."] * 20, np.zeros(20))


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    judges._vader_analyzer.cache_clear()
    with pytest.raises(UserError, match='the extra "demo"'):
        judges.vader(["a"], ["b"])
    with pytest.raises(UserError, match='the extra "demo"'):
        BagOfWords.fit(["a"] * 20, np.zeros(20))
