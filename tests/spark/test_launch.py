"""`sparkdl.launch`: a function in every rank of a barrier stage."""

import os
import platform
import re
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from ipaddress import ip_address
from typing import Any

import psutil
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.linalg import Vectors
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

import sparkdl
from sparkdl import TrainingFailedError
from sparkdl.barrier import context
from sparkdl.barrier.context import RankContext
from sparkdl.barrier.launch import launch_stage, new_run_id
from sparkdl.errors import ConfigError, LaunchError, SlotsError

pytestmark = [pytest.mark.spark, pytest.mark.timeout(120)]

BIG = 20 << 20


def introduce(factor: int) -> dict[str, Any]:
    """What a rank knows of itself, its group and its process."""
    rank = torch.tensor([float(dist.get_rank() * factor)])
    dist.all_reduce(rank)
    listening = [entry for entry in psutil.Process().net_connections("inet") if entry.status == psutil.CONN_LISTEN]
    return {
        "pid": os.getpid(),
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "backend": dist.get_backend(),
        "sum": rank.item(),
        "executable": sys.executable,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "listening": [entry.laddr.ip for entry in listening],
        "peers": [entry.raddr.ip for entry in psutil.Process().net_connections("inet") if entry.raddr],
    }


def is_loopback(address: str) -> bool:
    """True for 127.0.0.1 and its like, also as an IPv6 socket shows it (::ffff:127.0.0.1)."""
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


@pytest.fixture(scope="module")
def ranks(spark: SparkSession) -> list[dict[str, Any]]:
    return sparkdl.launch(introduce, 10, num_train_workers=4, spark=spark)


def test_results_come_in_rank_order(ranks: list[dict[str, Any]]) -> None:
    assert [found["rank"] for found in ranks] == [0, 1, 2, 3]
    assert {found["world_size"] for found in ranks} == {4}
    assert len({found["pid"] for found in ranks}) == 4


def test_the_ranks_reduce_tensors_together(ranks: list[dict[str, Any]]) -> None:
    assert {found["sum"] for found in ranks} == {60.0}
    assert {found["backend"] for found in ranks} == {"nccl" if torch.cuda.device_count() >= 4 else "gloo"}


