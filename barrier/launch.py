"""From the driver: start one barrier task per rank, show what the ranks report, return what they return.

The stage is `DataFrame.mapInArrow(..., barrier=True)`, which classic Spark and Spark Connect both have.
"""

import functools
import json
import logging
import pickle
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark import cloudpickle, inheritable_thread_target

from sparkdl.barrier.channel import ChannelAddress, Event, local_address, open_channel
from sparkdl.barrier.context import FAILURE_NOTE, RankContext
from sparkdl.barrier.device import available_cores, select_device, thread_count
from sparkdl.barrier.preflight import check_executor_python, check_slots, is_local
from sparkdl.barrier.rendezvous import error_of
from sparkdl.errors import ConfigError, Failure, SparkdlError, TrainingFailedError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

__all__ = ["chunks", "dumps", "launch", "launch_stage", "new_run_id"]

logger = logging.getLogger(__name__)

RankBody = Callable[[RankContext, Iterator[pa.RecordBatch]], Iterable[bytes]]
_CHUNK_BYTES = 4 << 20
_GRACE_SECONDS = 3.0
_JAVA_REASON = re.compile(r"^(?:Caused by: )?[\w.$]+(?:Exception|Error): (.+)$", re.MULTILINE)
_PYTHON_REASON = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*$", re.MULTILINE)
_SAYS_NOTHING = ("awaitResult", "failed barrier ResultStage")
_RESULT_SCHEMA = "rank int, part int, payload binary"
_FAILURE_PART = -1  # in place of a result: what all ranks refused with


def launch(
    fn: Callable[..., Any], *args: Any, num_train_workers: int, spark: "SparkSession | None" = None
) -> list[Any]:
    """Run ``fn(*args)`` in every rank of a barrier stage, with `torch.distributed` ready.

    The ranks use NCCL where each of them has a GPU, else gloo.

    Args:
        fn: A picklable function.
        *args: Its picklable arguments.
        num_train_workers: Ranks to start, each in a slot of its own.
        spark: The session; the active one if None.

    Returns:
        What each rank returned, in rank order.

    Raises:
        SlotsError: More ranks than slots.
        ExecutorPythonError: The executors' Python is not fit.
        TrainingFailedError: ``fn`` raised in a rank; the message is the first cause.
    """
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as F

    if num_train_workers < 1:
        raise ConfigError(f"num_train_workers={num_train_workers} starts no rank. Use 1 or more.")
    session = spark or SparkSession.active()
    check_slots(session, num_train_workers)
    check_executor_python(session)
    source = session.range(num_train_workers).repartitionById(num_train_workers, F.col("id").cast("int"))
    body = functools.partial(_run_function, dumps((fn, args), "the function and its arguments"))
    results = launch_stage(source, body, world_size=num_train_workers, run_id=new_run_id())
    return [pickle.loads(b"".join(parts)) for parts in results]


def launch_stage(
    source: "DataFrame",
    body: RankBody,
    *,
    world_size: int,
    run_id: str,
    on_event: Callable[[Event], None] | None = None,
    attempt: int = 1,
    timeouts: Any = None,
    directory: str | None = None,
) -> list[list[bytes]]:
    """Run ``body`` in one barrier task per partition of ``source``.

    Args:
        source: A DataFrame of ``world_size`` partitions; partition r feeds rank r.
        body: Called in every task with its `RankContext` and its Arrow batches; yields the rank's result in chunks.
        world_size: Ranks.
        run_id: Identifies the run in logs, keys and Spark's job tags.
        on_event: Called on the driver for every progress event.

    Returns:
        The chunks that each rank yielded, in rank order.

    Raises:
        SparkdlError: The first cause of a failure, by class where it is one of sparkdl's own.
    """
    spark = source.sparkSession
    failures: dict[int, Failure] = {}
    cause_known = threading.Event()

    def receive(event: Event) -> None:
        if event["event"] == "failure":
            failure = Failure(**{name: event[name] for name in Failure.__slots__})
            failures.setdefault(failure.rank, failure)
            if not failure.consequence:
                cause_known.set()
        elif on_event is not None:
            on_event(event)

    failed: Exception | None = None
    with open_channel(_driver_host(spark), receive) as channel:
        task = functools.partial(_run_task, dumps(body, "the function"), run_id, world_size, channel)
        try:
            table = _collect(source.mapInArrow(task, _RESULT_SCHEMA, barrier=True), tag=run_id, give_up=cause_known)
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("pyspark", "py4j"):
                raise
            failed = error
    # The channel is closed: what ranks had sent is in.
    if failed is not None:
        raise _first_cause(failed, failures) from None
    results: list[list[bytes]] = [[] for _ in range(world_size)]
    for row in table.sort_by([("rank", "ascending"), ("part", "ascending")]).to_pylist():
        if row["part"] == _FAILURE_PART:
            raise error_of({row["rank"]: Failure(**json.loads(row["payload"]))})
        results[row["rank"]].append(row["payload"])
    return results


def _collect(job: "DataFrame", *, tag: str, give_up: threading.Event) -> pa.Table:
    """`DataFrame.toArrow` that Ctrl-C stops at once: Spark's own waits for the end of the job even then.

    Once ``give_up`` is set, the job has some seconds to end by itself: Spark hears of a failed task only when its
    Python process is gone, which may take long.
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
        while not done.done() and not give_up.is_set():
            thread.join(timeout=0.2)
        thread.join(timeout=_GRACE_SECONDS)
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
    if hasattr(spark, "_jsparkSession"):
        spark.sparkContext.addJobTag(tag)
    else:
        spark.addTag(tag)


def _interrupt(spark: "SparkSession", tag: str) -> None:
    if hasattr(spark, "_jsparkSession"):
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


def _run_task(
    body: bytes,
    run_id: str,
    world_size: int,
    channel: ChannelAddress | None,
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """What Spark calls in every barrier task."""
    rank = RankContext.of_barrier_task(run_id, channel)
    try:
        rank.check_world_size(world_size)
        for part, payload in enumerate(pickle.loads(body)(rank, batches)):
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
    if hasattr(spark, "_jsparkSession"):
        return spark.conf.get("spark.driver.host") or "127.0.0.1"
    return local_address(spark.client.host)


def _first_cause(error: Exception, failures: dict[int, Failure]) -> SparkdlError:
    """What really went wrong, from the ranks' own accounts, else from Spark's."""
    text = str(error)
    known = dict(failures)
    for line in text.splitlines():
        if line.strip().startswith(FAILURE_NOTE):
            try:
                failure = Failure(**json.loads(line.strip().removeprefix(FAILURE_NOTE)))
            except (ValueError, TypeError):
                continue
            known.setdefault(failure.rank, failure)
    if any(not failure.consequence for failure in known.values()):
        return error_of(known)
    reasons = [match for match in _JAVA_REASON.findall(text) if not any(words in match for words in _SAYS_NOTHING)]
    raised = _PYTHON_REASON.findall(text.partition("Traceback (most recent call last):")[2])
    reason = (raised or reasons or [text.strip().partition("\n")[0]])[0]
    silent = "exited unexpectedly" in text or "ExecutorLost" in text or bool(known)
    lead = "A rank's process died without a word (killed, or out of memory?). " if silent else ""
    seen = "".join(f"\n  rank {rank}: {known[rank].message}" for rank in sorted(known))
    return TrainingFailedError(
        f"{lead}Spark says: {reason}" + (f"\nThe other ranks saw only the consequence:{seen}" if seen else ""),
        known,
        lost=silent,
    )
