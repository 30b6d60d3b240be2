"""Several processes as one program."""

import contextlib
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from several import free_port, run_pair, run_several

from instar.errors import RestartError, UserError
from instar.sharding.peers import call_roll
from instar.sharding.places import Place
from instar.sharding.processes import JOIN, join_processes

HERE = Path(__file__).parent


def call(places: list[Place], seconds: float) -> list[object]:
    """What `call_roll` gives to each of these processes, or the error that it raises."""
    results: list[object] = [None] * len(places)

    def one(index: int) -> None:
        try:
            results[index] = call_roll(places[index], seconds)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def make_places(count: int, numbers: list[int]) -> list[Place]:
    address = f"127.0.0.1:{free_port()}"
    return [Place("a test", address, count, number) for number in numbers]


def test_two_processes_read_and_hold_their_own_rows():
    for code, output in run_pair(HERE / "places_rows.py"):
        assert code == 0 and "whole" in output, output


def test_the_roll_call_ends_when_all_are_there():
    results = call(make_places(4, [2, 0, 3, 1]), 100)
    assert [sorted(lines) for lines, _ in results] == [[0], [1, 2, 3], [0], [0]]
    assert all(len(hosts) == 4 for _, hosts in results)


def test_those_that_do_not_come_are_named():
    came = call(make_places(4, [0, 2]), 1)
    for error in came:
        assert isinstance(error, RestartError)
        assert "process 1, 3 of 4 did not come" in str(error) and "2 on " in str(error)
    (error,) = call(make_places(2, [1]), 1)
    assert isinstance(error, RestartError) and "process 0 of 2 did not answer" in str(error)


def test_one_that_was_told_another_number_of_processes_is_refused():
    first, second = make_places(2, [0, 1])
    answers: list[object] = []
    calling = threading.Thread(target=lambda: answers.extend(call([first], 100)))
    calling.start()
    (refused,) = call([Place("a test", first.address, 3, 2)], 100)
    assert isinstance(refused, UserError) and "2 of 3" in str(refused)
    # The others begin nevertheless.
    (answer,) = call([second], 100)
    calling.join()
    assert sorted(answer[0]) == [0] and sorted(answers[0][0]) == [1]


def test_strangers_do_not_disturb_the_roll_call():
    first, second = make_places(2, [0, 1])
    answers: list[object] = []
    calling = threading.Thread(target=lambda: answers.extend(call([first], 100)))
    calling.start()
    with contextlib.ExitStack() as strangers:
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"number": 7}\n', b"[1]\n"):
            strangers.enter_context(connect(first.address)).sendall(words)
        (answer,) = call([second], 100)
    calling.join()
    assert sorted(answer[0]) == [0] and sorted(answers[0][0]) == [1]


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except OSError:
            time.sleep(0.05)


def test_where_one_fails_all_end_with_its_code():
    for code, output in run_several(range(3), HERE / "keeps_in_touch.py", "fails"):
        assert code == 7, output


def test_a_failure_is_heard_that_comes_right_behind_the_roll_call():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def tell_both_at_once() -> None:
            """As process 0, which tells it of a third one's failure."""
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                words = [{"present": ["a", "b", "c"]}, {"code": 7, "why": "it failed"}]
                connection.sendall(b"".join(json.dumps(each).encode() + b"\n" for each in words))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        telling = threading.Thread(target=tell_both_at_once)
        telling.start()
        address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}"}
        words = (HERE / "keeps_in_touch.py", "lives")
        ((code, output),) = run_several([1], *words, env=address, count=3)
        telling.join()
    assert code == 7 and "it failed" in output, output


def test_one_that_falls_silent_is_given_up():
    (code, output), _ = run_several(range(2), HERE / "keeps_in_touch.py", "is silent")
    assert code == RestartError.code, output
    assert "process 1 on " in output and "has not answered for 1 s" in output


def test_a_time_limit_must_be_a_number(monkeypatch):
    monkeypatch.setenv(JOIN, "soon")
    with pytest.raises(UserError, match=f"{JOIN} must be a positive number"):
        join_processes()
