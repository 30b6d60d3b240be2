"""Scorers that judge the sentiment of English texts, see `instar.evaluation.scorers`.

Both look at words only, so that text without sense can please them. What they say is worth
something beside the perplexity of the same text under a model that was not optimised.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from instar.data.completions import Prompt
from instar.data.streams import file_digest
from instar.errors import UserError
from instar.evaluation.bag_of_words import BagOfWords, read_ratings, text_of


def vader(prompts: Sequence[Prompt], completions: Sequence[str], whole: bool = True) -> np.ndarray:
    """The compound score of VADER, a list of rated words with rules (Hutto and Gilbert 2014).

    Args:
      whole: judge the user's last message with the completion behind it; False: the completion.

    Returns:
      float64 [N], each in [-1, 1], 1 the most positive.

    Raises:
      UserError: the package vaderSentiment is missing.
    """
    analyzer = _vader_analyzer()
    texts = (text_of(*pair, whole) for pair in zip(prompts, completions, strict=True))
    return np.asarray([analyzer.polarity_scores(text)["compound"] for text in texts], np.float64)


def bag_of_words(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    ratings: str,
    extra: str = "",
    whole: bool = True,
) -> np.ndarray:
    """The rating that a `BagOfWords` expects, which is fitted when it is first needed.

    Args:
      ratings: the JSON lines file of ratings to learn from.
      extra: another one, whose ratings may have another scale; "" for none.
      whole: learn from and judge prompts with completions; False: completions alone.

    Returns:
      float64 [N], on the scale of `ratings`.

    Raises:
      UserError: scikit-learn is missing, or a file cannot be read or has too few ratings.
    """
    given = {"ratings": ratings, "extra": extra}
    files = tuple((path, name, file_digest(path, name)) for name, path in given.items() if path)
    model = _fitted(files, whole)
    return model.score([text_of(*pair, whole) for pair in zip(prompts, completions, strict=True)])


@functools.cache
def _vader_analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError(
            'the judge vader needs vaderSentiment: install Instar with the extra "demo"'
        ) from None
    return SentimentIntensityAnalyzer()


@functools.lru_cache(maxsize=4)
def _fitted(files: tuple[tuple[str, str, str], ...], whole: bool) -> BagOfWords:
    """The model of (path, argument, digest) of the ratings and perhaps of the extra ones."""
    (texts, ratings), *extra = (read_ratings(path, whole, name) for path, name, _ in files)
    return BagOfWords.fit(texts, ratings, extra=extra[0] if extra else None)
