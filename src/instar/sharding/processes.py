"""Several processes as one program: they join, and they end together."""

import atexit
import os
import sys
import time
from types import TracebackType
from typing import NoReturn

import jax

from instar.errors import UserError
from instar.sharding.peers import Peers, call_roll
from instar.sharding.places import Place, find_place

# Seconds: how long each waits for the others to join, and for a word of them afterwards.
JOIN, SILENCE = "INSTAR_JOIN_SECONDS", "INSTAR_SILENCE_SECONDS"
_DEFAULTS = {JOIN: 300.0, SILENCE: 120.0}

# For so long a failure waits for the news that another process is gone, of which it may come.
_NEWS = 2.0

_peers: Peers | None = None
_place: Place | None = None


def join_processes() -> None:
    """Joins the other processes of this run; see `find_place` for how they are found.

    Does nothing where this process is alone. Must run before the first use of a device. From then
    on no process outlives the others: where one dies, falls silent for INSTAR_SILENCE_SECONDS
    (default 120) or fails, all end; see `instar.sharding.peers`.

    Raises:
      RestartError: not all have come within INSTAR_JOIN_SECONDS (default 300).
      UserError: the variables or the scheduler do not tell which process this is, or the
        coordinator's port is taken.
    """
    global _peers, _place
    seconds, silence = _seconds(JOIN), _seconds(SILENCE)
    _place = find_place(seconds)
    if _place is None:
        return
    lines, hosts = call_roll(_place, seconds)
    if _place.number == 0:
        print(f"{_place.count} processes ({_place.source}) {_named(hosts)}", file=sys.stderr)
    _peers = Peers(_place, lines, hosts, silence)
    _end_with_what_nobody_catches()
    atexit.register(_peers.leave)
    jax.distributed.initialize(
        _place.address,
        _place.count,
        _place.number,
        local_device_ids=_place.devices,
        cluster_detection_method="deactivate",  # what it detects is known
        initialization_timeout=round(seconds),
        # jax ends a process whose peers are gone by SIGABRT, and is to come second.
        heartbeat_timeout_seconds=max(100, round(2 * silence)),
    )


def wait_for_news() -> None:
    """Gives the news that another process is gone, of which a failure may come, time to arrive.

    It ends this process. Returns at once where there are no others.
    """
    if _peers is not None:
        time.sleep(_NEWS)


def end_processes(code: int, why: str) -> None:
    """Ends this process and all others with `code`; returns where this one is alone.

    Args:
      why: a sentence, which the others say; this process is expected to have said it.
    """
    if _peers is not None:
        _peers.end(code, f"process {_place.number}: {why}")


def end_here(code: int, why: str) -> NoReturn:
    """Says `why` and ends this process and all others with `code`, from any thread, at once."""
    print(f"instar: error: {why}", file=sys.stderr, flush=True)
    end_processes(code, why)
    os._exit(code)


def _end_with_what_nobody_catches() -> None:
    """Makes an exception that ends this process end the others as well."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        wait_for_news()
        show(kind, error, trace)
        end_processes(1, f"{kind.__name__}: {error}")

    sys.excepthook = hook


def _seconds(variable: str) -> float:
    text = os.environ.get(variable, "")
    try:
        value = float(text or _DEFAULTS[variable])
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"{variable} must be a positive number of seconds, not {text!r}")
    return value


def _named(hosts: list[str]) -> str:
    """on a (4), b (4)"""
    counts = {host: hosts.count(host) for host in hosts}
    named = [f"{host} ({count})" for host, count in list(counts.items())[:8]]
    return f"on {', '.join(named)}{' ...' if len(counts) > 8 else ''}"
