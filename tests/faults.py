"""Failures by script: this rank, at this step, in this way, once.

A `FailAt` sits in a module and counts the forwards of its rank. What it did, and every step of every rank, is noted in
files of a folder that outlives all processes, so that a test can tell when what happened.
"""

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Kind = Literal["none", "raise", "exit", "sigkill", "sigstop", "sigterm", "hang", "slow", "nan", "memory", "executor"]
PLANTED = "planted failure"
SLOW_SECONDS = 0.05


@dataclass
class FailAt:
    """Something that happens once, to one rank, in one of its training forwards.

    Attributes:
        rank: The rank.
        step: The forward, from 1, of the process that it happens to.
        kind: What happens.
        folder: Where notes are kept.
        every: Let every process of the rank fail, not only the first.
    """

    rank: int
    step: int
    kind: Kind
    folder: str
    every: bool = False
    seen: int = field(default=0, init=False)

    def __call__(self, output: Tensor) -> Tensor:
        """Take part in a training forward."""
        if not dist.is_initialized():
            return output
        self.seen += 1
        own = dist.get_rank()
        with open(Path(self.folder) / f"steps-{own}", "a") as notes:
            notes.write(f"{time.time()} {os.getpid()} {self.seen}\n")
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

    def _fail(self, output: Tensor) -> Tensor:
        if self.kind == "raise":
            raise RuntimeError(PLANTED)
        if self.kind == "exit":
            os._exit(3)
        if self.kind in ("sigkill", "sigstop", "sigterm"):
            os.kill(os.getpid(), getattr(signal, self.kind.upper()))
        if self.kind == "hang":
            time.sleep(3600)
        if self.kind == "memory":
            torch.empty(1 << 60, dtype=torch.uint8)
        if self.kind == "executor":
            os.kill(executor_pid(), signal.SIGKILL)
            time.sleep(3600)
        return output * float("nan") if self.kind == "nan" else output


def executor_pid() -> int:
    """The JVM whose task this process runs: the parent of the daemon that forked it."""
    import psutil

    process = psutil.Process()
    while process.name() != "java":
        process = process.parent()
    return process.pid


class Fragile(nn.Module):
    """An MLP to which something happens. Wide enough for several of DDP's buckets."""

    def __init__(self, event: FailAt, width: int = 640, layers: int = 3) -> None:
        super().__init__()
        inner = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Tanh(), *inner, nn.Dropout(0.2), nn.Linear(width, 1))
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
    """When it happened, in seconds since the epoch."""
    return float((Path(folder) / "failed").read_text().split()[0])
