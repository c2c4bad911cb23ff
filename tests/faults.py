"""Failures by script: this rank, at this step, in this way, once.

A `FailAt` sits in a module and counts the forwards of its rank. What it did, and every step of every rank, is noted in
files of a folder that outlives all processes, so that a test can tell when what happened.
"""

import ctypes
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Kind = Literal[
    "none", "raise", "linger", "exit", "sigkill", "sigstop", "sigterm", "hang", "gil", "slow", "nan", "memory",
    "executor", "host", "outside",
]  # fmt: skip
PLANTED = "planted failure"
SLOW_SECONDS = 0.05
LINGER_SECONDS = 10.0
OUTSIDE_SECONDS = 60.0


class SlowToDie:
    """Keeps the process that lets go of it alive for ten seconds."""

    def __del__(self) -> None:
        time.sleep(LINGER_SECONDS)


@dataclass
class FailAt:
    """Something that happens once, to one rank, in one of its training forwards.

    Attributes:
        rank: The rank.
        step: The forward, from 1, of the process that it happens to.
        kind: What happens. "linger" raises and stays alive for ten seconds, "gil" waits in C without letting go of
            Python's lock, "executor" kills the JVM, "host" also the standalone worker that would start another one, and
            "outside" waits until somebody else has done something (`acted`).
        folder: Where notes are kept.
        every: Let every process of the rank fail, not only the first.
        pace: Seconds that every forward of every rank takes at least.
    """

    rank: int
    step: int
    kind: Kind
    folder: str
    every: bool = False
    pace: float = 0.0
    seen: int = field(default=0, init=False)

    def __call__(self, output: Tensor) -> Tensor:
        """Take part in a training forward."""
        if not dist.is_initialized():
            return output
        self.seen += 1
        own = dist.get_rank()
        with open(Path(self.folder) / f"steps-{own}", "a") as notes:
            notes.write(f"{time.time()} {os.getpid()} {self.seen}\n")
        time.sleep(self.pace)
        if own != self.rank or self.seen < self.step:
            return output
        if self.kind == "slow":
            time.sleep(SLOW_SECONDS)
            return output
        marker = Path(self.folder) / "failed"
        if marker.exists() and not self.every:
            return output
        if self.seen == self.step:
            marker.write_text(f"{time.time()} {os.getpid()}")
            return self._fail(output)
        return output

    def _await_outside(self) -> None:
        end = time.time() + OUTSIDE_SECONDS
        while not (Path(self.folder) / "acted").exists():
            if time.time() > end:
                raise TimeoutError("nothing happened")
            time.sleep(0.01)

    def _fail(self, output: Tensor) -> Tensor:
        if self.kind == "raise":
            raise RuntimeError(PLANTED)
        if self.kind == "linger":
            error = RuntimeError(PLANTED)
            error.holder = SlowToDie()  # goes when the exception goes
            raise error
        if self.kind == "exit":
            os._exit(3)
        if self.kind in ("sigkill", "sigstop", "sigterm"):
            os.kill(os.getpid(), getattr(signal, self.kind.upper()))
        if self.kind == "hang":
            time.sleep(3600)
        if self.kind == "gil":
            ctypes.PyDLL(None).sleep(3600)
        if self.kind == "memory":
            torch.empty(1 << 60, dtype=torch.uint8)
        if self.kind in ("executor", "host"):
            for pid in java_pids()[::-1] if self.kind == "host" else java_pids()[:1]:
                os.kill(pid, signal.SIGKILL)
            time.sleep(3600)
        if self.kind == "outside":
            self._await_outside()
        return output * float("nan") if self.kind == "nan" else output


def java_pids() -> list[int]:
    """The JVMs above this process: the executor that forked its daemon, and the worker that started the executor."""
    import psutil

    return [process.pid for process in psutil.Process().parents() if process.name() == "java"]


class Fragile(nn.Module):
    """An MLP to which something happens. Wide enough for several of DDP's buckets."""

    def __init__(self, event: FailAt, width: int = 640, layers: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        inner = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Tanh(), *inner, nn.Dropout(dropout), nn.Linear(width, 1))
        self.event = event

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.layers(features)
        return self.event(output) if self.training else output


@dataclass(frozen=True)
class Step:
    """One training forward of one rank."""

    time: float
    pid: int
    number: int


def steps_of(folder: str, rank: int) -> list[Step]:
    """All training forwards of a rank, over all attempts, in order."""
    path = Path(folder) / f"steps-{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [Step(float(when), int(pid), int(number)) for when, pid, number in (line.split() for line in lines)]


def failed_at(folder: str) -> float:
    """When it happened, in seconds since the epoch; where it happened outside of the rank, when that was done."""
    acted, failed = Path(folder) / "acted", Path(folder) / "failed"
    return float((acted if acted.exists() else failed).read_text().split()[0])


def acted(folder: str) -> None:
    """Note that what an event of kind "outside" waits for has been done."""
    partial = Path(folder) / "acted.partial"
    partial.write_text(str(time.time()))
    partial.rename(Path(folder) / "acted")
