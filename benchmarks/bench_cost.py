"""Holds what `sparkdl.parallel.cost` predicts of a step against steps that are taken.

The ranks measure module and links (`sparkdl.parallel.probe.measure`), then take steps under each strategy.

* ``computes``: an MLP of 5 million parameters, on 1 and 2 processes on loopback.
* ``sleeps``: 4 and 8 processes, each a "host" whose link is limited (see ``links.py``). Layers sleep where large layers
  would compute, so that as many ranks fit on a small machine.

A run adds to the results of the same day. The script reports, whatever the numbers. Asked for is a prediction within
25 %.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from links import Place, describe_machine, loopback, open_places, run_ranks
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.objective import Objective
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import Setting
from sparkdl.parallel.candidates import Candidate
from sparkdl.parallel.cost import estimate
from sparkdl.parallel.probe import Measured, measure

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
RUN_SECONDS = 400
LIMIT = 0.25
FEATURES, CLASSES = 64, 10
WARM_UP = 3
"""Steps before those that are timed: DDP overlaps nothing in its first two."""
CONTENDERS = (
    Candidate(),
    Candidate(compression="fp16"),
    Candidate(compression="topk"),
    Candidate(strategy="fsdp"),
    Candidate(strategy="local_sgd", sync_every=4),
    Candidate(strategy="parameter_server", max_staleness=0),
    Candidate(strategy="parameter_server", max_staleness=4),
)


@dataclass(frozen=True)
class Case:
    """A module and where it is trained.

    Attributes:
        name: In the report.
        processes: Ranks.
        width: Of the hidden layers.
        depth: Hidden layers.
        sleep: Seconds of the forward pass for each row, over all layers, and twice as many of the backward pass; 0
            where layers do nothing but compute.
        rate: Of a link; None for loopback.
        rows: Of a rank in a step.
        steps: That are timed.
    """

    name: str
    processes: int
    width: int
    depth: int
    sleep: float
    rate: str | None
    rows: int
    steps: int


CASES = (
    Case("computes", 1, 1100, 4, 0.0, None, 64, 20),
    Case("computes", 2, 1100, 4, 0.0, None, 64, 20),
    Case("sleeps", 4, 700, 4, 0.002, "100mbit", 32, 8),
    Case("sleeps", 4, 700, 4, 0.002, "1gbit", 32, 12),
    Case("sleeps", 8, 700, 4, 0.002, "100mbit", 32, 4),
    Case("sleeps", 8, 700, 4, 0.002, "1gbit", 32, 12),
)


class _Asleep(torch.autograd.Function):
    """Hands on what it gets; takes some time in either pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds * len(rows)
        time.sleep(ctx.seconds)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Sleepy(nn.Linear):
    """A layer that sleeps as long as a larger one would compute."""

    seconds = 0.0

    def forward(self, rows: Tensor) -> Tensor:
        """See `nn.Linear`."""
        return super().forward(rows if not self.seconds else _Asleep.apply(rows, self.seconds))


def make_module(case: Case) -> nn.Module:
    """The same on all ranks."""
    torch.manual_seed(0)
    widths = [FEATURES, *[case.width] * case.depth]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layer = Sleepy(before, after)
        layer.seconds = case.sleep / case.depth
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(case.width, CLASSES))


# One rank.


