"""What the trials of a sweep are: dicts from dotted keys of a config to values.

A sweep file is Python with ``get_sweep()``, which yields or returns the trials, written out or
built with what is here::

    from instar import sweep

    def get_sweep():
        widths = sweep.zip({"model.width": (64, 128), "model.heads": (2, 4)})
        return sweep.product(widths, {"optimizer.learning_rate": (1e-3, 3e-3, 1e-2)})

Trials are lists, so ``a + b`` is the trials of both.
"""

import builtins
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any

from instar.errors import UserError

Trial = dict[str, Any]
# How a value is drawn, from a number in [0, 1).
Draw = Callable[[float], Any]

# Digits of a drawn number: enough to search, and few enough for a folder's name to state it.
DIGITS = 4


def product(*parts: Mapping[str, Iterable] | Iterable[Trial]) -> list[Trial]:
    """Each combination of what the parts hold; the last part changes fastest.

    Args:
      parts: trials, or a mapping from keys to their values, of which each key is a part.

    Raises:
      UserError: two parts set the same key.
    """
    return [_merged(each) for each in itertools.product(*_axes(parts))]


def zip(*parts: Mapping[str, Iterable] | Iterable[Trial]) -> list[Trial]:
    """The first of each part together, the second, and so on; `parts` as `product` takes them.

    Raises:
      UserError: two parts set the same key, or they are not of one length.
    """
    axes = _axes(parts)
    lengths = {len(axis) for axis in axes}
    if len(lengths) > 1:
        of = ", ".join(f"{', '.join(axis[0]) if axis else 'none'}: {len(axis)}" for axis in axes)
        raise UserError(f"zip takes one value of each part at a time, and their numbers are {of}")
    return [_merged(each) for each in builtins.zip(*axes, strict=True)]


def random(count: int, draws: Mapping[str, Draw], seed: int = 0) -> list[Trial]:
    """`count` trials, each with a value drawn for each key.

    The same seed gives the same trials. A higher count adds trials to them, and another key leaves
    the values of the others as they are.

    Args:
      draws: of each key, such as ``log_uniform(1e-4, 1e-2)``.
    """
    # Of a text Python's generator gives the same numbers in every version and on every machine.
    sources = {key: Random(f"{seed}/{key}") for key in draws}
    return [{key: draw(sources[key].random()) for key, draw in draws.items()} for _ in range(count)]


def uniform(low: float, high: float) -> Draw:
    """A number between two others, to four digits, each as likely. Raises UserError."""
    _check_bounds("uniform", low, high)
    return lambda share: _rounded(low + (high - low) * share, low, high)


def log_uniform(low: float, high: float) -> Draw:
    """A number between two positive ones, to four digits: each factor is as likely.

    Raises:
      UserError: a bound is not positive, or they are in the wrong order.
    """
    _check_bounds("log_uniform", low, high)
    if low <= 0:
        raise UserError(f"log_uniform needs positive bounds, not {low} and {high}")
    return lambda share: _rounded(low * math.exp(math.log(high / low) * share), low, high)


def choice(values: Sequence[Any]) -> Draw:
    """One of some values, each as likely. Raises UserError where there is none."""
    if not values:
        raise UserError("choice needs at least one value")
    return lambda share: values[int(share * len(values))]


def _check_bounds(name: str, low: float, high: float) -> None:
    if not low < high:
        raise UserError(f"{name} needs a lower and a higher bound, not {low} and {high}")


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def _axes(parts: Sequence[Mapping[str, Iterable] | Iterable[Trial]]) -> list[list[Trial]]:
    """The parts as lists of trials; a mapping as one for each of its keys."""
    axes = []
    for part in parts:
        if isinstance(part, Mapping):
            axes += [[{key: value} for value in values] for key, values in part.items()]
        else:
            axes.append(list(part))
    return axes


def _merged(trials: Iterable[Trial]) -> Trial:
    def merge(one: Trial, other: Trial) -> Trial:
        if twice := one.keys() & other.keys():
            raise UserError(f"two parts of the sweep set {min(twice)}: leave it to one of them")
        return {**one, **other}

    return functools.reduce(merge, trials, {})
