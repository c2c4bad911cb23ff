"""From the driver: start one barrier task per rank, show what the ranks report, return what they return.

The stage is `DataFrame.mapInArrow(..., barrier=True)`, which classic Spark and Spark Connect both have.
"""

import contextlib
import functools
import json
import logging
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark import cloudpickle, inheritable_thread_target

from sparkdl.barrier.channel import ChannelAddress, Event, local_address, open_channel
from sparkdl.barrier.context import RankContext
from sparkdl.barrier.device import available_cores, select_device, thread_count
from sparkdl.barrier.event_files import poll_event_files
from sparkdl.barrier.findings import Request
from sparkdl.barrier.monitor import FAILURE_NOTE, Monitor
from sparkdl.barrier.preflight import preflight
from sparkdl.barrier.rendezvous import error_of
from sparkdl.barrier.resources import find_slots, is_classic, is_local, profile_for
from sparkdl.config import Timeouts
from sparkdl.errors import ConfigError, Failure

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["chunks", "dumps", "launch", "launch_stage", "new_run_id"]

logger = logging.getLogger(__name__)

RankBody = Callable[[RankContext, Iterator[pa.RecordBatch]], Iterable[bytes]]
_CHUNK_BYTES = 4 << 20
_SLOTS_SECONDS = 2.0  # between two looks at the slots
_SHORTAGE_SECONDS = 10.0  # that slots may be too few before the ranks are given up
_RESULT_SCHEMA = "rank int, part int, payload binary"
_FAILURE_PART = -1  # in place of a result: what all ranks refused with


def launch(
    fn: Callable[..., Any],
    *args: Any,
    num_train_workers: int,
    spark: "SparkSession | None" = None,
    allow_unencrypted_traffic: bool = False,
) -> list[Any]:
    """Run ``fn(*args)`` in every rank of a barrier stage, with `torch.distributed` ready.

    The ranks use NCCL where each of them has a GPU, else gloo.

    Args:
        fn: A picklable function.
        *args: Its picklable arguments.
        num_train_workers: Ranks to start, each in a slot of its own.
        spark: The session; the active one if None.
        allow_unencrypted_traffic: Let ranks talk in the clear although Spark is told to encrypt, see `TrainConfig`.

    Returns:
        What each rank returned, in rank order.

    Raises:
        LaunchError: The cluster cannot run it: too few slots (`SlotsError`), a Python that is not fit
            (`ExecutorPythonError`), or several such things at once.
        TrainingFailedError: ``fn`` raised in a rank; the message is the first cause.
    """
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as F

    if num_train_workers < 1:
        raise ConfigError(f"num_train_workers={num_train_workers} starts no rank. Use 1 or more.")
    session = spark or SparkSession.active()
    request = Request(num_train_workers=num_train_workers, allow_unencrypted_traffic=allow_unencrypted_traffic)
    profile = profile_for(session, request.device)
    preflight(session, request, profile=profile).raise_errors()
    source = session.range(num_train_workers).repartitionById(num_train_workers, F.col("id").cast("int"))
    body = functools.partial(_run_function, dumps((fn, args), "the function and its arguments"))
    results = launch_stage(source, body, world_size=num_train_workers, run_id=new_run_id(), profile=profile)
    return [pickle.loads(b"".join(parts)) for parts in results]


