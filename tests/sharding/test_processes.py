"""Several processes as one program."""

from pathlib import Path

import pytest
from several import run_pair

from instar.errors import UserError
from instar.sharding.processes import VARIABLES, join_processes


def test_two_processes_read_and_hold_their_own_rows():
    for code, output in run_pair(Path(__file__).with_name("places_rows.py")):
        assert code == 0 and "whole" in output, output


def test_without_variables_there_is_nothing_to_join(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    join_processes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", None, None), "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too"),
        ((None, "2", "0"), "JAX_COORDINATOR_ADDRESS must be set too"),
        (("host:1", "two", "0"), "must be numbers"),
        (("host:1", "2", "-1"), "must be numbers"),
    ],
)
def test_half_of_the_variables_is_an_error(monkeypatch, values, message):
    for name, value in zip(VARIABLES, values, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_processes()
