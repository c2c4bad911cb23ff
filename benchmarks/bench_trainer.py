"""Times the Trainer's loop against a loop written by hand, on the same tensors in memory.

* ``sparkdl``: `sparkdl.standalone.fit_module`, from the end of its first epoch to the end of its last;
* ``bare``: what PyTorch's documentation shows: permute, gather, forward, backward, step; with several
  processes around ``DistributedDataParallel``.

Both run in fresh processes, one after the other, again and again, with the same optimizer (fused AdamW), the same
threads and the same sizes. Each pair gives a ratio of seconds; reported is the median, whatever it is.

Where there is a GPU, a ViT-S in bf16 is timed as well: ``sparkdl`` with its rows in host memory, ``bare`` with
its rows on the GPU. Elsewhere it is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
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
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

CONTENDERS = ("sparkdl", "bare")
LIMIT = 1.03
"""Asked for at batch 256: at most this many times the seconds of the bare loop."""
GPU_PACE = 0.95
"""Asked for on a GPU: at least this part of the pace of the bare loop."""


@dataclass(frozen=True)
class Case:
    """What both contenders are given; ``batch_size`` is rows per step over all processes."""

    network: str
    processes: int
    batch_size: int
    rows: int
    epochs: int
    threads: int = 1
    precision: str = "32"
    device: str = "cpu"

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.rows // self.batch_size


class VisionTransformer(nn.Module):
    """ViT-S/16 for images of 224 by 224 (arXiv 2010.11929, 2012.12877)."""

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.places = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the classes, shape (rows, classes)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.places
        return self.head(self.encoder(tokens)[:, 0])


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))


def make_cnn() -> nn.Module:
    convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (make_mlp, (40,), 2),
    "cnn": (make_cnn, (1, 28, 28), 10),
    "vit": (VisionTransformer, (3, 224, 224), 1000),
}
"""By name: how to make it, the shape of a row, and the number of classes."""


def make_case(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns the network and its rows, the same every time."""
    build, shape, classes = NETWORKS[case.network]
    torch.manual_seed(0)
    return build(), torch.randn(case.rows, *shape), torch.randint(classes, (case.rows,))


# The contenders. Each returns its seconds, from the end of the first epoch to the end of the last.


def fit_sparkdl(case: Case, device: torch.device) -> float:
    """Trains through the library."""
    from sparkdl.config import TrainConfig
    from sparkdl.standalone import TensorRows, fit_module

    module, inputs, labels = make_case(case)
    config = TrainConfig(
        max_epochs=case.epochs,
        batch_size=case.batch_size,
        precision=case.precision,  # type: ignore[arg-type]
        device="cuda" if device.type == "cuda" else "cpu",
        verbose=False,
    )
    ends = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            ends.append(time.perf_counter())

    rows = TensorRows(inputs, labels)
    fit_module(module, rows, loss="cross_entropy", learning_rate=1e-3, config=config, on_event=note)
    return ends[-1] - ends[0] if ends else 0.0


def fit_bare(case: Case, device: torch.device) -> float:
    """Trains by hand."""
    rank, processes = torch.distributed.get_rank(), case.processes
    module, inputs, labels = make_case(case)
    module, inputs, labels = module.to(device), inputs.to(device), labels.to(device)
    model = DistributedDataParallel(module) if processes > 1 else module
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    autocast = contextlib.nullcontext()
    if case.precision == "bf16":
        autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    ends = []
    for epoch in range(case.epochs):
        order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(epoch)).to(device)
        total = torch.zeros((), device=device)
        for chosen in order[rank::processes].split(case.batch_size // processes):
            features, target = inputs.index_select(0, chosen), labels.index_select(0, chosen)
            optimizer.zero_grad()
            with autocast:
                loss = loss_function(model(features), target)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(chosen)
        float(total)  # waits for a GPU
        ends.append(time.perf_counter())
    if processes > 1:
        # DDP must go before its group: freed after it, it can hang for ever, see DataParallel.close.
        del model.reducer, model.logger, model, loss
    return ends[-1] - ends[0]


# Running and reporting.


def run_rank(rank: int, name: str, case: Case, address: str, report: SimpleQueue[float]) -> None:
    """One process of one contender."""
    torch.set_num_threads(case.threads)
    device = torch.device(case.device, rank) if case.device == "cuda" else torch.device("cpu")
    backend = "nccl" if case.device == "cuda" else "gloo"
    if case.device == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, init_method=address, rank=rank, world_size=case.processes)
    seconds = fit_sparkdl(case, device) if name == "sparkdl" else fit_bare(case, device)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank == 0:
        report.put(seconds)


