"""Measures every strategy: rows per second, loss after as many rows, time to a loss on slow links, with a slow rank.

* ``throughput``: 2 and 4 processes on loopback train a small MLP for as many rows under every strategy.
* ``links``: 4 processes, each a "host" with a limited link (see ``links.py``), train an MLP of 5 million parameters.
  The loss to be reached is that of plain ``ddp`` after its three epochs.
* ``slow``: one rank sleeps three times as long as the others where a large module would compute: always the same rank,
  or each in its turn. ``ddp`` and the parameter server have the same three ranks that read rows.

Time is that between the ends of epochs, as rank 0 sees them; the first epoch also brings memory and connections, so
that rates leave it out. A run adds to the results of the same day. The script reports, whatever the numbers.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import Place, describe_machine, loopback, open_places, run_ranks
from torch import Tensor, nn

from sparkdl import parallel
from sparkdl.callbacks import Callback, RunView
from sparkdl.config import TrainConfig
from sparkdl.errors import SparkdlError
from sparkdl.parallel import Strategy
from sparkdl.standalone import TensorRows, fit_module

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=120)
FEATURES, CLASSES, HELD_OUT = 64, 10, 1024
PAUSE = 0.1
"""Seconds that a step of a rank sleeps in ``slow``; three times as many in that of the slow rank."""

Line = dict[str, Any]
Make = Callable[[], Strategy]


@dataclass(frozen=True)
class Case:
    """What is trained, and where.

    Attributes:
        part: "throughput", "links" or "slow".
        processes: Ranks.
        rate: Of a link; None for loopback.
        width: Of the three hidden layers.
        batch_size: Rows of a step over all ranks.
        steps: Of an epoch.
        epochs: Of a fit; by contender where it is a dict, "" for the others.
        slow: "" for none, "always" for the first rank, "in turn".
    """

    part: str
    processes: int
    rate: str | None
    width: int
    batch_size: int
    steps: int
    epochs: dict[str, int]
    slow: str = ""

    @property
    def title(self) -> str:
        """In the report."""
        where = f"{self.processes} processes, {self.rate or 'loopback'}"
        return f"{where}, one slow {self.slow}" if self.slow else where


def cases() -> list[Case]:
    """All that is measured."""
    few = {"": 5, "ddp": 3, "ddp fp16": 4, "parameter_server": 2}
    return [
        *(Case("throughput", ranks, None, 512, 256, 20, {"": 4}) for ranks in (2, 4)),
        *(Case("links", 4, rate, 1300, 128, 8, few) for rate in ("100mbit", "1gbit")),
        *(Case("slow", ranks, None, 64, 96, 18, {"": 3}, slow) for slow in ("always", "in turn") for ranks in (3, 4)),
    ]


def contenders(case: Case) -> dict[str, Make]:
    """Strategies by name; those whose class is not there are left out."""
    halves = {"0": "colwise", "2": "rowwise"}
    makers: dict[str, Make] = {
        "ddp": lambda: parallel.DataParallel(),
        "ddp fp16": lambda: parallel.DataParallel(compression="fp16"),
        "ddp int8": lambda: parallel.DataParallel(compression="int8"),
        "ddp topk": lambda: parallel.DataParallel(compression=parallel.TopK(ratio=0.01)),
        "ddp powersgd": lambda: parallel.DataParallel(compression=parallel.PowerSGD(rank=2, start_step=0)),
        "local_sgd": lambda: parallel.LocalSGD(sync_every=8),
        "diloco": lambda: parallel.LocalSGD(sync_every=8, outer="nesterov"),
        "gossip": lambda: parallel.LocalSGD(sync_every=8, outer="ring"),
        "parameter_server": lambda: parallel.ParameterServer(max_staleness=4),
    }
    sharing: dict[str, Make] = {
        "parameter_server, synchronous": lambda: parallel.ParameterServer(max_staleness=0),
        "fsdp": lambda: parallel.FullyShardedDataParallel(),
        "hsdp": lambda: parallel.HybridShardedDataParallel(shard_size=2),
        "pipeline": lambda: parallel.Pipeline(stages=2),
        "tensor_parallel": lambda: parallel.TensorParallel(halves, size=2),
        "hybrid": lambda: parallel.Hybrid(),
    }
    if case.part == "slow":
        name = "ddp" if case.processes == 3 else "parameter_server"
        return {name: makers[name]}
    found = {**makers, **sharing} if case.part == "throughput" else makers
    if case.processes == 2:
        found.pop("hsdp", None)
    return found


class Slow(nn.Module):
    """Sleeps in training, one rank longer than the others."""

    def __init__(self, inner: nn.Module, which: str) -> None:
        super().__init__()
        self.inner = inner
        self.which = which
        self.steps = 0

    def forward(self, rows: Tensor) -> Tensor:
        """See `nn.Module`."""
        if self.training and len(rows) > 2:
            late = self.steps % 3 if self.which == "in turn" else 0
            time.sleep(PAUSE * (3 if dist.get_rank() == late else 1))
            self.steps += 1
        scores: Tensor = self.inner(rows)
        return scores


class Clock(Callback):
    """Notes when training began, and when each epoch was over."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_fit_start(self, run: RunView) -> None:
        """See `Callback`."""
        self.ends.append(time.perf_counter())

    def on_epoch_end(self, run: RunView) -> None:
        """See `Callback`."""
        self.ends.append(time.perf_counter())


