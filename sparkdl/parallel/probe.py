"""What the ranks measure before a strategy is chosen: the module's compute, their links, and how alike they are.

Every rank computes at the same time as the others, as it will when it trains, so that ranks that share a processor show
what that costs. What comes of it is equal on all ranks.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from sparkdl.batch import Batch
from sparkdl.io.exchange import gather_texts
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization
from sparkdl.parallel.alpha_beta import Link, fit_link, ring_link
from sparkdl.parallel.facts import ClusterFacts, ModuleFacts
from sparkdl.parallel.measuring import Timing, copy_seconds_per_byte, count_module, fitting, time_module

__all__ = ["Measured", "measure", "measure_all_reduce"]

logger = logging.getLogger(__name__)

_SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)  # bytes: 1 KiB to 16 MiB
_REPEATS = 9
_LONG, _ENOUGH = 0.3, 1.0  # seconds of an all-reduce: it is repeated less often; larger ones are left out
_OVERLAP_SIZES = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
_OVERLAP_REPEATS = 5
_SIDE = 256
_MEMORY = 0.9  # of what is free
_ROWS = 32


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured; equal on all ranks.

    Attributes:
        module: What the module weighs and takes: means over the ranks.
        cluster: The ranks and their links.
        seconds: How long it took to measure.
    """

    module: ModuleFacts
    cluster: ClusterFacts
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        module = {**asdict(self.module), "layer_parameter_bytes": list(self.module.layer_parameter_bytes)}
        return {"module": module, "cluster": self.cluster.to_json(), "seconds": self.seconds}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "Measured":
        """From what `to_json` returned."""
        module = {**values["module"], "layer_parameter_bytes": tuple(values["module"]["layer_parameter_bytes"])}
        return cls(ModuleFacts(**module), ClusterFacts.of_json(values["cluster"]), values["seconds"])


def measure(
    module: nn.Module,
    objective: Objective,
    build: BuildOptimization,
    example: Batch,
    *,
    hosts: Sequence[str] = (),
    rows: int = _ROWS,
    budget_seconds: float = 60.0,
) -> Measured:
    """Measure the module and the ranks; a collective, which leaves no trace.

    A rank that fails to compute raises alone, as it would in training.

    Args:
        module: The module, on its device; a copy of it is trained.
        objective: The loss.
        build: Makes the optimization of the copy.
        example: Some of this rank's rows, with all columns; may be none.
        hosts: Host of every rank; none: one host.
        rows: Rows of a step of a rank, about as many as it will have.
        budget_seconds: It takes no longer, apart from a step or an exchange that takes very long by itself; it is
            usually done after a tenth.
    """
    began = time.perf_counter()
    device = next(module.parameters()).device
    ranks = dist.get_world_size()
    hosts = list(hosts) or [""] * ranks
    memory = _free_bytes(device, sum(host == hosts[dist.get_rank()] for host in hosts))
    facts = count_module(module, objective, example)
    dist.barrier()
    timing: Timing | None
    try:
        timing = time_module(module, objective, build, example, rows=rows, budget_seconds=min(0.1 * budget_seconds, 2))
    except torch.OutOfMemoryError:
        timing = None  # weighing has to do: whoever does not fit at all is told apart by its memory
    own = {
        "timing": None if timing is None else asdict(timing),
        "memory": memory,
        "copy": copy_seconds_per_byte(device),
    }
    everyone = [json.loads(text) for text in gather_texts(json.dumps(own), dist.group.WORLD)]
    inside, between = _measure_links(hosts, device, 0.3 * budget_seconds)
    overlap = _measure_overlap(device) if ranks > 1 else 1.0
    cluster = ClusterFacts(
        world_size=ranks,
        between=between,
        inside=inside,
        ranks_per_host=max(hosts.count(host) for host in set(hosts)),
        memory_bytes=min(rank["memory"] for rank in everyone),
        copied_bytes_per_second=1 / statistics.fmean(rank["copy"] for rank in everyone),
        overlap=overlap,
        backend="nccl" if dist.get_backend() == "nccl" else "gloo",
    )
    timings = [_timing_of(rank["timing"]) for rank in everyone if rank["timing"] is not None]
    if len(timings) == ranks:
        facts, cluster = _with_times(facts, cluster, timings)
    spent = _slowest(time.perf_counter() - began, device)
    logger.info("measured module and links in %.1f s", spent)
    return Measured(_of_rank_0(facts), cluster, spent)


def _with_times(
    facts: ModuleFacts, cluster: ClusterFacts, timings: Sequence[Timing]
) -> tuple[ModuleFacts, ClusterFacts]:
    """What the ranks' steps say: means for the module, and how the ranks differ."""
    fixed, per_row = zip(*(_line(one) for one in timings), strict=True)
    passes = [(one.forward[1] + one.backward[1]) / one.rows[1] for one in timings]
    mean = statistics.fmean(passes)
    module = replace(
        facts,
        seconds_per_row=statistics.fmean(per_row),
        fixed_seconds=statistics.fmean(fixed),
        optimizer_seconds=statistics.fmean(one.optimizer for one in timings),
        backward_share=statistics.fmean(one.backward[1] / (one.forward[1] + one.backward[1]) for one in timings),
        optimizer_state_bytes=timings[0].optimizer_state_bytes,
    )
    slowdowns = tuple(one / mean for one in passes)
    return module, replace(cluster, slowdowns=slowdowns, jitter=statistics.fmean(one.jitter for one in timings))


def _line(timing: Timing) -> tuple[float, float]:
    both = [forward + backward for forward, backward in zip(timing.forward, timing.backward, strict=True)]
    return fitting(timing.rows, (both[0], both[1]))