def measure(name: str, case: Case) -> float:
    """Returns the seconds of one contender in fresh processes; those of a CPU find the libraries imported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    method = "forkserver" if case.device == "cpu" else "spawn"
    report: SimpleQueue[float] = torch.multiprocessing.get_context(method).SimpleQueue()
    start_processes(run_rank, (name, case, address, report), nprocs=case.processes, start_method=method)
    return report.get()


def compare(case: Case, pairs: int) -> dict[str, Any]:
    """Times both contenders ``pairs`` times; every second pair begins with the other one."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(pairs):
        for name in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
            seconds[name].append(measure(name, case))
    steps = case.steps * (case.epochs - 1)
    ratios = [ours / bare for ours, bare in zip(seconds["sparkdl"], seconds["bare"], strict=True)]
    found = {
        "case": asdict(case),
        "seconds": seconds,
        "microseconds_per_step": {name: 1e6 * statistics.median(all_) / steps for name, all_ in seconds.items()},
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }
    print(row_of(found), flush=True)
    return found


def cases_of(arguments: argparse.Namespace) -> Iterator[Case]:
    """The cases that were asked for, those of the GPU last."""
    networks, threads = arguments.networks.split(","), arguments.threads
    for network in [name for name in networks if name != "vit"]:
        for processes in map(int, arguments.processes.split(",")):
            for batch_size in map(int, arguments.batch_sizes.split(",")):
                # A second or two for each: an MLP's step of 256 rows takes half a millisecond, the CNN's 50.
                rows, epochs = (32 * 1024, 9) if network == "mlp" else (4 * 1024, 3)
                yield Case(network, processes, batch_size, rows, epochs, threads)
    if "vit" in networks and torch.cuda.is_available():
        yield Case("vit", 1, 128, 1536, 6, os.cpu_count() or 1, "bf16", "cuda")


HEADER = (
    "| network | processes | rows per step | sparkdl us/step | bare us/step | difference us | ratio of seconds | "
    "lowest and highest |\n| --- |" + " ---: |" * 7
)


def row_of(found: dict[str, Any]) -> str:
    """Returns one case as a row of a Markdown table."""
    case, each = found["case"], found["microseconds_per_step"]
    ours, bare = each["sparkdl"], each["bare"]
    return (
        f"| {case['network']} | {case['processes']} | {case['batch_size']} | {ours:,.0f} | {bare:,.0f} | "
        f"{ours - bare:,.0f} | {found['median_ratio']:.3f} | {min(found['ratios']):.3f} {max(found['ratios']):.3f} |"
    )


def verdicts(results: list[dict[str, Any]], *, gpu_asked: bool) -> list[str]:
    """Returns what was asked for, and whether it holds."""
    lines = []
    small = [found for found in results if found["case"]["device"] == "cpu" and found["case"]["batch_size"] == 256]
    if small:
        over = [f"{found['case']['network']} x {found['case']['processes']}" for found in small]
        over = [name for name, found in zip(over, small, strict=True) if found["median_ratio"] > LIMIT]
        lines.append(f"Asked: ratio at most {LIMIT} at 256 rows per step. " + (f"Over: {over}." if over else "Holds."))
    on_gpu = [found for found in results if found["case"]["device"] == "cuda"]
    for found in on_gpu:
        lines.append(
            f"Asked: at least {GPU_PACE} of the bare loop's pace on a GPU. It is {1 / found['median_ratio']:.3f}."
        )
    if gpu_asked and not on_gpu:
        lines.append("ViT-S on a GPU: left out, torch sees no GPU on this machine.")
    return lines


def describe_machine() -> dict[str, str | int | float]:
    """Returns the processor, the memory, and how busy the machine is."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, str | int | float] = {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def main() -> None:
    """Runs the cases one after another, prints and writes what they took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of mlp, cnn and vit (default: all)")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--batch-sizes", default="256,1024", help="rows per step, all processes")
    parser.add_argument("--threads", type=int, default=1, help="of one process")
    parser.add_argument("--pairs", type=int, default=5, help="how often both loops are timed")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if unknown := set(arguments.networks.split(",")) - set(NETWORKS):
        parser.error(f"no such network: {', '.join(sorted(unknown))}")

    command = shlex.join(["python", "benchmarks/bench_trainer.py", *sys.argv[1:]])
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    setting: dict[str, dict[str, Any]] = {
        "machine": describe_machine(),
        "versions": {"python": platform.python_version()} | versions,
    }
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "sparkdl.standalone"])
    print(HEADER, flush=True)
    results = [compare(case, arguments.pairs) for case in cases_of(arguments)]
    told = verdicts(results, gpu_asked="vit" in arguments.networks.split(","))
    print("", *told, sep="\n")

    record = {"command": command, **setting, "cases": results, "verdicts": told}
    lines = [f"`{command}`", ""]
    for title, values in setting.items():
        lines.append(f"- {title}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    lines += ["", HEADER, *map(row_of, results), "", *told, ""]
    arguments.results.mkdir(parents=True, exist_ok=True)
    chosen = "" if arguments.networks == ",".join(NETWORKS) else "_" + arguments.networks.replace(",", "_")
    target = arguments.results / f"trainer_{datetime.date.today().isoformat()}{chosen}"
    target.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    target.with_suffix(".md").write_text("\n".join(lines))
    print(f"\nWrote {target}.json and {target}.md")


if __name__ == "__main__":
    main()
