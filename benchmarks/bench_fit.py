"""Times the same MLP on the same Parquet rows through three training paths.

* ``sparkdl``: ``TorchClassifier.fit`` on the DataFrame;
* ``distributor``: Spark's ``TorchDistributor`` on the DataFrame, with its partition data loader;
* ``ddp``: plain ``DistributedDataParallel`` on tensors that already lie in memory.

The first two are timed as whole calls and by their loops. The third has nothing to fetch: its
loop is the pace that the others are held against. The script reports, whatever the numbers.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.distributed
import torch.multiprocessing
from pyspark.ml.torch.distributor import TorchDistributor, _get_spark_partition_data_loader
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sf
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

CONTENDERS = ("sparkdl", "distributor", "ddp")
CALLS = 2
History = list[dict[str, float]]
"""One record per epoch: ``rows`` over all processes, ``seconds`` and, where known, ``loss``."""


@dataclass(frozen=True)
class Config:
    """What every contender is given; ``batch_size`` is rows per step over all workers."""

    rows: int
    epochs: int
    batch_size: int
    workers: int = 2
    threads_per_worker: int = 1
    features: int = 40
    hidden: int = 128
    learning_rate: float = 1e-3
    seed: int = 0
    files: int = 8

    @property
    def worker_batch(self) -> int:
        """Rows per step of one worker."""
        return self.batch_size // self.workers


@dataclass
class Call:
    """One training call: its wall time in seconds, and its loop's epochs."""

    wall: float
    epochs: History

    @property
    def outside(self) -> float:
        """The seconds of the call that its loop does not account for."""
        return self.wall - sum(epoch["seconds"] for epoch in self.epochs)

    @property
    def rates(self) -> list[float]:
        """Rows per second of the loop, epoch by epoch."""
        return [epoch["rows"] / epoch["seconds"] for epoch in self.epochs]


def make_mlp(config: Config) -> nn.Module:
    """Returns the network, with the same initial weights every time."""
    torch.manual_seed(config.seed)
    inputs, hidden = config.features, config.hidden
    layers = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, 2))


def write_data(spark: SparkSession, path: str, config: Config) -> None:
    """Writes an ``array<float>`` column, which every contender reads as it stands, and a label.

    The label is 1 where the first half of the features has the larger norm, which the network
    can learn and a linear model cannot.
    """
    array = sf.array(*[sf.randn(config.seed + i).cast("float") for i in range(config.features)])
    column, half = sf.col("features"), config.features // 2
    terms = [column[i] * column[i] * (1 if i < half else -1) for i in range(config.features)]
    frame = spark.range(0, config.rows, 1, config.files).select(array.alias("features"))
    label = sum(terms, sf.lit(0.0)) > 0
    frame.withColumn("label", label.cast("bigint")).write.parquet(path)


def start_spark(config: Config) -> SparkSession:
    """Starts a Spark application with one slot per worker."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master(f"local[{config.workers}]").appName("bench_fit")
    builder = builder.config("spark.driver.host", "127.0.0.1")
    builder = builder.config("spark.driver.memory", "4g").config("spark.ui.enabled", "false")
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


# The contenders.


def fit_sparkdl(frame: DataFrame, config: Config) -> History:
    """Trains through the library; its processes set their own thread count."""
    from sparkdl import TorchClassifier

    classifier = TorchClassifier(
        module=make_mlp(config),
        optimizer="adamw",
        learningRate=config.learning_rate,
        maxEpochs=config.epochs,
        batchSize=config.batch_size,
        seed=config.seed,
        numTrainWorkers=config.workers,
        verbose=False,
    )
    return [dict(epoch) for epoch in classifier.fit(frame).history]


def fit_distributor(frame: DataFrame, config: Config) -> History:
    """Trains through ``TorchDistributor`` on evenly filled partitions, as it asks for."""
    frame = frame.repartition(config.workers)
    steps = -(-frame.count() // config.batch_size)
    distributor = TorchDistributor(num_processes=config.workers, local_mode=False, use_gpu=False)
    history: History
    _, history = distributor._train_on_dataframe(train_on_partition, frame, steps * config.worker_batch, config)
    return history


def train_on_partition(samples: int, config: Config) -> tuple[dict[str, Tensor], History]:
    """Reads ``samples`` rows of this worker's partition per epoch, as Spark's estimators do."""
    torch.distributed.init_process_group("gloo")
    loader = _get_spark_partition_data_loader(samples, config.worker_batch, num_workers=0)
    return train(lambda: loader, samples * config.workers, config)


def fit_ddp(path: str, config: Config) -> History:
    """Trains in fresh processes, without Spark."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    report: SimpleQueue[History] = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (address, path, config, report)
    start_processes(train_in_memory, arguments, nprocs=config.workers)
    return report.get()


