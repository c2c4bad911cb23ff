"""Times handing tensors from one rank to all others: `torch.distributed.broadcast` against the chain.

Each rank is a process in a network namespace of its own, a "host". The hosts' only links lead to a bridge, which has a
namespace too, and each link passes as much per second as ``--rate`` says, in either direction. That needs Linux, root,
and ``ip`` and ``tc`` of iproute2; nothing outside the script's own namespaces is changed, and they go when it ends.
Where they are refused the script says so, and runs all ranks on loopback: then it measures memory and processor.

* ``flat``: ``torch.distributed.broadcast`` of one tensor;
* ``buckets``: ``sparkdl.io.exchange.broadcast``, the same in messages of 32 MiB;
* ``chain 1``, ``chain 4``: ``chain_broadcast`` in chunks of 1 and of 4 MiB.

A time is that from a barrier to the last rank's end. The script reports, whatever the numbers.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import Place, describe_machine, open_places, run_ranks

from sparkdl.io.exchange import broadcast, chain_broadcast

MIB = 1 << 20
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
RUN_SECONDS = 400
"""After so long the ranks of one world are ended."""

Times = dict[str, dict[str, list[float]]]
"""Seconds by contender and by MiB."""


@dataclass(frozen=True)
class Config:
    """What is measured."""

    ranks: tuple[int, ...]
    mib: tuple[int, ...]
    rate: str
    repeats: int


# One rank.


def contenders() -> dict[str, Callable[[torch.Tensor], object]]:
    """Functions that overwrite a tensor with that of rank 0, by name."""
    hosts = [str(rank) for rank in range(dist.get_world_size())]
    return {
        "flat": lambda tensor: dist.broadcast(tensor, 0),
        "buckets": lambda tensor: broadcast([tensor]),
        "chain 1": lambda tensor: chain_broadcast([tensor], hosts=hosts, chunk_bytes=MIB),
        "chain 4": lambda tensor: chain_broadcast([tensor], hosts=hosts, chunk_bytes=4 * MIB),
    }


def run_rank(path: str, config: Config) -> None:
    """Joins the group, times every contender, and writes the times on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    rank = dist.get_rank()
    times: Times = {}
    for mib in config.mib:
        expected = torch.arange(mib * MIB // 8)
        for repeat in range(config.repeats + 1):
            # In turn, so that whatever else the machine does meets all of them. The first round connects the ranks.
            for name, run in contenders().items():
                tensor = expected.clone() if rank == 0 else torch.zeros_like(expected)
                dist.barrier()
                start = time.perf_counter()
                run(tensor)
                seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                if not torch.equal(tensor, expected):
                    raise AssertionError(f"{name} gave rank {rank} another tensor")
                if repeat:
                    times.setdefault(name, {}).setdefault(str(mib), []).append(seconds.item())
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        Path(path).write_text(json.dumps(times))


def run_world(places: list[Place], config: Config) -> Times:
    """Runs one rank per place, and returns the times."""
    with tempfile.TemporaryDirectory(prefix="bench_exchange_") as folder:
        path = f"{folder}/times.json"
        words = [sys.executable, __file__, "--rank", path, json.dumps(asdict(config))]
        run_ranks(places, words, seconds=RUN_SECONDS)
        times: Times = json.loads(Path(path).read_text())
        return times


# Reporting.


def tables(results: dict[str, Times]) -> str:
    """Returns the median times, and how many times as fast as ``flat`` the others are: a Markdown table per world."""
    lines = []
    for world, times in results.items():
        heads = [*(f"{name}, s" for name in times), *(f"flat / {name}" for name in times if name != "flat")]
        lines += [f"{world}:", "", f"| MiB | {' | '.join(heads)} |", "| ---: |" + " ---: |" * len(heads)]
        for mib in times["flat"]:
            flat, *others = (statistics.median(by_size[mib]) for by_size in times.values())
            cells = [f"{seconds:.3f}" for seconds in (flat, *others)]
            cells += [f"{flat / seconds:.2f}" for seconds in others]
            lines.append(f"| {mib} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def main() -> None:
    """Times all contenders in every world, prints and writes what they took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=numbers, default=(4, 8), help="numbers of ranks, one host each")
    parser.add_argument("--mib", type=numbers, default=(1, 4, 8, 16, 64, 256), help="sizes of the tensor")
    parser.add_argument("--rate", default="1gbit", help="of each host's link, as tc writes it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)  # the script starts itself in each namespace
    arguments = parser.parse_args()
    if arguments.rank:
        path, config = arguments.rank
        run_rank(path, Config(**json.loads(config)))
        return

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that namespaces go then too
    config = Config(arguments.ranks, arguments.mib, arguments.rate, arguments.repeats)
    command_line = shlex.join(["python", "benchmarks/bench_exchange.py", *sys.argv[1:]])
    setting: dict[str, dict[str, Any]] = {
        "machine": describe_machine(),
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
        "config": asdict(config),
    }
    results: dict[str, Times] = {}
    for number in config.ranks:
        with open_places(number, config.rate) as (places, network):
            results[f"{number} ranks ({network})"] = run_world(places, config)
    report = tables(results)
    print(report)

    record = {"command": command_line, **setting, "seconds": results}
    lines = [f"`{command_line}`", ""]
    for title, values in setting.items():
        lines.append(f"- {title}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    arguments.results.mkdir(parents=True, exist_ok=True)
    target = arguments.results / f"exchange_{datetime.date.today().isoformat()}"
    target.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    target.with_suffix(".md").write_text("\n".join([*lines, "", report]))
    print(f"Wrote {target}.json and {target}.md")


if __name__ == "__main__":
    main()
