"""The channel from ranks to driver: ordered, closed to strangers, and never in the way of a run."""

import contextlib
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import pytest

from sparkdl.barrier.channel import ChannelAddress, Event, RankChannel, local_address, open_channel

pytestmark = pytest.mark.timeout(60)

PATIENCE = 10.0  # seconds until an event that must come is given up
PROMPT = 3.0  # seconds that nothing here may take, strangers or not; less than the time limit of a handshake


class Driver:
    """A driver's end: collects what it hears."""

    def __init__(self, address: ChannelAddress) -> None:
        self.address = address
        self.heard: queue.Queue[Event] = queue.Queue()

    def next(self, timeout: float = PATIENCE) -> Event:
        return self.heard.get(timeout=timeout)

    @property
    def place(self) -> tuple[str, int]:
        return self.address.host, self.address.port

    def rank(self, number: int = 0) -> contextlib.closing[RankChannel]:
        return contextlib.closing(RankChannel(self.address, rank=number, host=f"host{number}"))


@contextlib.contextmanager
def driver_on(host: str) -> Iterator[Driver]:
    heard: list[Driver] = []
    with open_channel(host, lambda event: heard[0].heard.put(event)) as address:
        assert address is not None
        heard.append(Driver(address))
        yield heard[0]


@pytest.fixture
def driver() -> Iterator[Driver]:
    with driver_on("127.0.0.1") as found:
        yield found


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Whatever a test does, no thread of the channel outlives it, whatever its name."""
    before = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - before


# ---- events ----------------------------------------------------------------------------------------------------------
def test_events_arrive_in_order_with_rank_and_host(driver: Driver) -> None:
    with driver.rank(3) as channel:
        for step in range(500):
            channel.send("step", step=step, loss=1 / (step + 1))
        for step in range(500):
            assert driver.next() == {
                "event": "step",
                "rank": 3,
                "host": "host3",
                "attempt": 1,
                "step": step,
                "loss": 1 / (step + 1),
            }


def test_the_events_of_each_of_many_ranks_arrive_in_order(driver: Driver) -> None:
    ranks, steps = 12, 40

    def report(rank: int) -> None:
        with driver.rank(rank) as channel:
            for step in range(steps):
                channel.send("step", step=step)

    threads = [threading.Thread(target=report, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {rank: [] for rank in range(ranks)}
    for _ in range(ranks * steps):
        event = driver.next()
        seen[event["rank"]].append(event["step"])
    for thread in threads:
        thread.join()
    assert seen == {rank: list(range(steps)) for rank in range(ranks)}


def test_the_last_words_of_a_rank_are_heard_although_it_is_gone_when_the_driver_closes() -> None:
    for _ in range(10):
        with driver_on("127.0.0.1") as driver, driver.rank() as channel:
            channel.send("failure", message="planted")
        assert driver.heard.qsize() == 1


def test_large_and_foreign_text_arrives_whole(driver: Driver) -> None:
    text = "Zürich 数 \n\0 \ud800 " + "x" * 3_000_000
    with driver.rank() as channel:
        channel.send("failure", traceback=text)
        assert driver.next()["traceback"] == text


def test_an_event_that_cannot_be_shown_does_not_stop_the_next() -> None:
    heard: queue.Queue[Event] = queue.Queue()

    def show(event: Event) -> None:
        if event["event"] == "bad":
            raise RuntimeError("planted")
        heard.put(event)

    with open_channel("127.0.0.1", show) as address, contextlib.closing(RankChannel(address, rank=0, host="h")) as rank:
        rank.send("bad")
        rank.send("good")
        assert heard.get(timeout=PATIENCE)["event"] == "good"


def test_without_an_address_nothing_is_sent() -> None:
    channel = RankChannel(None, rank=0, host="h")
    channel.send("step", step=1)
    channel.close()


def test_a_field_that_is_no_json_never_raises(driver: Driver) -> None:
    with driver.rank() as channel:
        channel.send("step", loss=object())
    with driver.rank(1) as channel:
        channel.send("good")
        assert driver.next()["event"] == "good"


def test_the_address_can_be_printed_without_its_secret() -> None:
    address = ChannelAddress("127.0.0.1", 1, b"hush hush")
    assert "hush" not in repr(address)
    assert pickle.loads(pickle.dumps(address)) == address


def test_every_channel_has_a_secret_of_its_own() -> None:
    with driver_on("127.0.0.1") as first, driver_on("127.0.0.1") as second:
        assert first.address.secret != second.address.secret
        assert len(first.address.secret) >= 32


# ---- strangers -------------------------------------------------------------------------------------------------------
def send_raw(driver: Driver, content: bytes) -> socket.socket:
    """A connection that says something without waiting to be asked."""
    line = socket.create_connection(driver.place, timeout=PATIENCE)
    with contextlib.suppress(OSError):
        line.sendall(content)
    return line


def check_a_real_rank_is_heard(driver: Driver) -> None:
    started = time.monotonic()
    with driver.rank() as channel:
        channel.send("real")
        assert driver.next()["event"] == "real"
    assert time.monotonic() - started < PROMPT


JSON_MESSAGE = b'{"event": "failure", "rank": 0, "host": "h", "message": "forged"}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: driver\r\n\r\n",
        b"\x00" * 4096,
        bytes(range(256)) * 16,
        b"\x7f\xff\xff\xff" + b"x" * 100,
        b"\xff\xff\xff\xff" + (2**62).to_bytes(8, "big"),
        len(JSON_MESSAGE).to_bytes(4, "big") + JSON_MESSAGE,
        b"\x00\x00",
    ],
    ids=["nothing", "http", "zeros", "all bytes", "a giant message", "an endless message", "an event", "half a header"],
)
@pytest.mark.parametrize("stays", [False, True], ids=["leaves", "stays"])
def test_a_stranger_is_not_heard_and_does_no_harm(driver: Driver, content: bytes, stays: bool) -> None:
    with send_raw(driver, content) as line:
        if not stays:
            line.close()
        check_a_real_rank_is_heard(driver)
    assert driver.heard.empty()


def test_a_stranger_with_another_key_is_refused(driver: Driver) -> None:
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        Client(driver.place, authkey=b"another key").close()
    with contextlib.closing(RankChannel(replace(driver.address, secret=b"guessed"), rank=0, host="h")) as guesser:
        guesser.send("forged")
    check_a_real_rank_is_heard(driver)
    assert driver.heard.empty()


def test_strangers_who_connect_and_stay_silent_hold_up_nobody(driver: Driver) -> None:
    with contextlib.ExitStack() as lines:
        for _ in range(30):
            lines.enter_context(send_raw(driver, b""))
        check_a_real_rank_is_heard(driver)


def test_a_rank_that_is_connected_is_heard_through_a_flood_of_strangers(driver: Driver) -> None:
    with driver.rank() as channel:
        channel.send("before")
        for _ in range(60):
            send_raw(driver, b"\x00\x00\x00\x05hello").close()
        channel.send("after")
        assert [driver.next()["event"], driver.next()["event"]] == ["before", "after"]


class Harmful:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_nothing_that_is_sent_is_unpickled_or_stops_the_others(driver: Driver, tmp_path: Path) -> None:
    """Not even by someone who has the key."""
    trace = tmp_path / "unpickled"
    for content in (
        pickle.dumps(Harmful(trace)),
        b"[1, 2]",
        b"3",
        b'"text"',
        b"null",
        b"{",
        b"",
        b"\xff\xfe",
        b"[" * 9000,
    ):
        with Client(driver.place, authkey=driver.address.secret) as connection, contextlib.suppress(OSError):
            connection.send_bytes(content)
            connection.send(Harmful(trace))
        check_a_real_rank_is_heard(driver)
    assert not trace.exists()


# ---- closing ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("company", ["nobody", "a rank", "strangers", "a rank and strangers"])
def test_closing_leaves_no_thread_also_with_strangers_on_the_line(company: str) -> None:
    before = set(threading.enumerate())
    with contextlib.ExitStack() as lines:
        with driver_on("127.0.0.1") as driver:
            assert len(set(threading.enumerate()) - before) >= 1
            if "rank" in company:
                channel = lines.enter_context(driver.rank())
                channel.send("hello")
                driver.next()
            if "strangers" in company:
                for _ in range(3):
                    lines.enter_context(send_raw(driver, b""))
            started = time.monotonic()
        assert time.monotonic() - started < PROMPT
        assert {thread.name for thread in set(threading.enumerate()) - before} <= {"sparkdl-channel-send"}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(driver.place, timeout=PATIENCE)


def test_a_run_that_fails_closes_the_channel() -> None:
    with pytest.raises(RuntimeError, match="planted"), driver_on("127.0.0.1") as driver:
        raise RuntimeError("planted")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(driver.place, timeout=PATIENCE)


def test_a_rank_whose_driver_has_gone_goes_on() -> None:
    with driver_on("127.0.0.1") as driver:
        channel = RankChannel(driver.address, rank=0, host="h")
        channel.send("hello")
        driver.next()
    for step in range(100):
        channel.send("step", step=step)
    channel.close()


# ---- where it listens ------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
def test_the_driver_listens_on_one_interface_alone() -> None:
    with driver_on("127.0.0.2") as driver:
        assert driver.address.host == "127.0.0.2"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", driver.address.port), timeout=PATIENCE)
        check_a_real_rank_is_heard(driver)


def test_the_channel_works_over_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with driver_on("::1") as driver:
        check_a_real_rank_is_heard(driver)


def test_a_driver_that_cannot_listen_says_so_once_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with open_channel("203.0.113.7", lambda event: None) as address:
        assert address is None
    assert "no progress from ranks: the driver cannot listen on 203.0.113.7" in caplog.text


@pytest.mark.parametrize(
    ("peer", "own"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("no.such.host.invalid", "127.0.0.1")]
)
def test_the_own_address_is_the_one_from_which_a_peer_is_reached(peer: str, own: str) -> None:
    if ":" in peer and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    assert local_address(peer) == own


# ---- an unreachable driver -------------------------------------------------------------------------------------------
def cost(address: ChannelAddress, events: int = 20) -> float:
    """Seconds that a rank loses by sending events."""
    started = time.monotonic()
    with contextlib.closing(RankChannel(address, rank=0, host="h")) as channel:
        for step in range(events):
            channel.send("step", step=step)
    return time.monotonic() - started


def test_a_driver_that_does_not_listen_costs_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert cost(ChannelAddress("127.0.0.1", port, b"key")) < 1


def test_a_driver_that_says_nothing_costs_a_rank_some_seconds_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert cost(ChannelAddress("127.0.0.1", silent.getsockname()[1], b"key")) < 12


def test_a_driver_that_hangs_up_costs_nothing() -> None:
    def hang_up() -> None:
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=hang_up)
        thread.start()
        assert cost(ChannelAddress("127.0.0.1", server.getsockname()[1], b"key")) < 1
        server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=PATIENCE)


def test_a_host_without_a_name_costs_a_rank_some_seconds_once() -> None:
    assert cost(ChannelAddress("no.such.host.invalid", 9, b"key")) < 12


# ---- a driver that stops, or comes back ------------------------------------------------------------------------------
DRIVER = """
import json, sys
from sparkdl.barrier.channel import open_channel
with open_channel("127.0.0.1", lambda event: print(json.dumps(event), flush=True)) as address:
    print(address.port, address.secret.hex(), flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def driver_process() -> Iterator[tuple[subprocess.Popen[str], ChannelAddress]]:
    """A driver that can be stopped."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout is not None
        port, secret = process.stdout.readline().split()
        yield process, ChannelAddress("127.0.0.1", int(port), bytes.fromhex(secret))
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def test_a_driver_that_is_stopped_holds_up_nobody_and_hears_of_the_failure_when_it_goes_on() -> None:
    with driver_process() as (process, address), contextlib.closing(RankChannel(address, rank=0, host="h")) as channel:
        assert process.stdout is not None
        channel.send("before")
        assert json.loads(process.stdout.readline())["event"] == "before"
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        channel.send("failure", message="planted")
        for step in range(20_000):
            channel.send("step", step=step, text="x" * 1000)
        assert time.monotonic() - began < PROMPT, "the rank waited for its driver"
        assert not channel.flush(0.2)
        os.kill(process.pid, signal.SIGCONT)
        assert json.loads(process.stdout.readline())["event"] == "failure"
        steps = [json.loads(process.stdout.readline())["step"]]
        while steps[-1] < 19_999:
            steps.append(json.loads(process.stdout.readline())["step"])
        assert steps == sorted(steps)
        assert len(steps) < 20_000, "what waited was not bounded"


def test_closing_does_not_wait_for_a_driver_that_is_stopped() -> None:
    with driver_process() as (process, address):
        channel = RankChannel(address, rank=0, host="h")
        channel.send("before")
        assert channel.flush(PATIENCE)
        os.kill(process.pid, signal.SIGSTOP)
        for step in range(1000):
            channel.send("step", step=step, text="x" * 20_000)
        began = time.monotonic()
        channel.close()
        assert time.monotonic() - began < 6


def test_a_driver_that_comes_back_hears_of_the_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with contextlib.closing(RankChannel(ChannelAddress("127.0.0.1", port, b"key"), rank=0, host="h")) as channel:
        channel.send("failure", message="planted")
        assert not channel.flush(PATIENCE)
        with Listener(("127.0.0.1", port), authkey=b"key") as late, late.accept() as connection:
            assert json.loads(connection.recv_bytes())["message"] == "planted"


def test_failures_are_kept_and_the_oldest_progress_is_forgotten() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with contextlib.closing(RankChannel(ChannelAddress("127.0.0.1", port, b"key"), rank=0, host="h")) as channel:
        channel.send("failure", message="planted")
        for step in range(3000):
            channel.send("step", step=step)
        with Listener(("127.0.0.1", port), authkey=b"key") as late, late.accept() as connection:
            heard = [json.loads(connection.recv_bytes()) for _ in range(1000)]
    assert heard[0]["event"] == "failure"
    assert [event["step"] for event in heard[1:]] == list(range(2001, 3000))


def test_an_event_after_the_end_is_not_sent(driver: Driver) -> None:
    channel = RankChannel(driver.address, rank=0, host="h")
    channel.send("last")
    channel.close()
    channel.send("after")
    channel.close()
    assert driver.next()["event"] == "last"
    with pytest.raises(queue.Empty):
        driver.next(timeout=0.3)


def test_several_threads_may_send(driver: Driver) -> None:
    with driver.rank() as channel:

        def report(number: int) -> None:
            for step in range(100):
                channel.send("step", thread=number, step=step)

        threads = [threading.Thread(target=report, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        events = [driver.next() for _ in range(800)]
        for thread in threads:
            thread.join()
    for number in range(8):
        assert [event["step"] for event in events if event["thread"] == number] == list(range(100))


def test_a_rank_that_ends_without_a_goodbye_is_noticed(driver: Driver) -> None:
    with Client(driver.place, authkey=driver.address.secret) as connection:
        connection.send_bytes(b'{"event": "step", "rank": 7, "host": "far"}')
        assert driver.next()["event"] == "step"
    assert driver.next() == {"event": "gone", "rank": 7, "host": "far"}
    with driver.rank(1) as channel:
        channel.send("step")
        assert driver.next()["event"] == "step"
    with pytest.raises(queue.Empty):
        driver.next(timeout=0.3)


def test_a_rank_that_stops_in_the_middle_of_an_event_holds_up_nobody(driver: Driver) -> None:
    with Client(driver.place, authkey=driver.address.secret) as connection, driver.rank() as channel:
        os.write(connection.fileno(), (1000).to_bytes(4, "big") + b"{")
        channel.send("step")
        assert driver.next()["event"] == "step"