def train_in_memory(rank: int, address: str, path: str, config: Config, report: SimpleQueue[History]) -> None:
    """Trains on this worker's share of the rows, read before its loop starts."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=config.workers)
    table = pq.read_table(path)
    values = table["features"].combine_chunks().flatten().to_numpy()
    features = torch.tensor(values.reshape(-1, config.features)[rank :: config.workers])
    target = torch.tensor(table["label"].to_numpy()[rank :: config.workers])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(target)).split(config.worker_batch):
            yield features.index_select(0, chosen), target.index_select(0, chosen)

    _, history = train(batches, config.rows, config)
    if rank == 0:
        report.put(history)


def train(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], rows: int, config: Config
) -> tuple[dict[str, Tensor], History]:
    """Runs the loop that PyTorch's DDP documentation shows, and times its epochs.

    Args:
        batches: Returns one epoch's batches of features and labels.
        rows: Rows per epoch, over all workers.
        config: What every contender is given.

    Returns:
        The trained weights and the epochs.
    """
    torch.set_num_threads(config.threads_per_worker)
    model = DistributedDataParallel(make_mlp(config))
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    history: History = []
    for _ in range(config.epochs):
        torch.distributed.barrier()
        start, losses = time.perf_counter(), []
        for features, target in batches():
            optimizer.zero_grad()
            loss = loss_function(model(features), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - start
        history.append({"rows": rows, "seconds": seconds, "loss": statistics.fmean(losses)})
    weights = model.module.state_dict()
    # DDP must go before its group: freed after it, it can hang for ever (see DataParallel.close in sparkdl.parallel).
    del model.reducer, model.logger, model, loss
    torch.distributed.destroy_process_group()
    return weights, history


# Running and reporting.


def run(name: str, path: str, config: Config) -> list[Call]:
    """Runs one contender's calls; those on Spark share one fresh application."""
    spark = None if name == "ddp" else start_spark(config)
    calls = []
    for _ in range(CALLS):
        start = time.perf_counter()
        if spark is None:
            epochs = fit_ddp(path, config)
        else:
            fit = fit_sparkdl if name == "sparkdl" else fit_distributor
            epochs = fit(spark.read.parquet(path), config)
        calls.append(Call(time.perf_counter() - start, epochs))
    if spark is not None:
        spark.stop()
    return calls


def ratios(results: dict[str, list[Call]]) -> dict[str, float]:
    """Returns the ratios that the contenders run allow; ``ddp``'s pace is its median epoch."""
    found: dict[str, float] = {}
    if {"sparkdl", "distributor"} <= results.keys():
        pairs = zip(results["sparkdl"], results["distributor"], strict=True)
        for number, (ours, theirs) in enumerate(pairs):
            found[f"wall of call {number + 1}, sparkdl / distributor"] = ours.wall / theirs.wall
    if "ddp" in results:
        pace = statistics.median(rate for call in results["ddp"] for rate in call.rates)
        for name in [name for name in results if name != "ddp"]:
            first, *later = results[name][-1].rates
            found[f"rows/s of the first epoch, {name} / ddp"] = first / pace
            if later:
                found[f"rows/s of later epochs, {name} / ddp"] = statistics.median(later) / pace
    return found


def tables(results: dict[str, list[Call]], found: dict[str, float]) -> str:
    """Returns the calls and the ratios as two Markdown tables."""
    lines = ["| contender | call | wall s | outside loop s | first rows/s | median rows/s | loss | data wait % |"]
    lines.append("| --- |" + " ---: |" * 7)
    for name, calls in results.items():
        for number, call in enumerate(calls, start=1):
            wall = " | " if name == "ddp" else f"{call.wall:.1f} | {call.outside:.1f}"
            rates = f"{call.rates[0]:,.0f} | {statistics.median(call.rates):,.0f}"
            loss = call.epochs[-1].get("loss", float("nan"))
            waits = [epoch["data_wait"] for epoch in call.epochs if "data_wait" in epoch]
            waited = " / ".join(f"{100 * wait:.1f}" for wait in waits)
            lines.append(f"| {name} | {number} | {wall} | {rates} | {loss:.3f} | {waited} |")
    lines += ["", "| ratio | value |", "| --- | ---: |"]
    return "\n".join(lines + [f"| {name} | {value:.2f} |" for name, value in found.items()])


def describe_machine() -> dict[str, str | int | float]:
    """Returns the processor, the memory, and how busy the machine is."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Runs the chosen contenders one after another, prints and writes what they took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1024, help="rows per step, all workers")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    chosen = arguments.contenders.split(",")
    if unknown := set(chosen) - set(CONTENDERS):
        parser.error(f"no such contender: {', '.join(sorted(unknown))}")

    config = Config(arguments.rows, arguments.epochs, arguments.batch_size)
    command = shlex.join(["python", "benchmarks/bench_fit.py", *sys.argv[1:]])
    packages = ("torch", "pyspark", "pyarrow", "petastorm", "numpy", "pandas")
    versions = {name: importlib.metadata.version(name) for name in packages}
    setting: dict[str, dict[str, Any]] = {
        "machine": describe_machine(),
        "versions": {"python": platform.python_version()} | versions,
        "config": asdict(config),
    }
    with tempfile.TemporaryDirectory(prefix="bench_fit_") as folder:
        path = f"{folder}/rows.parquet"
        spark = start_spark(config)
        write_data(spark, path, config)
        spark.stop()
        results = {name: run(name, path, config) for name in chosen}
    found = ratios(results)
    report = tables(results, found)
    print(report)

    calls = {name: [asdict(call) for call in calls] for name, calls in results.items()}
    record = {"command": command, **setting, "calls": calls, "ratios": found}
    lines = [f"`{command}`", ""]
    for title, values in setting.items():
        lines.append(f"- {title}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    arguments.results.mkdir(parents=True, exist_ok=True)
    target = arguments.results / f"fit_{datetime.date.today().isoformat()}"
    target.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    target.with_suffix(".md").write_text("\n".join([*lines, "", report, ""]))
    print(f"\nWrote {target}.json and {target}.md")


if __name__ == "__main__":
    main()
