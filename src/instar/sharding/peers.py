"""The processes of a run keep in touch: who is missing, who is gone, and how each one ended.

Process 0 listens at the coordinator's address until all have called in. Then it listens no more,
which leaves the address to jax's own service, and keeps the connections. Over them go JSON objects,
one a line:

    {"number": 3, "count": 4, "host": "b"}  to process 0: I am here
    {"present": ["a", "b", ...]}            from process 0: all are here, on these hosts
    {"code": 75, "why": "..."}              from process 0: it goes no further, and why
    (an empty line)                         I am still here
    {"left": true}                          I am done, and about to end
    {"code": 1, "why": "..."}               I end, or, from process 0: somebody did. Do likewise

A process that dies closes its connection, which the system does for it, so that the others know at
once; one that is frozen, or whose host is gone, falls silent. In both cases all end with the code
of `RestartError`, and where one fails by itself, with that one's code.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import NoReturn

from instar.errors import RestartError, UserError
from instar.sharding.places import Place

Message = dict

# How long a process that ends waits, in seconds, for the others to have heard of it and, if it is
# process 0, to have ended: its own end makes jax abort those that have not.
_LAST_WORDS = 5.0


class Line:
    """One connection, of which only one thread reads."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(5)
        self.connection, self._rest = connection, b""
        self.heard, self.left = time.monotonic(), False

    def send(self, message: Message | None) -> None:
        """Sends an object, or an empty line for None; a connection that is broken takes nothing."""
        text = b"" if message is None else json.dumps(message).encode()
        with contextlib.suppress(OSError):  # of which its reader learns
            self.connection.sendall(text + b"\n")

    def receive(self, size: int = 65536) -> list[Message] | None:
        """The objects that have come; None where the connection is closed, or not of ours.

        Waits for at most five seconds where nothing has come.

        Args:
          size: how many bytes are read at most. With 1 nothing is read that stands behind an
            object, which is then there for who reads next.
        """
        try:
            data = self.connection.recv(size)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            found = [json.loads(line) for line in lines if line]
        except ValueError:
            return None
        return found if all(isinstance(each, dict) for each in found) else None

    def say_no_more(self) -> None:
        """Tells the other side that nothing comes after what was sent; it may still send."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def drain(self, deadline: float) -> None:
        """Reads until the other side says no more, and forgets it.

        A connection that is closed with something unread takes back what was sent last.
        """
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65536):
                    return


# --- The roll call ------------------------------------------------------------------------------


def call_roll(place: Place, seconds: float) -> tuple[dict[int, Line], list[str]]:
    """Returns when all processes are there: the lines of this one by number, and all hosts.

    Process 0 has a line with each other process, and each of these one with process 0.

    Raises:
      RestartError: some did not come within `seconds`; the sentence names them.
      UserError: the address is taken, or process 0 knows of another number of processes.
    """
    return _receive_all(place, seconds) if place.number == 0 else _call_in(place, seconds)


def _receive_all(place: Place, seconds: float) -> tuple[dict[int, Line], list[str]]:
    deadline = time.monotonic() + seconds
    waiting: list[Line] = []
    came: dict[int, tuple[Line, str]] = {}
    with _listen(place, deadline) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(came) < place.count - 1:
            if time.monotonic() > deadline:
                why = _missing(place, seconds, {n: host for n, (_, host) in came.items()})
                for line, _ in came.values():
                    line.send({"code": RestartError.code, "why": why})
                raise RestartError(why)
            for key, _ in selector.select(0.2):
                if key.fileobj is listener:
                    line = Line(listener.accept()[0])
                    waiting.append(line)
                    selector.register(line.connection, selectors.EVENT_READ, line)
                    continue
                line = key.data
                messages = line.receive()
                number = _number(place, messages, line)
                if number is not None:
                    came[number] = (line, str(messages[0].get("host")))
                elif messages != []:
                    selector.unregister(line.connection)
                    line.connection.close()
                    came = {n: pair for n, pair in came.items() if pair[0] is not line}
    hosts = [_host(), *(came[number][1] for number in range(1, place.count))]
    lines = {number: line for number, (line, _) in came.items()}
    for line in waiting:
        if line in lines.values():
            line.send({"present": hosts})
        else:
            line.connection.close()
    return lines, hosts


def _listen(place: Place, deadline: float) -> socket.socket:
    """Listens at the coordinator's port, which an earlier start may hold for a moment yet."""
    port = int(place.address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    while True:
        try:
            return socket.create_server(
                ("", port),
                family=socket.AF_INET6 if both else socket.AF_INET,
                dualstack_ipv6=both,
                backlog=max(place.count, 128),
            )
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 cannot listen at port {port} ({error.strerror}): choose another "
                    "one in JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT"
                ) from None
            time.sleep(0.5)


def _number(place: Place, messages: list[Message] | None, line: Line) -> int | None:
    """Which process calls in with its first line; None where no process of this run does."""
    if not messages:
        return None
    number, count = messages[0].get("number"), messages[0].get("count")
    if count != place.count or number not in range(1, place.count):
        why = f"process 0 was told that there are {place.count} processes, and {number} of {count}"
        line.send({"code": UserError.code, "why": why})
        return None
    return number


