"""A run that is killed and started again equals one that nothing interrupted, bit for bit."""

import pathlib
import signal
import sys

import pytest
from dying import POINTS
from examples import telling
from random_kills import STEPS, command, kill_and_finish
from runs import environment, final_fingerprint, instar, losses, run

DYING = pathlib.Path(__file__).parent / "dying.py"
# Each point, and how often it is passed before it kills: in the second checkpoint, or step 6.
NUMBERS = {
    "in_a_step": 6,
    "while_arrays_are_written": 30,
    "while_the_input_position_is_written": 2,
    "before_the_commit": 2,
    "after_the_commit": 2,
    "before_the_deletion": 1,
}
# The usual one, and that which leaves most half done.
TELLING = ("in_a_step", "while_arrays_are_written")


@pytest.mark.parametrize("point", telling(POINTS, TELLING))
def test_killed_at(point, run_config, finished_run, tmp_path):
    arguments = ["pretrain", "--config", str(run_config), "--workdir", str(tmp_path)]
    # With no checkpoint kept, so that the third one deletes the first.
    policy = ["--config.checkpoint.keep_steps=4"]
    if point == "before_the_deletion":
        policy = ["--config.checkpoint.minutes=1e-6", "--config.checkpoint.keep_steps=None"]
    killed = run([sys.executable, str(DYING), point, str(NUMBERS[point]), *arguments, *policy])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = instar(*arguments, *policy)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(finished_run)
    assert final_fingerprint(tmp_path) == final_fingerprint(finished_run)


@pytest.mark.exhaustive
def test_killed_at_random_moments(run_config, tmp_path):
    alone = tmp_path / "alone"
    done = run(command(run_config, alone))
    assert done.returncode == 0, done.stderr
    for workdir in kill_and_finish(run_config, environment(), 3, 0, tmp_path):
        assert losses(workdir) == losses(alone)
        assert final_fingerprint(workdir, STEPS) == final_fingerprint(alone, STEPS)