def test_the_ranks_run_the_drivers_python(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert (found["executable"], found["python"]) == (sys.executable, platform.python_version())
        assert found["torch"] == torch.__version__


def test_the_ranks_share_the_cores_of_the_host(ranks: list[dict[str, Any]]) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert {found["threads"] for found in ranks} <= set(range(1, max(1, cores // 4) + 1))


def test_nothing_listens_beyond_loopback_on_one_host(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["listening"], "rank 0 holds the store"
    for found in ranks:
        assert [address for address in found["listening"] + found["peers"] if not is_loopback(address)] == []


def listening_here() -> list[str]:
    """Addresses on which this process listens."""
    return [entry.laddr.ip for entry in psutil.Process().net_connections("inet") if entry.status == psutil.CONN_LISTEN]


def test_the_driver_listens_on_loopback_alone_and_only_while_the_ranks_run(spark: SparkSession) -> None:
    before = listening_here()
    seen: list[list[str]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            seen.append(listening_here())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert sparkdl.launch(abs, -3, num_train_workers=1, spark=spark) == [3]
    finally:
        stop.set()
        watcher.join()
    while_it_ran = max(seen, key=len)
    assert len(while_it_ran) > len(before), "the driver never listened, so this test shows nothing"
    assert [address for address in while_it_ran if not is_loopback(address)] == []
    assert listening_here() == before


def draw(size: int) -> bytes:
    """Bytes that no one compresses, different in each rank."""
    return (
        torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(dist.get_rank()))
        .numpy()
        .tobytes()
    )


def test_a_result_of_20_mb_per_rank_comes_back_whole(spark: SparkSession) -> None:
    found = sparkdl.launch(draw, BIG, num_train_workers=2, spark=spark)
    for rank, result in enumerate(found):
        expected = torch.randint(0, 256, (BIG,), dtype=torch.uint8, generator=torch.Generator().manual_seed(rank))
        assert result == expected.numpy().tobytes()


def test_the_active_session_is_the_default(spark: SparkSession) -> None:
    local = "a closure travels by value"
    assert sparkdl.launch(lambda: local, num_train_workers=1) == [local]


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_an_argument_that_cannot_be_pickled_is_refused(spark: SparkSession) -> None:
    with pytest.raises(ConfigError, match=r"must travel to the executors, but cannot be pickled.*inside the ranks"):
        sparkdl.launch(print, threading.Lock(), num_train_workers=1, spark=spark)


@pytest.mark.parametrize("workers", [0, -1])
def test_no_ranks_at_all_are_refused(spark: SparkSession, workers: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_train_workers={workers} starts no rank. Use 1 or more"):
        sparkdl.launch(print, num_train_workers=workers, spark=spark)


def test_more_ranks_than_slots_are_refused_at_once(spark: SparkSession) -> None:
    with pytest.raises(SlotsError, match=r"needs 5 slots at once, but this cluster runs 4 tasks.*local\[5\]"):
        sparkdl.launch(print, num_train_workers=5, spark=spark)


# ---- failures --------------------------------------------------------------------------------------------------------
def fail_on(rank: int) -> None:
    """One rank raises while the others wait for it."""
    if dist.get_rank() == rank:
        raise ValueError(f"planted failure of rank {rank}")
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_of_one_rank_is_the_error_of_the_launch(spark: SparkSession, rank: int) -> None:
    with pytest.raises(TrainingFailedError, match=rf"Rank {rank} on .+ failed: ValueError: planted failure") as caught:
        sparkdl.launch(fail_on, rank, num_train_workers=3, spark=spark)
    assert caught.value.failures[rank].kind == "ValueError"
    assert "in fail_on" in caught.value.failures[rank].traceback


def give_a_lock() -> Any:
    return threading.Lock()


def test_a_result_that_cannot_be_pickled_is_an_error(spark: SparkSession) -> None:
    with pytest.raises(TrainingFailedError, match=r"Rank 0 .*cannot pickle '_thread.lock' object"):
        sparkdl.launch(give_a_lock, num_train_workers=1, spark=spark)


class OtherTorch:
    """A rank body whose rank 1 finds another torch installed than the rest."""

    def __call__(self, rank: RankContext, batches: Iterator[pa.RecordBatch]) -> Iterator[bytes]:
        for _ in batches:
            pass
        found = context.find_versions
        if rank.world.rank == 1:
            context.find_versions = lambda: {**found(), "torch": "1.13.1"}
        try:
            rank.agree(lambda: ("", {}, None))
        finally:
            context.find_versions = found
        yield b"trained together"


def test_ranks_with_different_versions_do_not_start_and_the_odd_one_is_named(spark: SparkSession) -> None:
    source = spark.range(3).repartitionById(3, F.col("id").cast("int"))
    odd = rf"Rank 1 on \S+ runs torch 1\.13\.1 \({re.escape(sys.executable)}\)"
    usual = rf", the other ranks {re.escape(version('torch'))}. Install the same versions on all executors"
    with pytest.raises(LaunchError, match=odd + usual):
        launch_stage(source, OtherTorch(), world_size=3, run_id=new_run_id())


def test_a_stage_of_another_size_than_asked_does_not_train(spark: SparkSession) -> None:
    source = spark.range(2).repartitionById(2, F.col("id").cast("int"))
    with pytest.raises(LaunchError, match=r"3 barrier tasks were asked for, but Spark started 2"):
        launch_stage(source, OtherTorch(), world_size=3, run_id=new_run_id())


def test_mllib_models_with_a_summary_still_transform_after_a_launch(spark: SparkSession) -> None:
    """A session that was tagged itself can no longer be serialised, and such a model holds the session."""
    rows = [(Vectors.dense([float(number % 5), float(number % 3)]), float(number % 2)) for number in range(20)]
    data = spark.createDataFrame(rows, ["features", "label"])
    model = LogisticRegression(maxIter=2).fit(data)
    assert sparkdl.launch(dist.get_rank, num_train_workers=2, spark=spark) == [0, 1]
    assert len(model.transform(data).select("probability").collect()) == len(rows)