def run_rank(path: str, case: Case) -> None:
    """Measures, takes steps under each strategy, and writes both on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    objective, config = Objective(nn.CrossEntropyLoss()), TrainConfig(max_epochs=1, batch_size=case.rows * ranks)
    build = optimization_builder(OptimizerRecipe("sgd", 1e-3), None, config, steps_per_epoch=100)
    hosts = [platform.node() if case.rate is None else str(number) for number in range(ranks)]
    random = torch.Generator().manual_seed(rank)
    whole = Batch(
        (torch.randn(case.rows * ranks, FEATURES, generator=random),),
        (torch.randint(CLASSES, (case.rows * ranks,), generator=random),),
    )
    found = measure(make_module(case), objective, build, whole.part(0, 8), hosts=hosts, rows=case.rows)
    seconds: dict[str, list[float]] = {}
    for candidate in CONTENDERS if ranks > 1 else CONTENDERS[:1]:
        if candidate.strategy == "parameter_server" and ranks < 3:
            continue
        strategy = candidate.build()
        place = strategy.replicas(ranks).place_of(rank)
        strategy.prepare(make_module(case), objective, build, config, Setting(whole.part(0, 2), False, hosts))
        rows = case.rows * ranks // place.dp_size if place.dp_rank is not None else 0
        own = whole.part(0, rows)
        times = []
        # The first series brings memory and connections. A series ends when all are through.
        for steps in (WARM_UP, case.steps):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                strategy.train_step(own, float(case.rows * ranks))
            dist.barrier()
            told = torch.tensor((time.perf_counter() - began) / steps, dtype=torch.float64)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            times.append(float(told))
        seconds[str(candidate)] = times[1:]
        strategy.close()
    dist.barrier()
    if rank == 0:
        Path(path).write_text(json.dumps({"measured": found.to_json(), "seconds": seconds}))
    dist.destroy_process_group()


# All ranks.


def run_case(case: Case, places: list[Place]) -> list[dict[str, Any]]:
    """A line for each strategy: seconds measured and predicted."""
    with tempfile.TemporaryDirectory(prefix="bench_cost_") as folder:
        path = f"{folder}/times.json"
        words = [sys.executable, __file__, "--rank", path, json.dumps(asdict(case))]
        run_ranks(places, words, seconds=RUN_SECONDS)
        told = json.loads(Path(path).read_text())
    found = Measured.of_json(told["measured"])
    # Layers that sleep leave the processor to the exchange, unlike those that the ranks measured the overlap with.
    cluster = replace(found.cluster, overlap=1.0) if case.sleep else found.cluster
    lines = []
    for candidate in CONTENDERS:
        if str(candidate) in told["seconds"]:
            measured = statistics.median(told["seconds"][str(candidate)])
            predicted = estimate(candidate, found.module, cluster, case.rows * case.processes).seconds_per_step
            error = predicted / measured - 1
            lines.append({"strategy": str(candidate), "measured": measured, "predicted": predicted, "error": error})
    return [{"case": asdict(case), "probe": told["measured"], **line} for line in lines]


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    heads = ["module", "processes", "link", "strategy", "measured, ms", "predicted, ms", "error"]
    text = ["| " + " | ".join(heads) + " |", "| --- | ---: | --- | --- | ---: | ---: | ---: |"]
    for line in lines:
        case = line["case"]
        cells = [case["name"], str(case["processes"]), case["rate"] or "loopback", line["strategy"]]
        cells += [f"{line['measured'] * 1e3:,.1f}", f"{line['predicted'] * 1e3:,.1f}", f"{line['error']:+.0%}"]
        text.append("| " + " | ".join(cells) + " |")
    within = sum(abs(line["error"]) <= LIMIT for line in lines)
    return "\n".join([*text, "", f"Within {LIMIT:.0%}: {within} of {len(lines)}."])


def main() -> None:
    """Runs every case, prints and writes what was measured and predicted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", default=",".join(map(str, range(len(CASES)))), help="numbers of cases, from 0")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)  # the script starts itself in each place
    arguments = parser.parse_args()
    if arguments.rank:
        path, case = arguments.rank
        run_rank(path, Case(**json.loads(case)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that namespaces go then too
    target = arguments.results / f"cost_{datetime.date.today().isoformat()}"
    record: dict[str, Any] = {
        "command": [],
        "machine": describe_machine(),
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
        "lines": [],
    }
    if target.with_suffix(".json").exists():
        record = json.loads(target.with_suffix(".json").read_text())
    record["command"].append(shlex.join(["python", "benchmarks/bench_cost.py", *sys.argv[1:]]))
    arguments.results.mkdir(parents=True, exist_ok=True)
    for number in map(int, arguments.cases.split(",")):
        case = CASES[number]
        if case.rate is None:
            lines = run_case(case, loopback(case.processes))
        else:
            with open_places(case.processes, case.rate) as (places, _):
                lines = run_case(case, places)
        kept = [line for line in record["lines"] if line["case"] != asdict(case)]
        record["lines"] = sorted([*kept, *lines], key=lambda line: CASES.index(Case(**line["case"])))
        print(table(lines), flush=True)
        head = [*(f"`{command}`" for command in record["command"]), ""]
        for title in ("machine", "versions"):
            head.append(f"- {title}: " + ", ".join(f"{key} {value}" for key, value in record[title].items()))
        target.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        target.with_suffix(".md").write_text("\n".join([*head, "", table(record["lines"]), ""]))
    print(f"Wrote {target}.json and {target}.md")


if __name__ == "__main__":
    main()