def _missing(place: Place, seconds: float, hosts: dict[int, str]) -> str:
    numbers = [n for n in range(1, place.count) if n not in hosts]
    named = ", ".join(map(str, numbers[:20])) + (" ..." if len(numbers) > 20 else "")
    others = ", ".join(f"{n} on {host}" for n, host in sorted(hosts.items())[:20])
    return (
        f"process {named} of {place.count} did not come to {place.address} within {seconds:g} s "
        f"(those that came: 0 on {_host()}{', ' if others else ''}{others}): see what became of "
        "them, or set INSTAR_JOIN_SECONDS to wait for longer"
    )


def _call_in(place: Place, seconds: float) -> tuple[dict[int, Line], list[str]]:
    host, _, port = place.address.rpartition(":")
    deadline = time.monotonic() + seconds
    hello = {"number": place.number, "count": place.count, "host": _host()}
    while time.monotonic() < deadline:
        try:
            line = Line(socket.create_connection((host.strip("[]"), int(port)), timeout=5))
        except OSError:
            time.sleep(0.2)
            continue
        line.send(hello)
        # Process 0 may have begun to wait only now; it decides.
        answer = _answer(line, time.monotonic() + seconds + 10)
        if "present" in answer:
            return {0: line}, answer["present"]
        line.connection.close()
        if "code" in answer:
            kind = UserError if answer["code"] == UserError.code else RestartError
            raise kind(answer["why"])
        time.sleep(0.2)
    raise RestartError(
        f"process 0 of {place.count} did not answer at {place.address} within {seconds:g} s: see "
        "what became of it, and that this address is its own"
    )


def _answer(line: Line, deadline: float) -> Message:
    """What process 0 answers; {} where the line breaks, or it says nothing.

    What it says next, such as that somebody has failed already, is for the `Peers` to read.
    """
    while time.monotonic() < deadline:
        messages = line.receive(1)
        if messages is None:
            return {}
        if messages:
            return messages[0]
    return {}


def _host() -> str:
    return socket.gethostname()


# --- Afterwards ---------------------------------------------------------------------------------


class Peers:
    """Watches over the other processes, in a thread, for as long as this one lives.

    Args:
      lines: those of `call_roll`; `hosts`, of all processes.
      silence: seconds without a word after which a process counts as gone.
    """

    def __init__(self, place: Place, lines: dict[int, Line], hosts: list[str], silence: float):
        self._place, self._lines, self._hosts, self._silence = place, lines, hosts, silence
        self._ending = threading.Lock()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def leave(self) -> None:
        """Says that this process is done, so that its end alarms nobody."""
        self._tell({"left": True})

    def end(self, code: int, why: str) -> NoReturn:
        """Ends this process and all others with `code`.

        Args:
          why: what the others say about it.
        """
        with self._ending:
            self._tell({"code": code, "why": why})
            self._exit(code)

    def _tell(self, message: Message | None) -> None:
        for line in self._lines.values():
            line.send(message)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for number, line in self._lines.items():
                line.heard = time.monotonic()
                selector.register(line.connection, selectors.EVENT_READ, (number, line))
            beat, told, now = min(self._silence / 6, 10.0), 0.0, time.monotonic()
            while True:
                found, before, now = selector.select(beat), now, time.monotonic()
                if now - before > self._silence / 2:
                    # This process was stopped itself, as all are where a scheduler suspends a job.
                    for line in self._lines.values():
                        line.heard = now
                for key, _ in found:
                    number, line = key.data
                    messages = line.receive()
                    if messages is None:
                        selector.unregister(line.connection)
                        self._closed(number, line)
                    for message in messages or ():
                        self._take(line, message)
                if now - told >= beat:
                    self._tell(None)
                    told = now
                self._listen_for_silence(now)

    def _take(self, line: Line, message: Message) -> None:
        line.left = line.left or "left" in message
        if "code" in message:
            self._end_for(message["code"], message["why"])

    def _closed(self, number: int, line: Line) -> None:
        if not line.left:
            line.left = True
            self._lose(number, "is gone")

    def _listen_for_silence(self, now: float) -> None:
        for number, line in self._lines.items():
            if not line.left and now - line.heard > self._silence:
                self._lose(number, f"has not answered for {self._silence:g} s")

    def _lose(self, number: int, how: str) -> None:
        self._end_for(
            RestartError.code,
            f"process {number} on {self._hosts[number]} {how}; start all processes again, and the "
            "run goes on from its last checkpoint",
        )

    def _end_for(self, code: int, why: str) -> NoReturn:
        """Ends for a reason that lies with another process."""
        with self._ending:  # which is never given back: the first reason counts
            print(f"instar: error: {why}", file=sys.stderr)
            if self._place.number == 0:
                self._tell({"code": code, "why": why})
            self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        """Ends without what a normal end waits for, which may need the processes that are gone.

        Process 0 says no more when it has told all; thereupon the others end, and then it does.
        """
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        deadline = time.monotonic() + _LAST_WORDS
        for line in self._lines.values() if self._place.number == 0 else ():
            line.say_no_more()
        for line in self._lines.values():
            line.drain(deadline)
        os._exit(code)
