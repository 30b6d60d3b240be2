"""Signs that reinforcement learning goes wrong, told from the scalars of its iterations.

A judge alone does not see it: "great great great" pleases many. So entropy, diversity, the distance
from the reference and the perplexity under a model that is not trained are watched too, and the
score is held against measures that the policy is not trained on (Gao et al. 2023).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from instar.errors import UserError

# An alarm has cleared when its severity has fallen to this; it rings again from 1 on.
_CLEARED = 0.9
# By how many standard errors the score must have risen while a gold measure fell.
_SCORE_RISE = 2.0


@dataclass(frozen=True)
class AlarmConfig:
    """When an alarm rings; a threshold of None is not watched.

    What is compared are means of `window` iterations; "at the start" is the mean of the first
    `baseline` ones, in which the policy is still about what it began as.

    Attributes:
      baseline, window: in iterations.
      entropy: the least share of the entropy at the start.
      diversity: the least share of the diversity at the start, which is `distinct_2`, and also
        1 - `self_bleu`.
      kl: the greatest divergence of a response from the reference, in nats.
      perplexity_rise, perplexity_fall: factors by which the perplexity under the base model may
        grow (towards gibberish) and shrink (towards endless repetition).
      overoptimisation: by how many standard errors a gold measure may fall below its best while the
        score rises.
      overoptimisation_window: the iterations of the means that are compared there.
    """

    baseline: int = 3
    window: int = 5
    entropy: float | None = 0.5
    diversity: float | None = 0.6
    kl: float | None = 40.0
    perplexity_rise: float | None = 3.0
    perplexity_fall: float | None = 4.0
    overoptimisation: float | None = 5.0
    overoptimisation_window: int = 10

    def check(self) -> None:
        """Raises UserError for thresholds that could never, or would always, be crossed."""
        for name in ("baseline", "window", "overoptimisation_window"):
            if getattr(self, name) < 1:
                raise UserError(f"alarms.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("entropy", "diversity"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UserError(f"alarms.{name} must be between 0 and 1, not {value}")
        for name in ("perplexity_rise", "perplexity_fall"):
            value = getattr(self, name)
            if value is not None and value <= 1:
                raise UserError(f"alarms.{name} must be a factor above 1, not {value}")
        for name in ("kl", "overoptimisation"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"alarms.{name} must be above 0, not {value}")


@dataclass(frozen=True)
class Alarm:
    """What rings at `step`: `name` for logs, and a `sentence` for people."""

    step: int
    name: str
    sentence: str


@dataclass(frozen=True)
class _Sign:
    """A measure and how bad it is: alarming from a severity of 1 on."""

    name: str
    severity: float
    sentence: str


class Alarms:
    """Watches one run.

    What rings depends on nothing but the config and the scalars so far: a resumed run that gives
    the old ones to `update` again, in order, goes on as if it had never stopped.
    """

    def __init__(self, config: AlarmConfig):
        self._config = config
        self._history: dict[str, list[float]] = {}
        # By gold measure, the (score, gold) of the iterations that have both.
        self._pairs: dict[str, list[tuple[float, float]]] = {}
        self._ringing: set[str] = set()

    def update(self, step: int, scalars: Mapping[str, float]) -> list[Alarm]:
        """The alarms that begin to ring with an iteration; one rings once until it has cleared.

        Args:
          scalars: those known here are `score`, any number of `gold/NAME`, `kl` (nats a response),
            `entropy` (nats a token), `distinct_2`, `self_bleu` and `perplexity`. Each may be
            absent, and what is not finite counts as absent.
        """
        self._remember(scalars)
        alarms = []
        for sign in self._signs():
            if sign.severity >= 1 and sign.name not in self._ringing:
                self._ringing.add(sign.name)
                alarms.append(Alarm(step, sign.name, sign.sentence))
            elif sign.severity <= _CLEARED:
                self._ringing.discard(sign.name)
        return alarms

    def _remember(self, scalars: Mapping[str, float]) -> None:
        names = ("entropy", "distinct_2", "self_bleu", "perplexity", "kl")
        for name in names:
            value = _number(scalars, name)
            if math.isfinite(value):
                self._history.setdefault(name, []).append(value)
        score = _number(scalars, "score")
        for name in scalars:
            gold = _number(scalars, name) if name.startswith("gold/") else math.nan
            if math.isfinite(score) and math.isfinite(gold):
                self._pairs.setdefault(name.removeprefix("gold/"), []).append((score, gold))

    def _signs(self) -> Iterator[_Sign]:
        yield from self._entropy()
        yield from self._diversity()
        yield from self._divergence()
        yield from self._perplexity()
        if self._config.overoptimisation is not None:
            for name, pairs in self._pairs.items():
                yield from self._overoptimised(name, np.asarray(pairs))

    def _start_and_now(self, name: str) -> Iterator[tuple[float, float]]:
        """The means of the first and of the last iterations; none before they are apart."""
        values = self._history.get(name, [])
        first, last = self._config.baseline, self._config.window
        if len(values) >= first + last:
            yield float(np.mean(values[:first])), float(np.mean(values[-last:]))

    def _entropy(self) -> Iterator[_Sign]:
        least = self._config.entropy
        if least is None:
            return
        for start, now in self._start_and_now("entropy"):
            yield _Sign(
                "entropy",
                _ratio(least * start, now),
                f"entropy collapses: {now:.2f} nats a token, {start:.2f} at the start; raise the "
                "KL coefficient or lower the learning rate",
            )

    def _diversity(self) -> Iterator[_Sign]:
        least = self._config.diversity
        if least is None:
            return
        for start, now in self._start_and_now("distinct_2"):
            yield _Sign(
                "distinct_2",
                _ratio(least * start, now),
                f"diversity collapses: distinct-2 is {now:.3f}, {start:.3f} at the start; the "
                "answers repeat the same pairs of words",
            )
        for start, now in self._start_and_now("self_bleu"):
            yield _Sign(
                "self_bleu",
                _ratio(least * (1 - start), 1 - now),
                f"diversity collapses: self-BLEU is {now:.3f}, {start:.3f} at the start; the "
                "answers resemble one another",
            )

    def _divergence(self) -> Iterator[_Sign]:
        values = self._history.get("kl", [])[-self._config.window :]
        if values and self._config.kl is not None:
            now = float(np.mean(values))
            yield _Sign(
                "kl",
                now / self._config.kl,
                f"the policy has left its reference: {now:.1f} nats a response, above "
                f"{self._config.kl:g}; raise the KL coefficient or stop earlier",
            )

    def _perplexity(self) -> Iterator[_Sign]:
        rise, fall = self._config.perplexity_rise, self._config.perplexity_fall
        for start, now in self._start_and_now("perplexity"):
            told = f"perplexity under the base model is {now:.1f}, {start:.1f} at the start"
            if rise is not None:
                yield _Sign(
                    "perplexity_rise",
                    _ratio(now, rise * start),
                    f"the answers turn into gibberish: their {told}",
                )
            if fall is not None:
                yield _Sign(
                    "perplexity_fall",
                    _ratio(start / fall, now),
                    f"the answers become too easy to predict: their {told}; they may repeat",
                )

    def _overoptimised(self, name: str, pairs: np.ndarray) -> Iterator[_Sign]:
        """Of [T, 2] scores and gold values.

        The last `overoptimisation_window` = w iterations are compared with those w, before them and
        not overlapping, whose gold mean is the highest. The standard error of a difference of two
        means is sigma sqrt(2 / w). Sigma, the noise of one iteration, is estimated from differences
        of neighbours, as half their mean square: so a trend does not pass for noise.
        """
        width = self._config.overoptimisation_window
        if len(pairs) < 2 * width:
            return
        sums = np.cumsum(np.vstack([np.zeros(2), pairs]), axis=0)
        means = (sums[width:] - sums[:-width]) / width
        noise = np.sqrt(np.mean(np.diff(pairs, axis=0) ** 2, axis=0) / 2 * 2 / width)
        best = int(np.argmax(means[:-width, 1]))
        score, gold = means[-1] - means[best]
        rose = score > _SCORE_RISE * noise[0]
        yield _Sign(
            f"overoptimised/{name}",
            _ratio(-gold, self._config.overoptimisation * noise[1]) if rose and gold < 0 else 0.0,
            f"the score is over-optimised: it rose from {means[best, 0]:.3f} to "
            f"{means[-1, 0]:.3f} while {name} fell from its best {means[best, 1]:.3f} to "
            f"{means[-1, 1]:.3f}; take an earlier checkpoint, or raise the KL coefficient",
        )


def _number(scalars: Mapping[str, float], name: str) -> float:
    """A scalar, NaN where it is absent."""
    value = scalars.get(name)
    return math.nan if value is None else float(value)


def _ratio(upper: float, lower: float) -> float:
    """upper / lower, infinite where nothing is left below, and 0 where nothing is above."""
    if upper <= 0:
        return 0.0
    return upper / lower if lower > 0 else math.inf
