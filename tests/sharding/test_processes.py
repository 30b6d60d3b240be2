"""Several processes as one program."""

import threading
from pathlib import Path

import pytest
from several import free_port, run_pair, run_several

from instar.errors import RestartError, UserError
from instar.sharding import peers
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
    results = call(make_places(4, [2, 0, 3, 1]), 20)
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
    other = Place("a test", first.address, 3, 2)
    results = call([first, other, second], 20)
    assert isinstance(results[1], UserError) and "of 3" in str(results[1])
    assert not isinstance(results[0], Exception) and not isinstance(results[2], Exception)


def test_strangers_do_not_disturb_the_roll_call(monkeypatch):
    places = make_places(2, [0, 1])
    host, port = places[0].address.split(":")
    late = threading.Timer(1, lambda: None)
    original = peers._call_in

    def after_strangers(place, seconds):
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"number": 7}\n', b"[1]\n"):
            stranger = connect(host, int(port))
            stranger.sendall(words)
            strangers.append(stranger)
        late.start()
        late.join()
        return original(place, seconds)

    strangers: list = []
    monkeypatch.setattr(peers, "_call_in", after_strangers)
    results = call(places, 20)
    assert [sorted(lines) for lines, _ in results] == [[1], [0]]
    for stranger in strangers:
        stranger.close()


def connect(host: str, port: int):
    import socket
    import time

    while True:
        try:
            return socket.create_connection((host, port))
        except OSError:
            time.sleep(0.05)


def test_where_one_fails_all_end_with_its_code():
    for code, output in run_several(range(3), HERE / "keeps_in_touch.py", "fails"):
        assert code == 7, output


def test_one_that_falls_silent_is_given_up():
    (code, output), _ = run_several(range(2), HERE / "keeps_in_touch.py", "is silent")
    assert code == RestartError.code, output
    assert "process 1 on " in output and "has not answered for 1 s" in output


def test_a_time_limit_must_be_a_number(monkeypatch):
    monkeypatch.setenv(JOIN, "soon")
    with pytest.raises(UserError, match=f"{JOIN} must be a positive number"):
        join_processes()
