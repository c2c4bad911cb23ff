"""One rank inside its barrier task: who it is, what it was given, how it meets the others."""

import contextlib
import logging
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch

from sparkdl.barrier.channel import ChannelAddress, RankChannel, local_address
from sparkdl.barrier.process_group import is_communication_error, process_group
from sparkdl.barrier.rank_log import forwarded_logs
from sparkdl.barrier.rendezvous import Entry, agree, bind_store, find_versions
from sparkdl.barrier.watchdog import ProgressClock, Watchdog
from sparkdl.barrier.world import World, world_of
from sparkdl.config import Timeouts
from sparkdl.errors import Failure, LaunchError, TrainingFailedError

__all__ = ["RankContext"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LINGER_SECONDS = 2.0
_SEND_SECONDS = 5.0


@dataclass(slots=True)
class RankContext:
    """What a barrier task knows of itself.

    Attributes:
        world: Its place among the ranks.
        run_id: Identifies the run.
        channel: Its line to the driver.
        task_cpus: Cores that Spark gave the task.
        gpu_addresses: GPUs that Spark gave the task.
        all_gather: Spark's barrier all-gather of one string per rank.
        attempt: How often the run was started, this time included.
        timeouts: How long the rank waits, by what it waits for.
        clock: Where the rank is; whoever trains moves it, and a watchdog looks at it.
        refused: True where all ranks raise the same error, see `unanimously`.
    """

    world: World
    run_id: str
    channel: RankChannel
    task_cpus: int
    gpu_addresses: tuple[str, ...]
    all_gather: Callable[[str], Sequence[str]]
    attempt: int = 1
    timeouts: Timeouts = field(default_factory=Timeouts)
    clock: ProgressClock = field(default_factory=ProgressClock)
    refused: bool = False
    _listener: socket.socket | None = None
    _store: tuple[str, int] | None = None

    @classmethod
    def of_barrier_task(
        cls,
        run_id: str,
        channel: ChannelAddress | None,
        *,
        attempt: int = 1,
        timeouts: Timeouts | None = None,
        directory: str | None = None,
    ) -> "RankContext":
        """The rank of the barrier task that this Python worker runs.

        Args:
            run_id: Identifies the run.
            channel: Where the driver listens.
            attempt: How often the run was started, this time included.
            timeouts: How long the rank waits; None for the defaults.
            directory: URL of a directory that the driver reaches as well, for what cannot be sent to it.
        """
        from pyspark import BarrierTaskContext

        task = BarrierTaskContext.get()
        addresses = [info.address for info in task.getTaskInfos()]
        world = world_of(task.partitionId(), addresses)
        gpu = task.resources().get("gpu")
        return cls(
            world=world,
            run_id=run_id,
            channel=RankChannel(
                channel, rank=world.rank, host=world.hosts[world.rank], attempt=attempt, directory=directory
            ),
            task_cpus=task.cpus(),
            gpu_addresses=tuple(gpu.addresses) if gpu else (),
            all_gather=task.allGather,
            attempt=attempt,
            timeouts=timeouts or Timeouts(),
        )

    def check_world_size(self, asked: int) -> None:
        """Make sure that Spark started as many barrier tasks as were asked for.

        Raises:
            LaunchError: It did not.
        """
        if self.world.world_size != asked:
            raise LaunchError(
                f"{asked} barrier tasks were asked for, but Spark started {self.world.world_size}. "
                "Was the DataFrame repartitioned after it was handed over?"
            )

    @property
    def address(self) -> str:
        """The address of this host at which the other ranks reach it."""
        if self.world.one_host:
            return "127.0.0.1"
        peer = next(host for host in self.world.hosts if host != self.world.hosts[self.world.rank])
        return local_address(peer)

    def agree(self, prepare: Callable[[], tuple[str, dict[str, Any], T]]) -> tuple[tuple[Entry, ...], T]:
        """Do what may fail alone, then meet the others once.

        Args:
            prepare: Returns this rank's fingerprint, the facts that the others need, and what the rank goes on with.

        Returns:
            The entries of all ranks, in rank order; and what the rank goes on with.

        Raises:
            SparkdlError: On every rank the same, where ``prepare`` failed on any of them or the ranks differ.
        """
        rank, host = self.world.rank, self.world.hosts[self.world.rank]
        try:
            fingerprint, facts, ready = prepare()
            if rank == 0:
                self._listener = bind_store(self.address)
            store = (self.address, self._listener.getsockname()[1]) if self._listener else None
            entry = Entry(rank, host, find_versions(), fingerprint=fingerprint, facts=facts, store=store)
        except Exception as error:
            entry = Entry(rank, host, find_versions(), failure=self.failure(error))
        with self.unanimously():
            entries = agree(entry, self.all_gather)  # raises where this rank's entry is a failure
        self._store = entries[0].store
        return entries, ready

    @contextlib.contextmanager
    def unanimously(self) -> Iterator[None]:
        """For what every rank does with the same values: an error in the block is raised on all of them.

        Then nobody waits for anybody, and the barrier tasks may end well: a task that fails costs its Python process.
        """
        try:
            yield
        except Exception:
            self.refused = True
            raise

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """For all that a rank does: the driver hears that it is alive and what it logs, and a hang ends the process."""
        rank, host = self.world.rank, self.world.hosts[self.world.rank]
        level = logging.INFO if rank == 0 else logging.WARNING
        dog = Watchdog(
            self.clock, self.channel, rank=rank, host=host, attempt=self.attempt, timeouts=self.timeouts
        )  # fmt: skip
        with forwarded_logs(self.channel.send, level=level), dog:
            yield

    def close(self) -> None:
        """Let go of the driver, and of the socket if no store took it."""
        self.channel.close()
        if self._listener is not None:
            self._listener.close()

    @contextlib.contextmanager
    def process_group(
        self, device: torch.device, *, rendezvous_timeout: timedelta, collective_timeout: timedelta
    ) -> Iterator[None]:
        """`torch.distributed`, ready for the time of the block; call `agree` first."""
        assert self._store is not None
        with process_group(
            self.world,
            store_address=self._store,
            listener=self._listener,
            address=self.address,
            prefix=self.run_id,
            device=device,
            rendezvous_timeout=rendezvous_timeout,
            collective_timeout=collective_timeout,
        ):
            yield

    def failure(self, error: BaseException) -> Failure:
        """This rank's account of ``error``; of what another rank failed with and all raise, that rank's own."""
        if isinstance(error, TrainingFailedError) and error.failures:
            return next(iter(error.failures.values()))
        place = self.clock.place
        return Failure(
            rank=self.world.rank,
            host=self.world.hosts[self.world.rank],
            kind=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            consequence=is_communication_error(error),
            attempt=self.attempt,
            step=None if place.phase == "setup" else place.step,
            time=time.time(),
        )

    def report(self, error: BaseException) -> Failure:
        """Tell the driver of a failure; waits a moment where a peer's failure is the likely cause.

        The wait lets the cause reach Spark before its consequence does: Spark keeps the first task failure.
        """
        failure = self.failure(error)
        self.channel.send("failure", **asdict(failure))
        self.channel.flush(_SEND_SECONDS)
        if failure.consequence:
            time.sleep(_LINGER_SECONDS)
        return failure
