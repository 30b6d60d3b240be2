"""Ridge regression on the words of a text: a judge, and the baseline of a reward model."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from instar.data.completion_files import finite, required
from instar.data.completions import Prompt, prompt_messages
from instar.data.formats import READERS, Broken
from instar.data.preferences import on_scale_of
from instar.data.streams import DamagedFile, explained
from instar.errors import UserError

# What the cross-validation chooses from: the penalty, and how much an extra text counts.
_ALPHAS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_EXTRA_WEIGHTS = (0.0, 0.03, 0.1, 0.3)
_FOLDS = 5


def text_of(prompt: Prompt, completion: str, whole: bool = True) -> str:
    """What a judge of texts reads: the user's last message and the completion behind it.

    Args:
      whole: False for the completion alone.

    Raises:
      UserError: the prompt is malformed.
    """
    return prompt_messages(prompt)[-1]["content"] + completion if whole else completion


def read_ratings(
    path: epath.PathLike, whole: bool = True, field: str = "ratings"
) -> tuple[list[str], np.ndarray]:
    """The texts, see `text_of`, and ratings, float64 [N], of a JSON lines file of ratings.

    Args:
      field: what errors call the setting that names the file.

    Raises:
      UserError: the file cannot be read, or a record is no rating.
    """
    texts, ratings = [], []
    try:
        with explained(path, field):
            for number, record in enumerate(READERS["jsonl"](epath.Path(path), None, 0), 1):
                try:
                    text, rating = _rated(record, whole)
                except UserError as error:
                    raise UserError(
                        f"{field} {path}, record {number}: {error}; correct it"
                    ) from None
                texts.append(text)
                ratings.append(rating)
    except DamagedFile as error:
        raise UserError(f"{field} {path}: {error}; name one that is whole") from None
    return texts, np.asarray(ratings, np.float64)


def _rated(record: Any, whole: bool) -> tuple[str, float]:
    if isinstance(record, Broken):
        raise UserError(record.reason)
    prompt, completion = required(record, "prompt"), required(record, "completion")
    if not isinstance(completion, str):
        raise UserError(f"completion must be a text, not {type(completion).__name__}")
    return text_of(prompt, completion, whole), finite(required(record, "rating"), "rating")


@dataclass(frozen=True)
class BagOfWords:
    """A linear function of the TF-IDF of a text's words and pairs of words.

    Attributes:
      vectorizer: scikit-learn's TfidfVectorizer, fitted.
      regression: scikit-learn's Ridge, fitted.
      facts: `texts`, `extra`, `features`, `alpha` (the penalty), `extra_weight` (0 where the extra
        did not help) and `error`, the mean squared error in the cross-validation that chose them.
    """

    vectorizer: Any
    regression: Any
    facts: dict[str, float]

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        ratings: np.ndarray,
        weights: np.ndarray | None = None,
        extra: tuple[Sequence[str], np.ndarray] | None = None,
    ) -> "BagOfWords":
        """Fits the model; a 5-fold cross-validation of `texts` chooses the penalty.

        Args:
          texts: N texts.
          ratings: [N].
          weights: [N], how much each counts; None for all the same.
          extra: more texts and ratings, of another scale perhaps: they are brought to the mean and
            standard deviation of `ratings`. Then how much each of them counts is chosen by how well
            one fold of `texts` is predicted, with the penalty that is best without them.

        Raises:
          UserError: scikit-learn is missing, or there are fewer than ten texts, or no words.
        """
        _sklearn("")
        if len(texts) < 2 * _FOLDS:
            raise UserError(
                f"a bag of words needs at least {2 * _FOLDS} ratings, not {len(texts)}: give more"
            )
        ratings = np.asarray(ratings, np.float64)
        weights = np.ones(len(ratings)) if weights is None else np.asarray(weights, np.float64)
        more, more_ratings = ([], np.zeros(0)) if extra is None else extra
        vectorizer, features = _vectorized([*texts, *more])
        targets = np.concatenate([ratings, on_scale_of(ratings, more_ratings)])

        def weighted(extra_weight: float) -> np.ndarray:
            return np.concatenate([weights, np.full(len(more), extra_weight)])

        count = len(texts)
        errors = {
            alpha: _error(features[:count], ratings, weights, alpha, _FOLDS) for alpha in _ALPHAS
        }
        alpha, share = min(errors, key=errors.__getitem__), 0.0
        if len(more):
            # One fold: with many more texts each fit takes seconds.
            shares = {
                share: _error(features, targets, weighted(share), alpha, 1, count)
                for share in _EXTRA_WEIGHTS
            }
            share = min(shares, key=shares.__getitem__)
        facts = {
            "texts": count,
            "extra": len(more),
            "features": features.shape[1],
            "alpha": alpha,
            "extra_weight": share,
            "error": errors[alpha],
        }
        return cls(vectorizer, _ridge(features, targets, weighted(share), alpha), facts)

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """The ratings float64 [N] that the model expects of N texts."""
        if not len(texts):
            return np.zeros(0)
        return self.regression.predict(self.vectorizer.transform(texts))


def _sklearn(module: str) -> Any:
    """A module of scikit-learn, which only those who judge by words install."""
    try:
        return importlib.import_module(f"sklearn.{module}" if module else "sklearn")
    except ImportError:
        raise UserError(
            'a bag of words needs scikit-learn: install Instar with the extra "demo"'
        ) from None


def _vectorized(texts: Sequence[str]) -> tuple[Any, Any]:
    """The fitted vectorizer and the features, sparse float64 [len(texts), features]."""
    vectorizer = _sklearn("feature_extraction.text").TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\b\w+\b"
    )
    try:
        return vectorizer, vectorizer.fit_transform(texts)
    except ValueError as error:
        raise UserError(f"no bag of words can be made of these texts: {error}") from None


def _ridge(features: Any, targets: np.ndarray, weights: np.ndarray, alpha: float) -> Any:
    regression = _sklearn("linear_model").Ridge(alpha=alpha, solver="sparse_cg", tol=1e-3)
    return regression.fit(features, targets, sample_weight=weights)


def _error(
    features: Any,
    targets: np.ndarray,
    weights: np.ndarray,
    alpha: float,
    folds: int,
    count: int | None = None,
) -> float:
    """The weighted mean squared error on the first `count` rows, each predicted without its fold.

    Of the `_FOLDS` folds of these rows the first `folds` are predicted; all other rows are learnt
    from. `count` is that of all rows where it is None.
    """
    count = len(targets) if count is None else count
    fold_of = np.random.default_rng(0).permutation(count) % _FOLDS
    squares = np.zeros(count)
    for fold in range(folds):
        held_out = np.flatnonzero(fold_of == fold)
        learnt = np.setdiff1d(np.arange(len(targets)), held_out)
        regression = _ridge(features[learnt], targets[learnt], weights[learnt], alpha)
        squares[held_out] = (regression.predict(features[held_out]) - targets[held_out]) ** 2
    predicted = fold_of < folds
    return float(np.average(squares[predicted], weights=weights[:count][predicted]))
