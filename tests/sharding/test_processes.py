"""Several processes as one program."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from instar.errors import UserError
from instar.sharding.processes import VARIABLES, join_processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_read_and_hold_their_own_rows():
    address = f"127.0.0.1:{free_port()}"
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    script = Path(__file__).with_name("places_rows.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script],
            env=shared | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0 and "whole" in output, output
    finally:
        for process in processes:
            process.kill()


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
