"""A reward model as a scorer, see `instar.evaluation.scorers`."""

import functools
from collections.abc import Sequence

import numpy as np

from instar.data.completions import Prompt
from instar.errors import UserError
from instar.interchange.loading import load
from instar.interchange.reward import LoadedRewardModel


def reward_model(prompts: Sequence[Prompt], completions: Sequence[str], path: str) -> np.ndarray:
    """The scores float64 [N] of the reward model at `path`, the means over its members.

    Raises:
      UserError: there is no reward model, or a text is too long for it.
    """
    return _loaded(path).score(prompts, completions)


@functools.cache
def _loaded(path: str) -> LoadedRewardModel:
    model = load(path)
    if not isinstance(model, LoadedRewardModel):
        raise UserError(f"{path} is a language model, which scores no text: name a reward model")
    return model