def make_module(case: Case) -> nn.Module:
    """The same on all ranks: a chain of four layers."""
    torch.manual_seed(0)
    widths = [FEATURES, *[case.width] * 3]
    parts: list[nn.Module] = []
    for place, before in enumerate(widths):
        after = widths[place + 1] if place < 3 else CLASSES
        parts += [nn.Linear(before, after), nn.ReLU()]
    chain = nn.Sequential(*parts[:-1])
    return Slow(chain, case.slow) if case.slow else chain


def make_rows(number: int, seed: int) -> TensorRows:
    """Rows whose class is the largest of some random projections."""
    random = torch.Generator().manual_seed(1)
    projections = torch.randn(FEATURES, CLASSES, generator=random)
    random.manual_seed(seed)
    features = torch.randn(number, FEATURES, generator=random)
    return TensorRows(features, (features @ projections).argmax(1))


# One rank.


def run_rank(path: str, case: Case, names: list[str]) -> None:
    """Trains under one strategy after the other; rank 0 writes a line for each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    rows, held_out = make_rows(case.batch_size * case.steps, 2), make_rows(HELD_OUT, 3)
    for name in names:
        clock = Clock()
        config = TrainConfig(
            max_epochs=case.epochs.get(name, case.epochs[""]),
            batch_size=case.batch_size,
            device="cpu",
            verbose=False,
        )
        line: Line = {"contender": name}
        try:
            fitted = fit_module(
                make_module(case),
                rows,
                loss="cross_entropy",
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
                strategy=contenders(case)[name](),
                config=config,
                callbacks=[clock],
            )
            with torch.inference_mode():
                scores = fitted.module(held_out.batch.inputs[0])
                line["held_out"] = nn.functional.cross_entropy(scores, held_out.batch.labels[0]).item()
            line["losses"] = [record["loss"] for record in fitted.history]
            line["seconds"] = [after - before for before, after in itertools.pairwise(clock.ends)]
        except (SparkdlError, ImportError, AttributeError) as error:  # the same on all ranks
            line["left_out"] = f"{type(error).__name__}: {error}"
        dist.barrier()
        if dist.get_rank() == 0:
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")
    dist.barrier()
    dist.destroy_process_group()


# All ranks.


def run_case(case: Case, places: list[Place], names: list[str], seconds: float) -> list[Line]:
    """A line for each contender, also where one of them breaks the world."""
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="bench_strategies_") as folder:
        while len(lines) < len(names):
            path = Path(f"{folder}/{len(lines)}.jsonl")
            path.touch()
            left = names[len(lines) :]
            words = [sys.executable, __file__, "--rank", str(path), json.dumps(asdict(case)), json.dumps(left)]
            failed = ""
            try:
                run_ranks(places, words, seconds=seconds)
            except RuntimeError as error:
                failed = str(error).strip().splitlines()[-1]
                print(error, file=sys.stderr)
            lines += [json.loads(text) for text in path.read_text().splitlines()]
            if failed and len(lines) < len(names):
                lines.append({"contender": names[len(lines)], "left_out": failed})
    return [{"part": case.part, "case": case.title, "rows": case.batch_size * case.steps, **line} for line in lines]


# Reporting.


def rate_of(line: Line) -> float:
    """Rows per second in the median epoch after the first."""
    return float(line["rows"] / statistics.median(line["seconds"][1:] or line["seconds"]))


def seconds_to(line: Line, loss: float) -> float | None:
    """From the first step to the end of the first epoch whose mean loss is as small; None where there is none."""
    for epoch, found in enumerate(line["losses"]):
        if found <= loss:
            return float(sum(line["seconds"][: epoch + 1]))
    return None


def table(lines: Iterable[Line]) -> str:
    """A Markdown table per case."""
    text = []
    by_case: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        by_case.setdefault((line["part"], line["case"]), []).append(line)
    for (part, case), group in by_case.items():
        measured = [line for line in group if "seconds" in line]
        plain = next((line for line in measured if line["contender"] == "ddp"), None)
        # One per cent more: whoever rounds a little differently must not need a further epoch for it.
        target = 1.01 * plain["losses"][-1] if plain is not None and part == "links" else None
        heads = ["strategy", "rows/s", "spread", "loss of the last epoch", "held-out loss"]
        heads += ["epochs", f"s to {target:.3f}", "times as fast"] if target is not None else []
        text += [f"{part}, {case}:", "", "| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
        for line in measured:
            later = line["seconds"][1:] or line["seconds"]
            spread = (max(later) - min(later)) / statistics.median(later)
            cells = [line["contender"], f"{rate_of(line):,.0f}", f"{spread:.0%}"]
            cells += [f"{line['losses'][-1]:.3f}", f"{line['held_out']:.3f}"]
            if target is not None and plain is not None:
                own, whole = seconds_to(line, target), seconds_to(plain, target)
                assert whole is not None
                cells += [str(len(line["losses"]))]
                cells += ["not reached", ""] if own is None else [f"{own:.1f}", f"{whole / own:.1f}"]
            text.append("| " + " | ".join(cells) + " |")
        text += [""] + [f"- {one['contender']}: {one['left_out']}" for one in group if "left_out" in one] + [""]
    return "\n".join(text)


def main() -> None:
    """Runs the cases that were asked for, and adds what was measured to the results of the day."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", default=",".join(map(str, range(len(cases())))), help="numbers of cases, from 0")
    parser.add_argument("--contenders", help="names, by comma; all by default")
    parser.add_argument("--seconds", type=float, default=600, help="after so long the ranks of one case are ended")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)  # the script starts itself in each place
    arguments = parser.parse_args()
    if arguments.rank:
        path, case, names = arguments.rank
        run_rank(path, Case(**json.loads(case)), json.loads(names))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that namespaces go then too
    target = arguments.results / f"strategies_{datetime.date.today().isoformat()}"
    record: dict[str, Any] = {
        "command": [],
        "machine": describe_machine(),
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
        "lines": [],
    }
    if target.with_suffix(".json").exists():
        record = json.loads(target.with_suffix(".json").read_text())
    record["command"].append(shlex.join(["python", "benchmarks/bench_strategies.py", *sys.argv[1:]]))
    arguments.results.mkdir(parents=True, exist_ok=True)
    for number in map(int, arguments.cases.split(",")):
        case = cases()[number]
        asked = arguments.contenders.split(",") if arguments.contenders else list(contenders(case))
        names = [name for name in contenders(case) if name in asked]
        if case.rate is None:
            found = run_case(case, loopback(case.processes), names, arguments.seconds)
        else:
            with open_places(case.processes, case.rate) as (places, _):
                found = run_case(case, places, names, arguments.seconds)
        anew = {(line["part"], line["case"], line["contender"]) for line in found}
        kept = [one for one in record["lines"] if (one["part"], one["case"], one["contender"]) not in anew]
        order = {case.title: place for place, case in enumerate(cases())}
        ranking = {name: place for case in cases() for place, name in enumerate(contenders(case))}
        record["lines"] = sorted([*kept, *found], key=lambda line: (order[line["case"]], ranking[line["contender"]]))
        print(table(found), flush=True)
        head = [*(f"`{command}`" for command in record["command"]), ""]
        for title in ("machine", "versions"):
            head.append(f"- {title}: " + ", ".join(f"{key} {value}" for key, value in record[title].items()))
        target.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        target.with_suffix(".md").write_text("\n".join([*head, "", table(record["lines"])]))
    print(f"Wrote {target}.json and {target}.md")


if __name__ == "__main__":
    main()