def _timing_of(values: Mapping[str, Any]) -> Timing:
    pairs = {name: tuple(values[name]) for name in ("rows", "forward", "backward")}
    return Timing(**{**values, **pairs})


# ---- links -----------------------------------------------------------------------------------------------------------
def _measure_links(hosts: Sequence[str], device: torch.device, budget_seconds: float) -> tuple[Link | None, Link]:
    """The link inside hosts, None where they have one rank each, and that between hosts; equal on all ranks."""
    members = [[rank for rank, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)]
    firsts = [ranks[0] for ranks in members]
    largest = max(map(len, members))
    inside = between = None
    if len(members) > 1:
        between = _measure_groups([firsts], device, budget_seconds / 2)
    if largest > 1:
        # Hosts of one size, so that all their groups take as many rounds.
        groups = [ranks for ranks in members if len(ranks) == largest]
        inside = _measure_groups(groups, device, budget_seconds / 2)
    between, inside = _agreed(between, device), _agreed(inside, device)
    alone = Link(0.0, 1 / copy_seconds_per_byte(device))  # one rank sends nothing
    return inside, between or inside or alone


def _measure_groups(groups: Sequence[Sequence[int]], device: torch.device, budget_seconds: float) -> Link | None:
    """The link between neighbours of groups of one size, which measure at the same time; None on ranks in none."""
    if len(groups) == 1 and len(groups[0]) == dist.get_world_size():
        return ring_link(measure_all_reduce(None, device, budget_seconds), len(groups[0]))
    own, mine = None, None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            own, mine = group, ranks
    link = None
    if own is not None and mine is not None:
        link = ring_link(measure_all_reduce(own, device, budget_seconds), len(mine))
    dist.barrier()
    if own is not None:
        dist.destroy_process_group(own)
    return link


def measure_all_reduce(group: dist.ProcessGroup | None, device: torch.device, budget_seconds: float) -> Link:
    """Alpha and beta of whole all-reduces of 1 KiB to 16 MiB in a group; larger sizes are left out when time is up.

    Args:
        group: Ranks of it alone call it; None: all.
        device: Where tensors lie to travel.
        budget_seconds: After so long no further size is tried.
    """
    end = time.perf_counter() + budget_seconds
    sizes, seconds = [], []
    for size in _SIZES:
        tensor = torch.zeros(size // 4, device=device)
        dist.all_reduce(tensor, group=group)
        times = []
        for _ in range(_REPEATS):
            dist.barrier(group)
            begun = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            # The slowest rank decides, here and on when to stop.
            spent, late = _largest(group, device, time.perf_counter() - begun, time.perf_counter() - end)
            times.append(spent)
            if late > 0 or (spent > _LONG and len(times) >= 2):
                break
        sizes.append(size)
        seconds.append(statistics.median(times))
        if (late > 0 or seconds[-1] > _ENOUGH) and len(sizes) > 1:
            break
    return fit_link(sizes, seconds)


def _measure_overlap(device: torch.device) -> float:
    """The part of an all-reduce that costs nothing beside matrix products that take as long; equal on all ranks."""

    def timed(act: Callable[[], object]) -> float:
        times = []
        for _ in range(_OVERLAP_REPEATS):
            dist.barrier()
            begun = time.perf_counter()
            act()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times += _largest(None, device, time.perf_counter() - begun)
        return statistics.median(times)

    for size in _OVERLAP_SIZES:
        tensor = torch.zeros(size // 4, device=device)
        exchanging = timed(lambda tensor=tensor: dist.all_reduce(tensor))  # type: ignore[misc]
        if exchanging > 0.1 * _LONG:
            break
    matrix = torch.zeros(_SIDE, _SIDE, device=device)
    products = max(1, round(exchanging / (timed(lambda: [matrix @ matrix for _ in range(10)]) / 10)))

    def compute() -> None:
        for _ in range(products):
            torch.mm(matrix, matrix)

    def both() -> None:
        work = dist.all_reduce(tensor, async_op=True)
        compute()
        work.wait()

    computing, together = timed(compute), timed(both)
    return min(1.0, max(0.0, (computing + exchanging - together) / min(computing, exchanging)))


def _largest(group: dist.ProcessGroup | None, device: torch.device, *values: float) -> list[float]:
    told = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
    found: list[float] = told.tolist()
    return found


def _slowest(seconds: float, device: torch.device) -> float:
    return _largest(None, device, seconds)[0]


def _agreed(link: Link | None, device: torch.device) -> Link | None:
    """The mean of what the ranks found who took part; None where nobody did."""
    own = [0.0, 0.0, 0.0] if link is None else [1.0, link.latency_seconds, 1 / link.bytes_per_second]
    told = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(told)
    count, latency, slope = told.tolist()
    return Link(latency / count, count / slope) if count else None


def _of_rank_0(facts: ModuleFacts) -> ModuleFacts:
    """Ranks have the same module, but activations that were counted on other rows."""
    values = json.loads(gather_texts(json.dumps(asdict(facts)), dist.group.WORLD)[0])
    return ModuleFacts(**{**values, "layer_parameter_bytes": tuple(values["layer_parameter_bytes"])})


def _free_bytes(device: torch.device, ranks_on_host: int) -> int:
    """What this rank may use: the memory of its device, or its part of the host's; the module is in it already."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device)
        return int(_MEMORY * (torch.cuda.mem_get_info(device)[0] + cached))
    return int(_MEMORY * psutil.virtual_memory().available) // ranks_on_host
