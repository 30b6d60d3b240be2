"""Loss spikes, and signals as a question between steps."""

import math
import os
import signal

import numpy as np
import pytest

from instar.errors import UserError
from instar.training.failure import FailureConfig, SpikeDetector, StopRequest


def detector(window: int = 10, deviations: float = 6.0) -> SpikeDetector:
    return SpikeDetector(FailureConfig(spike_deviations=deviations, spike_window=window))


def noise(count: int, seed: int = 0) -> np.ndarray:
    return 3 + 0.1 * np.random.default_rng(seed).standard_normal(count)


def test_a_jump_is_a_spike_and_noise_is_none():
    spikes = detector(window=50)
    assert not any(spikes.is_spike(float(loss)) for loss in noise(300))
    assert spikes.is_spike(4.0)


def test_nothing_is_flagged_before_the_window_is_full():
    spikes = detector(window=10)
    flagged = [spikes.is_spike(loss) for loss in [3.0] * 9 + [100.0]]
    assert not any(flagged)


def test_the_bound_is_the_mean_plus_the_stated_deviations():
    window = [1.0, 3.0, 2.0, 2.0, 4.0]
    mean, deviation = np.mean(window), np.std(window, ddof=1)
    for factor, expected in ((1.99, False), (2.01, True)):
        spikes = detector(window=5, deviations=2.0)
        assert not any(spikes.is_spike(loss) for loss in window)
        assert spikes.is_spike(float(mean + factor * deviation)) is expected


def test_a_spike_does_not_join_the_window_that_judges_the_next():
    spikes = detector(window=10)
    for loss in noise(10):
        spikes.is_spike(float(loss))
    assert all(spikes.is_spike(50.0) for _ in range(9))
    assert not spikes.is_spike(3.0)
    assert all(spikes.is_spike(50.0) for _ in range(9))


def test_a_lasting_change_of_level_is_learnt():
    spikes = detector(window=10)
    for loss in noise(10):
        spikes.is_spike(float(loss))
    flagged = [spikes.is_spike(float(loss)) for loss in 2 + noise(40)]
    assert flagged == [True] * 9 + [False] * 31
    assert spikes.is_spike(9.0)


def test_the_window_forgets():
    """A falling loss is judged by its recent values, not by the run's."""
    spikes = detector(window=20)
    losses = 10 * np.exp(-np.arange(400) / 100) + 0.01 * noise(400)
    assert not any(spikes.is_spike(float(loss)) for loss in losses)
    assert spikes.is_spike(1.0)  # Less than where the run began.


def test_a_drop_is_no_spike():
    spikes = detector(window=10)
    for loss in noise(10):
        spikes.is_spike(float(loss))
    assert not spikes.is_spike(0.0)


def test_a_constant_loss_leaves_no_room():
    spikes = detector(window=4)
    assert not any(spikes.is_spike(2.0) for _ in range(10))
    assert spikes.is_spike(2.1)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_is_not_finite_is_a_spike_and_blinds_nothing(loss):
    spikes = detector(window=10)
    assert spikes.is_spike(loss)
    for value in noise(10):
        assert not spikes.is_spike(float(value))
    assert spikes.is_spike(loss)
    assert spikes.is_spike(50.0) and not spikes.is_spike(3.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FailureConfig(spike_window=1), "failure.spike_window must be at least 2"),
        (FailureConfig(max_rollbacks=0), "failure.max_rollbacks must be at least 1"),
        (FailureConfig(spike_deviations=0.0), "failure.spike_deviations must be positive"),
        (FailureConfig(spike_deviations=math.nan), "failure.spike_deviations must be positive"),
    ],
)
def test_values_that_make_no_sense(config, message):
    with pytest.raises(UserError, match=message):
        config.check()


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_signal_becomes_a_question(number, exit_code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked(1)
        os.kill(os.getpid(), number)
        assert stop.asked(2) and stop.asked(3)
        assert stop.exit_code == exit_code
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second interrupt came too late")
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before
