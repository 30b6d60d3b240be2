"""The progress line: rates without compilation and pauses, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from instar.training.hardware import Peak
from instar.training.progress import Progress, Throughput

TABLE = Peak(1e12, "table", "bfloat16", "chip", 1)
MEASURED = Peak(1e12, "measured", "float32", "cpu", 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(peak: Peak, *, terminal: bool = False, total: int = 1000, **options: object):
    """A progress that counts 1 GFLOP a token, its clock, and what it prints."""
    clock, output = Clock(), io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100, _environ={})
    options |= {"flops_per_token": 1e9, "peak": peak, "console": console, "clock": clock}
    return Progress(total, **options), clock, output


def test_rate_leaves_compilation_and_pauses_out():
    clock = Clock()
    rates = Throughput(clock=clock)
    clock.now = 60.0  # compilation
    rates.update(1, 1000)
    assert rates.tokens_per_second is None
    for step in (2, 3):
        clock.now += 0.5
        rates.update(step, 1000)
    clock.now += 300.0
    rates.pause()
    clock.now += 0.5
    rates.update(4, 1000)
    assert rates.tokens_per_second == pytest.approx(2000)
    assert rates.steps_per_second == pytest.approx(2)


def test_rate_follows_the_window_and_survives_slow_steps():
    clock = Clock()
    rates = Throughput(window=20.0, clock=clock)
    for step in range(1, 101):
        clock.now += 1.0 if step <= 50 else 0.5
        rates.update(step, 100)
    assert rates.tokens_per_second == pytest.approx(200)
    for step in range(101, 105):
        clock.now += 60.0
        rates.update(step, 100)
    assert rates.tokens_per_second == pytest.approx(100 / 60)


def test_throughput_is_what_the_loop_logs():
    progress, clock, _ = make(TABLE)
    with progress:
        progress.update(1, 2.0, 100)
        assert progress.throughput() == {}
        clock.now = 1.0
        progress.update(2, 2.0, 250)
        assert progress.throughput() == {"tokens_per_second": 250.0, "mfu": 0.25}


def test_log_gets_a_line_at_most_every_ten_seconds():
    progress, clock, output = make(TABLE, total=350)
    with progress:
        for step in range(1, 351):
            progress.update(step, 3.0, 100)
            clock.now += 0.1
    steps = [line.split()[1] for line in output.getvalue().splitlines()]
    assert steps[0] == "1/350" and steps[-1] == "350/350"
    assert len(steps) == 5  # at 0, 10, 20 and 30 s, and the last step


@pytest.mark.parametrize(("peak", "shown"), [(TABLE, "MFU 10.0 %"), (MEASURED, "MFU ~10.0 %")])
def test_line_says_what_matters_and_marks_a_measured_peak(peak: Peak, shown: str):
    progress, clock, output = make(peak, start_step=899)
    with progress:
        progress.update(900, 3.0, 50)
        clock.now = 10.0
        progress.update(920, 2.34567, 1000)
    line = output.getvalue().splitlines()[-1]
    assert line == f"step 920/1,000  loss 2.3457  100 tok/s  {shown}  0:40 left"


def test_terminal_shows_a_bar_and_messages_unchanged():
    progress, clock, output = make(MEASURED, terminal=True)
    with progress:
        progress.update(1, 3.0, 50)
        clock.now = 1.0
        progress.update(2, 3.0, 50)
        progress.message("a [bold]sample[/bold] :smile: " + "x" * 120)
    shown = output.getvalue()
    assert "step 2/1,000" in shown and "━" in shown and "50 tok/s  MFU ~5.0 %" in shown
    assert "a [bold]sample[/bold] :smile: " + "x" * 120 in shown


def test_other_processes_keep_rates_and_stay_silent():
    progress, clock, output = make(TABLE, primary=False)
    with progress:
        progress.update(1, 3.0, 50)
        clock.now = 1.0
        progress.update(2, 3.0, 50)
        progress.message("hello")
    assert output.getvalue() == "" and progress.throughput()["tokens_per_second"] == 50


@pytest.mark.parametrize(
    ("seconds_a_step", "left"), [(1, "16:29"), (60, "16:29:00"), (3600, "41 d 05:00")]
)
def test_time_left_at_every_scale(seconds_a_step: int, left: str):
    progress, clock, output = make(TABLE)
    with progress:
        progress.update(1, 3.0, 50)
        clock.now = 10.0 * seconds_a_step
        progress.update(11, 3.0, 50)
    assert output.getvalue().splitlines()[-1].endswith(f"  {left} left")
