"""Python functions that score completions, named in configs by their import path.

A scorer is `function(prompts, completions, **arguments)`, which returns one number for each
completion, the higher the better. Its prompts are texts or lists of messages, as in
`instar.data.completions`; its completions are what the assistant said, without the end token.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from instar.data.completions import Prompt
from instar.errors import UserError

Scorer = Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class ScorerConfig:
    """A scorer and what it is called with.

    Attributes:
      function: where it is: "MODULE:NAME", such as "instar.evaluation.judges:vader". The module
        must be installed, or lie in a folder of PYTHONPATH.
      arguments: its keyword arguments beside prompts and completions.
    """

    function: str
    arguments: dict[str, bool | int | float | str] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UserError for a path that is not of the form MODULE:NAME."""
        module, colon, name = self.function.partition(":")
        parts = [*module.split("."), *name.split(".")]
        if not colon or not all(part.isidentifier() for part in parts):
            raise UserError(
                "a scorer's function must be MODULE:NAME, such as instar.evaluation.judges:vader, "
                f"not {self.function!r}"
            )


def open_scorer(config: ScorerConfig, example: Prompt | None = None) -> Scorer:
    """The scorer that `config` names, with its results checked.

    Args:
      example: a prompt that it is tried on at once, with two completions, so that a library, a
        file or a score for each that it lacks is missed before anything else; None to try nothing.

    Returns:
      A function from prompts and completions, N of each, to float64 [N]. It raises UserError where
      the scorer raises, or returns another number of scores, or something that is no finite number.

    Raises:
      UserError: it cannot be imported, does not take the arguments, or fails on the example.
    """
    function = _imported(config.function)
    _check_arguments(function, config)

    def score(prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts, but {len(completions)} completions")
        try:
            scores = function(prompts, completions, **config.arguments)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"scorer {config.function} raised {type(error).__name__}: {error}"
            ) from error
        return _checked(scores, len(completions), config.function)

    if example is not None:
        score([example] * 2, ["", " yes"])
    return score


def _imported(path: str) -> Callable:
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever the code of the module raises
        raise UserError(
            f"scorer {path}: {module} cannot be imported ({type(error).__name__}: {error}); "
            "install it, or add its folder to PYTHONPATH"
        ) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UserError(f"scorer {path}: {module} has no function {name}; correct `function`")
    return found


def _check_arguments(function: Callable, config: ScorerConfig) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some functions that are written in C do not say
    try:
        signature.bind([], [], **config.arguments)
    except TypeError as error:
        raise UserError(
            f"scorer {config.function} cannot be called with its `arguments`: {error}; it is "
            f"{config.function.partition(':')[2]}{signature}"
        ) from None


def _checked(scores: Any, count: int, name: str) -> np.ndarray:
    try:
        array = np.asarray(scores)
    except Exception as error:
        raise UserError(f"scorer {name} must return numbers ({error})") from None
    if count == 0 and array.size == 0:
        return np.zeros(0)
    if array.dtype.kind not in "biuf":
        raise UserError(
            f"scorer {name} must return a list of numbers, not {type(scores).__name__} of "
            f"{array.dtype}"
        )
    if array.shape != (count,):
        raise UserError(
            f"scorer {name} must return one number for each of the {count} completions; what it "
            f"returned has the shape {list(array.shape)}"
        )
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise UserError(
            f"scorer {name} must return finite numbers; that of completion {wrong[0]} is "
            f"{array[wrong[0]]}"
        )
    return array.astype(np.float64)
