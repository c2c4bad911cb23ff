"""A rank that makes no progress: when it ends, and what the driver hears of it. Ranks are processes here."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
import pytest

from sparkdl.barrier.channel import ChannelAddress, Event, RankChannel, open_channel
from sparkdl.barrier.watchdog import ProgressClock, Watchdog, where
from sparkdl.config import Timeouts

pytestmark = pytest.mark.timeout(120)

PATIENCE = 60.0
HUNG = 75  # the exit code

RANK = """
import ctypes, sys, time
from datetime import timedelta
from sparkdl.barrier.channel import ChannelAddress, RankChannel
from sparkdl.barrier.watchdog import ProgressClock, Watchdog
from sparkdl.config import Timeouts

port, secret, rank, phase, act = sys.argv[1:]
address = ChannelAddress("127.0.0.1", int(port), bytes.fromhex(secret)) if int(port) else None
channel = RankChannel(address, rank=int(rank), host="here", attempt=2)
clock = ProgressClock()
second = timedelta(seconds=1)

def stuck_in_a_call():
    time.sleep(300)

def stuck_with_the_lock():
    time.sleep(0.9)  # the watchdog has looked by then
    ctypes.PyDLL(None).sleep(300)  # a call into C that keeps Python's lock

def goes_on():
    for step in range(40):
        clock.at("compute", step)
        time.sleep(0.1)

def waits():
    time.sleep(3)

with Watchdog(
    clock, channel, rank=int(rank), host="here", attempt=2, timeouts=Timeouts(step=second, checkpoint=8 * second)
):
    if phase != "setup":
        clock.at(phase, 16)
    globals()[act]()
channel.close()
"""


@dataclass
class Child:
    """A rank in a process of its own, and what the driver heard of it."""

    process: subprocess.Popen[str]
    began: float = field(default_factory=time.monotonic)
    events: list[Event] = field(default_factory=list)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]


SCRIPTED = {
    "compute": ("compute", "stuck_in_a_call"),
    "reduce": ("reduce", "stuck_in_a_call"),
    "lock": ("compute", "stuck_with_the_lock"),
    "setup": ("setup", "waits"),
    "done": ("done", "waits"),
    "checkpoint": ("checkpoint", "waits"),
    "steps": ("compute", "goes_on"),
    "stopped": ("compute", "goes_on"),
}


def start(address: ChannelAddress | None, rank: int, phase: str, act: str) -> Child:
    where_to = (str(address.port), address.secret.hex()) if address else ("0", "00")
    return Child(
        subprocess.Popen(
            [sys.executable, "-c", RANK, *where_to, str(rank), phase, act],
            stderr=subprocess.PIPE,
            text=True,
        )
    )


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[str, Child]]:
    """All scripted ranks, which ran at the same time, once all have ended."""
    heard: queue.Queue[Event] = queue.Queue()
    with open_channel("127.0.0.1", heard.put) as address:
        assert address is not None
        found = {name: start(address, rank, *script) for rank, (name, script) in enumerate(SCRIPTED.items())}
        children = list(found.values())
        stopped = False
        while any(child.process.poll() is None for child in children):
            with contextlib.suppress(queue.Empty):
                event = heard.get(timeout=0.5)
                children[event["rank"]].events.append(event)
            if not stopped and found["stopped"].events:
                stopped = True
                psutil.Process(found["stopped"].process.pid).suspend()
                threading.Timer(3.0, psutil.Process(found["stopped"].process.pid).resume).start()
            if time.monotonic() > children[0].began + PATIENCE:
                for child in children:
                    child.process.kill()
    while not heard.empty():
        event = heard.get()
        children[event["rank"]].events.append(event)
    yield found
    for child in children:
        child.process.communicate(timeout=PATIENCE)


# ---- what hangs ------------------------------------------------------------------------------------------------------
def test_a_rank_that_hangs_says_where_and_ends(ranks: dict[str, Child]) -> None:
    child = ranks["compute"]
    assert child.process.returncode == HUNG
    (failure,) = child.of("failure")
    assert (failure["kind"], failure["rank"], failure["attempt"], failure["step"]) == ("Hang", 0, 2, 16)
    assert re.match(r"no progress for [1-5] s in step 17, phase compute$", failure["message"])
    assert failure["traceback"].startswith("Thread MainThread, most recent call last:")
    assert "in stuck_in_a_call" in failure["traceback"]
    assert "sparkdl-channel-send" in failure["traceback"], "the other threads are missing"
    assert not failure["consequence"]
    assert failure["phase"] == "compute"
    assert failure["waited"] >= 1


def test_a_rank_that_waits_for_others_is_no_cause(ranks: dict[str, Child]) -> None:
    (failure,) = ranks["reduce"].of("failure")
    assert failure["consequence"]
    assert failure["phase"] == "reduce"
    assert ranks["reduce"].process.returncode == HUNG


def test_a_thread_that_keeps_pythons_lock_ends_as_well(ranks: dict[str, Child]) -> None:
    child = ranks["lock"]
    assert child.process.returncode == 1
    assert not child.of("failure"), "nobody could report"
    assert child.of("gone"), "its end was not noticed"


def test_the_executors_log_has_the_stacks_also_without_a_driver() -> None:
    child = start(None, 4, "compute", "stuck_in_a_call")
    _, told = child.process.communicate(timeout=PATIENCE)
    assert child.process.returncode == HUNG
    assert "rank 4: no progress for" in told
    assert "in stuck_in_a_call" in told


# ---- what does not ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["setup", "done", "checkpoint", "steps", "stopped"])
def test_what_has_time_or_makes_progress_goes_on(ranks: dict[str, Child], name: str) -> None:
    """Also a process that was stopped for longer than a step may take, and woke up."""
    assert ranks[name].process.returncode == 0
    assert not ranks[name].of("failure")
    assert not ranks[name].of("gone"), "it said goodbye"


def test_a_rank_that_is_alive_says_so_once_a_second(ranks: dict[str, Child]) -> None:
    beats = ranks["steps"].of("alive")
    assert 2 <= len(beats) <= 10
    assert {beat["phase"] for beat in beats} == {"compute"}
    steps = [beat["step"] for beat in beats]
    assert steps == sorted(steps)
    assert all(beat["since"] < 1 for beat in beats)


# ---- in this process -------------------------------------------------------------------------------------------------
def test_nothing_is_left_after_the_block() -> None:
    before = threading.enumerate()
    channel = RankChannel(None, rank=0, host="h")
    with watch(ProgressClock(), channel):
        assert "sparkdl-watchdog" in {thread.name for thread in threading.enumerate()}
    assert threading.enumerate() == before


def watch(clock: ProgressClock, channel: RankChannel) -> Watchdog:
    return Watchdog(clock, channel, rank=0, host="h", attempt=1, timeouts=Timeouts(step=timedelta(seconds=60)))


def test_the_clock_costs_the_training_nothing() -> None:
    clock = ProgressClock()
    number = 20_000
    seconds = min(timeit.repeat(lambda: clock.at("compute", 3), number=number, repeat=10)) / number
    assert seconds < 1e-6
    assert (clock.place.phase, clock.place.step) == ("compute", 3)


def test_a_clock_starts_with_the_setup() -> None:
    assert ProgressClock().place.phase == "setup"
    assert where("setup", 0) == "in phase setup"


def test_children_of_this_test_are_gone(ranks: dict[str, Child]) -> None:
    assert not [child for child in ranks.values() if child.process.poll() is None]
    with pytest.raises(ProcessLookupError):
        os.kill(ranks["compute"].process.pid, signal.SIG_DFL)
