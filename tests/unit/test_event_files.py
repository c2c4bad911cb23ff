"""Events as files where no connection comes about, and what ranks log."""

import contextlib
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparkdl.barrier.channel import ChannelAddress, Event, RankChannel
from sparkdl.barrier.event_files import EventFiles, poll_event_files
from sparkdl.barrier.rank_log import forwarded_logs

pytestmark = pytest.mark.timeout(60)

PATIENCE = 15.0


@contextlib.contextmanager
def driver(folder: str, world_size: int = 2, is_silent: Callable[[int], bool] = lambda rank: True) -> Iterator[Any]:
    """A driver that looks at files alone."""
    heard: queue.Queue[Event] = queue.Queue()
    with poll_event_files(folder, attempt=1, world_size=world_size, on_event=heard.put, is_silent=is_silent):
        yield heard
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sparkdl")]


def nobody() -> ChannelAddress:
    """Where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return ChannelAddress("127.0.0.1", server.getsockname()[1], b"key")


def rank_at(address: ChannelAddress | None, folder: str, rank: int = 1) -> contextlib.closing[RankChannel]:
    return contextlib.closing(RankChannel(address, rank=rank, host="far", attempt=1, directory=folder))


# ---- where the driver cannot be reached ------------------------------------------------------------------------------
@pytest.mark.parametrize("address", [None, nobody()], ids=["no address", "nothing listens"])
def test_events_come_through_the_directory(folder: str, address: ChannelAddress | None) -> None:
    with driver(folder) as heard, rank_at(address, folder) as channel:
        for step in range(30):
            channel.send("step", step=step)
        assert [heard.get(timeout=PATIENCE)["step"] for _ in range(30)] == list(range(30))
        channel.send("failure", message="planted")
        began = time.monotonic()
        assert channel.flush(PATIENCE)
        assert time.monotonic() - began < 0.9, "failures do not wait for their turn"
        assert heard.get(timeout=PATIENCE) == {
            "event": "failure", "rank": 1, "host": "far", "attempt": 1, "message": "planted",
        }  # fmt: skip


def test_a_port_that_accepts_and_never_answers_sends_events_to_the_directory(folder: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, driver(folder) as heard:
        address = ChannelAddress("127.0.0.1", silent.getsockname()[1], b"key")
        with rank_at(address, folder) as channel:
            began = time.monotonic()
            channel.send("step", step=1)
            assert time.monotonic() - began < 0.5, "the rank waited"
            assert heard.get(timeout=PATIENCE)["step"] == 1


def test_few_files_carry_many_events_and_all_are_read_at_the_end(folder: str) -> None:
    with driver(folder, is_silent=lambda rank: False) as heard:
        with rank_at(None, folder) as channel:
            for step in range(400):
                channel.send("step", step=step)
                time.sleep(0.005)
        assert heard.empty(), "nobody asked for the files of a rank that is heard"
    assert [heard.get_nowait()["step"] for _ in range(400)] == list(range(400))
    assert heard.empty()
    assert len(list(Path(folder).glob("events/1-1-*.jsonl"))) <= 6


def test_events_of_another_attempt_are_not_read(folder: str) -> None:
    EventFiles(folder, attempt=2, rank=0).write([b'{"event": "late"}'])
    EventFiles(folder, attempt=11, rank=0).write([b'{"event": "later"}'])
    EventFiles(folder, attempt=1, rank=0).write([b'{"event": "now"}'])
    with driver(folder) as heard:
        pass
    assert heard.get_nowait() == {"event": "now"}
    assert heard.empty()


def test_a_file_that_is_being_written_is_read_when_it_is_whole(folder: str) -> None:
    path = Path(folder) / "events" / "1-0-0.jsonl"
    path.parent.mkdir()
    path.write_text('{"event": "first"}\n')
    with driver(folder) as heard:
        with pytest.raises(queue.Empty):
            heard.get(timeout=2.5)
        path.write_text('{"event": "first"}\n{"event": "second"}\n{"event": "end"}\n')
        assert [heard.get(timeout=PATIENCE)["event"] for _ in range(2)] == ["first", "second"]


def test_garbage_in_a_file_does_no_harm(folder: str) -> None:
    writer = EventFiles(folder, attempt=1, rank=0)
    writer.write([b"\xff\xfe", b"[1]", b"{", b"null", b'{"event": "good"}'])
    with driver(folder) as heard:
        assert heard.get(timeout=PATIENCE) == {"event": "good"}
    assert heard.empty()


def test_a_directory_that_cannot_be_written_costs_a_rank_nothing() -> None:
    began = time.monotonic()
    with rank_at(nobody(), "/proc/none") as channel:
        for step in range(5000):
            channel.send("step", step=step)
        channel.send("failure", message="planted")
        assert not channel.flush(PATIENCE)
    assert time.monotonic() - began < 5


def test_a_directory_that_cannot_be_read_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with driver("nosuchscheme://nowhere/run"):
        time.sleep(2.2)  # two polls and the last one
    assert len([record for record in caplog.records if "events of ranks cannot be read" in record.message]) == 1


def test_every_file_stands_for_itself_and_is_removed_when_the_driver_ends(folder: str) -> None:
    with driver(folder) as heard, rank_at(None, folder, rank=0) as channel:
        channel.send("plan", steps=3)
        assert heard.get(timeout=PATIENCE)["steps"] == 3
        (path,) = Path(folder).glob("events/*")
        assert path.name == "1-0-0.jsonl"
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["plan", "end"]
    assert not Path(folder, "events").exists()


# ---- logs ------------------------------------------------------------------------------------------------------------
def collected(level: int, act: Callable[[], None]) -> list[Event]:
    lines: list[Event] = []
    with forwarded_logs(lambda event, **fields: lines.append({"event": event, **fields}), level=level):
        act()
    return lines


def test_lines_from_a_level_on_are_sent() -> None:
    logger = logging.getLogger("sparkdl.io.cache")

    def act() -> None:
        logger.info("quiet")
        logger.warning("%d of %s", 3, "four")

    line = {"event": "log", "level": logging.WARNING, "logger": "sparkdl.io.cache", "message": "3 of four"}
    assert collected(logging.WARNING, act) == [line]
    assert [found["message"] for found in collected(logging.INFO, act)] == ["quiet", "3 of four"]


def test_the_logger_is_left_as_it_was() -> None:
    logger = logging.getLogger("sparkdl")
    before = (logger.level, list(logger.handlers))
    collected(logging.INFO, lambda: None)
    assert (logger.level, list(logger.handlers)) == before


def test_what_is_too_much_is_counted() -> None:
    logger = logging.getLogger("sparkdl.loud")
    lines = collected(logging.WARNING, lambda: [logger.warning("line %d", number) for number in range(1000)] and None)
    left_out = sum(int(line["message"].split()[0]) for line in lines if "were left out" in line["message"])
    shown = [line for line in lines if "were left out" not in line["message"]]
    assert len(shown) + left_out == 1000
    assert len(shown) <= 300


def test_a_line_that_cannot_be_formatted_or_is_endless_is_sent_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("sparkdl"), "propagate", False)  # pytest's own handler would raise
    logger = logging.getLogger("sparkdl.odd")

    def act() -> None:
        logger.warning("%d", "no number")
        logger.warning("x" * 100_000)

    lines = collected(logging.WARNING, act)
    assert lines[0]["message"] == "%d"
    assert len(lines[1]["message"]) == 8000