def launch_stage(
    source: "DataFrame",
    body: RankBody,
    *,
    world_size: int,
    run_id: str,
    on_event: Callable[[Event], None] | None = None,
    attempt: int = 1,
    timeouts: Timeouts | None = None,
    directory: str | None = None,
    profile: "ResourceProfile | None" = None,
) -> list[list[bytes]]:
    """Run ``body`` in one barrier task per partition of ``source``.

    Args:
        source: A DataFrame of ``world_size`` partitions; partition r feeds rank r.
        body: Called in every task with its `RankContext` and its Arrow batches; yields the rank's result in chunks.
        world_size: Ranks.
        run_id: Identifies the run in logs, keys and Spark's job tags.
        on_event: Called on the driver for every progress event.
        attempt: How often the run was started, this time included.
        timeouts: How long ranks wait; None for the defaults.
        directory: URL of a directory that driver and executors reach: ranks that cannot connect to the driver leave
            their events there.
        profile: Resources of the tasks; None for the session's.

    Returns:
        The chunks that each rank yielded, in rank order.

    Raises:
        SparkdlError: The first cause of a failure, by class where it is one of sparkdl's own.
    """
    spark = source.sparkSession
    monitor = Monitor(world_size, on_event)
    failed: Exception | None = None
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(open_channel(_driver_host(spark), monitor.receive))
        if directory is not None:
            stack.enter_context(
                poll_event_files(
                    directory,
                    attempt=attempt,
                    world_size=world_size,
                    on_event=monitor.receive_file,
                    is_silent=monitor.is_silent,
                )
            )
        settings = _Settings(run_id, world_size, channel, attempt, timeouts, directory)
        task = functools.partial(_run_task, dumps(body, "the function"), settings)
        try:
            job = source.mapInArrow(task, _RESULT_SCHEMA, barrier=True, profile=profile)
            table = _collect(job, tag=run_id, monitor=monitor, slots=_SlotsWatch(spark, profile, world_size))
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("pyspark", "py4j"):
                raise
            failed = error
            monitor.settle(error)
    # The channel is closed: what ranks had sent is in.
    if failed is not None:
        raise monitor.error(failed) from None
    results: list[list[bytes]] = [[] for _ in range(world_size)]
    for row in table.sort_by([("rank", "ascending"), ("part", "ascending")]).to_pylist():
        if row["part"] == _FAILURE_PART:
            raise error_of({row["rank"]: Failure(**json.loads(row["payload"]))})
        results[row["rank"]].append(row["payload"])
    return results


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a barrier task is told beside what to do."""

    run_id: str
    world_size: int
    channel: ChannelAddress | None
    attempt: int
    timeouts: Timeouts | None
    directory: str | None


class _SlotsWatch:
    """Tells when a cluster has had too few slots for some seconds: a barrier stage waits for them for ever."""

    def __init__(self, spark: "SparkSession", profile: "ResourceProfile | None", world_size: int) -> None:
        self._spark, self._profile, self._world_size = spark, profile, world_size
        self._enough = self._asked = time.monotonic()

    def shortage(self) -> int | None:
        """The slots that are left, where they have been too few for a while; else None."""
        now = time.monotonic()
        if now - self._asked < _SLOTS_SECONDS:
            return None
        self._asked = now
        slots = find_slots(self._spark, self._profile)
        if slots is None or slots >= self._world_size:
            self._enough = now
        return slots if now - self._enough > _SHORTAGE_SECONDS else None


def _collect(job: "DataFrame", *, tag: str, monitor: Monitor, slots: _SlotsWatch) -> pa.Table:
    """`DataFrame.toArrow` that Ctrl-C stops at once: Spark's own waits for the end of the job even then.

    Once the run has failed, the job has some seconds to end by itself.
    """
    spark = job.sparkSession
    done: Future[pa.Table] = Future()

    def collect() -> None:
        try:
            _add_tag(spark, tag)
            done.set_result(job.toArrow())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=inheritable_thread_target(spark)(collect), name="sparkdl-stage", daemon=True)
    thread.start()
    try:
        while not done.done() and (patience := monitor.patience()) is None:
            if not monitor.has_started() and (left := slots.shortage()) is not None:
                monitor.lose_slots(left)
            thread.join(timeout=0.2)
        if not done.done():
            thread.join(timeout=patience)
        if not done.done():
            _interrupt(spark, tag)
    except BaseException:
        _interrupt(spark, tag)
        raise
    thread.join()
    return done.result()


def _add_tag(spark: "SparkSession", tag: str) -> None:
    """Tag the jobs of this thread.

    On classic Spark the context does it: once the session's own addTag was called, the session no longer serialises,
    and with it no MLlib model that holds a training summary.
    """
    if is_classic(spark):
        spark.sparkContext.addJobTag(tag)
    else:
        spark.addTag(tag)


def _interrupt(spark: "SparkSession", tag: str) -> None:
    if is_classic(spark):
        spark.sparkContext.cancelJobsWithTag(tag)
    else:
        spark.interruptTag(tag)


def new_run_id() -> str:
    """A new name for a run."""
    return f"sparkdl-{uuid.uuid4().hex[:12]}"


def dumps(value: Any, what: str) -> bytes:
    """Pickle for the executors.

    Raises:
        ConfigError: ``value`` cannot be pickled.
    """
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:
        raise ConfigError(
            f"{what} must travel to the executors, but cannot be pickled: {error}. Build what is not picklable (locks, "
            "sockets, sessions, open files) inside the ranks, on first use."
        ) from error


def chunks(payload: bytes) -> Iterator[bytes]:
    """Cut a result into pieces that a Spark row carries easily."""
    view = memoryview(payload)
    for start in range(0, max(len(payload), 1), _CHUNK_BYTES):
        yield bytes(view[start : start + _CHUNK_BYTES])


def _run_task(body: bytes, settings: _Settings, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """What Spark calls in every barrier task."""
    rank = RankContext.of_barrier_task(
        settings.run_id,
        settings.channel,
        attempt=settings.attempt,
        timeouts=settings.timeouts,
        directory=settings.directory,
    )
    try:
        with rank.watched():
            rank.check_world_size(settings.world_size)
            for part, payload in enumerate(pickle.loads(body)(rank, batches)):
                rank.clock.at("done", rank.clock.place.step)  # from here on the rank waits for Spark alone
                yield _row(rank, part, payload)
    except Exception as error:
        account = json.dumps(asdict(rank.report(error)))
        if not rank.refused:
            # The note carries the account through Spark's own error where the channel is lost.
            error.add_note(FAILURE_NOTE + account)
            raise
        yield _row(rank, _FAILURE_PART, account.encode())
    finally:
        rank.close()


def _row(rank: RankContext, part: int, payload: bytes) -> pa.RecordBatch:
    columns = [
        pa.array([rank.world.rank], pa.int32()),
        pa.array([part], pa.int32()),
        pa.array([payload], pa.binary()),
    ]
    return pa.RecordBatch.from_arrays(columns, ["rank", "part", "payload"])


def _run_function(payload: bytes, rank: RankContext, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
    import torch

    for _ in batches:  # the source is a row of its own number
        pass
    rank.agree(lambda: ("", {}, None))
    device = select_device(
        "auto",
        gpu_addresses=rank.gpu_addresses,
        local_rank=rank.world.local_rank,
        local_world_size=rank.world.local_world_size,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(
        thread_count(cores=available_cores(), local_world_size=rank.world.local_world_size, task_cpus=rank.task_cpus)
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with rank.process_group(
            device, rendezvous_timeout=timedelta(minutes=5), collective_timeout=timedelta(minutes=10)
        ):
            fn, args = pickle.loads(payload)
            result = cloudpickle.dumps(fn(*args))
    finally:
        torch.set_num_threads(threads)
    yield from chunks(result)


def _driver_host(spark: "SparkSession") -> str:
    """The driver's own address, as the executors know it."""
    if is_local(spark):
        return "127.0.0.1"
    if is_classic(spark):
        return spark.conf.get("spark.driver.host") or "127.0.0.1"
    return local_address(spark.client.host)
