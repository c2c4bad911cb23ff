"""What a step costs under each way to train in parallel: seconds, rows per second, bytes of memory.

Pure functions of `ModuleFacts` and `ClusterFacts`: they count what is sent and when, and what has to be waited for.
They know nothing of caches, of other load, or of how much less a lossy way learns from as many rows.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sparkdl.parallel.alpha_beta import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from sparkdl.parallel.candidates import COMPRESSORS, Candidate, Compressor, candidates_for
from sparkdl.parallel.facts import ClusterFacts, ModuleFacts

__all__ = ["Estimate", "estimate", "overlapped_all_reduce", "rank_strategies", "table"]

MIB = 1 << 20
_FIRST_BUCKET, _BUCKET = 1 * MIB, 25 * MIB  # DDP's own
_SIMPLER = 1.05  # a simpler strategy is preferred where it takes at most so many times the seconds of the fastest
# What fully_shard adds to a layer: bytes that it copies in and out of its buffers, and time of the host.
_SHARDED_PASSES, _SHARDED_LAYER_SECONDS = 30, 0.5e-3
_SERVING = 1.6  # of a push's seconds for push and pull: between 1, both at once, and 2; measured with 3 and 7 workers
_LOSSY = "another result than ddp"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a candidate is expected to cost.

    Attributes:
        candidate: Whose cost it is.
        seconds_per_step: Of one step of the slowest rank.
        compute_seconds: The part in which it computes.
        rows_per_second: Of all ranks.
        memory_bytes: Of the rank that needs most.
        feasible: True where nothing is known to be in its way.
        reason: What is in its way, or what to know about it.
    """

    candidate: Candidate
    seconds_per_step: float
    compute_seconds: float
    rows_per_second: float
    memory_bytes: float
    feasible: bool
    reason: str = ""

    @property
    def strategy(self) -> str:
        """Its name."""
        return self.candidate.strategy


@dataclass(frozen=True, slots=True)
class _Case:
    """What all models are given, and a few products of it."""

    candidate: Candidate
    module: ModuleFacts
    cluster: ClusterFacts
    batch_size: int
    micro_batch_size: int | None

    def rows(self, replicas: int) -> int:
        return math.ceil(self.batch_size / replicas)

    def compute(self, rows: int, pace: float) -> float:
        return self.module.compute_seconds(rows, self.micro_batch_size) * pace

    def activations(self, rows: int) -> float:
        return self.module.activation_bytes_per_row * min(rows, self.micro_batch_size or rows)

    @property
    def weights_and_all(self) -> float:
        """Bytes of parameters, gradients and the optimizer's state."""
        module = self.module
        return module.parameter_bytes + module.trainable_parameter_bytes + module.optimizer_state_bytes


@dataclass(frozen=True, slots=True)
class _Cost:
    seconds: float
    compute: float
    memory: float
    obstacle: str = ""


# ---- each strategy ---------------------------------------------------------------------------------------------------
def overlapped_all_reduce(
    gradient_bytes: Sequence[float], backward_seconds: float, all_reduce_seconds: Callable[[float], float]
) -> tuple[float, float]:
    """Seconds from the begin of the backward pass to the end of the last all-reduce, as DDP does it.

    Gradients come in the reverse order of the layers, and go into buckets; a bucket goes on its way when it is full and
    those before it are through (Li et al., "PyTorch distributed: experiences on accelerating data parallel training",
    VLDB 2020). A layer takes the part of the backward pass that it has of the bytes.

    Args:
        gradient_bytes: Of each layer, in the order of the forward pass.
        backward_seconds: Of the backward pass alone.
        all_reduce_seconds: Of an all-reduce of so many bytes.

    Returns:
        These seconds, and those of all all-reduces.
    """
    total, limit = sum(gradient_bytes) or 1.0, _FIRST_BUCKET
    done = filled = end = sent = 0.0
    for size in reversed(gradient_bytes):
        done += size
        filled += size
        if filled >= limit or done >= total:
            ready = backward_seconds * min(done / total, 1.0)
            seconds = all_reduce_seconds(filled) if filled else 0.0
            sent += seconds
            end = max(end, ready) + seconds
            filled, limit = 0.0, _BUCKET
    return max(end, backward_seconds), sent


def _ddp(case: _Case) -> _Cost:
    module, cluster, name = case.module, case.cluster, case.candidate.compression
    ranks = cluster.world_size
    rows = case.rows(ranks)
    pace = cluster.pace_together(ranks)
    busy = case.compute(rows, pace)
    # Only the last micro-batch's backward pass reduces.
    micro_rows = min(rows, case.micro_batch_size or rows)
    backward = module.compute_seconds(micro_rows) * pace * module.backward_share
    # A thread of its own compresses and sends.
    exchange = cluster.all_reduce_seconds if name is None else _compressed(COMPRESSORS[name], module, cluster)
    after, sent = overlapped_all_reduce(module.gradient_bytes, backward, exchange)
    after = cluster.beside(backward, sent, after)
    compute = busy + module.optimizer_seconds * pace
    # PowerSGD, top-k and int8 keep what they did not send.
    kept = module.trainable_parameter_bytes if name not in (None, "fp16") else 0
    memory = case.weights_and_all + module.buffer_bytes + case.activations(rows) + kept
    return _Cost(busy - backward + after + module.optimizer_seconds * pace, compute, memory)


def _compressed(compressor: Compressor, module: ModuleFacts, cluster: ClusterFacts) -> Callable[[float], float]:
    """Seconds until a part of the gradients, of so many bytes, is compressed and exchanged."""
    ranks = cluster.world_size
    part = compressor.sent(module) / (module.trainable_parameter_bytes or 1)

    def exchange(size: float) -> float:
        if ranks == 1:
            return 0.0
        packing = compressor.passes * size / cluster.copied_bytes_per_second
        if compressor.gathers:
            return packing + ring_all_gather(size * part * ranks, ranks, cluster.neighbours)
        return packing + cluster.all_reduce_seconds(size * part)

    return exchange


def _sharded(case: _Case) -> _Cost:
    """Layers are gathered for forward and backward pass, the next one while one computes; gradients are scattered.

    1.5 times the bytes of an all-reduce (Rajbhandari et al., "ZeRO", 2020, section 7), and twice on gloo, which reduces
    whole tensors.
    """
    module, cluster = case.module, case.cluster
    ranks = cluster.world_size
    shard = ranks if case.candidate.strategy == "fsdp" else case.candidate.shard_size
    copies = ranks // shard
    link = cluster.link_of(shard)
    rows = case.rows(ranks)
    pace = cluster.pace_together(ranks)
    pieces = 1 if case.micro_batch_size is None else max(1, math.ceil(rows / case.micro_batch_size))
    reduce_scatter = ring_all_reduce if cluster.backend == "gloo" else ring_reduce_scatter
    gathers = [ring_all_gather(size, shard, link) for size in module.layers]
    scatters = [reduce_scatter(size, shard, link) for size in module.gradient_bytes]
    across = ring_all_reduce(module.trainable_parameter_bytes / shard, copies, cluster.link_across(shard))
    busy = case.compute(rows, pace)
    if cluster.backend == "gloo":  # a GPU's host is ahead of it
        copied = _SHARDED_PASSES * module.parameter_bytes / cluster.copied_bytes_per_second
        busy += pieces * (copied + module.num_layers * _SHARDED_LAYER_SECONDS)
    computing = busy * (1 - module.backward_share), busy * module.backward_share
    in_forward = sum(gathers) * pieces
    forward = max(computing[0], in_forward - gathers[0]) + gathers[0]
    in_backward = in_forward + sum(scatters) + across
    last = scatters[0] + across / module.num_layers
    backward = max(computing[1], in_backward - last) + last
    forward = cluster.beside(computing[0], in_forward, forward)
    backward = cluster.beside(computing[1], in_backward, backward)
    optimizer = module.optimizer_seconds * pace / shard
    # A layer, the one that is gathered meanwhile, and the gradients of one.
    whole_layers = min(3 * module.largest_layer_bytes, module.parameter_bytes + module.trainable_parameter_bytes)
    memory = case.weights_and_all / shard + whole_layers + module.buffer_bytes + case.activations(rows)
    obstacle = "" if copies * shard == ranks else f"{shard} ranks do not divide {ranks}"
    return _Cost(forward + backward + optimizer, busy + optimizer, memory, obstacle)


def _local_sgd(case: _Case) -> _Cost:
    """The weights are averaged once in several steps (Stich 2019; Douillard et al. 2023)."""
    module, cluster, every = case.module, case.cluster, case.candidate.sync_every
    ranks = cluster.world_size
    rows = case.rows(ranks)
    pace = cluster.pace_together(ranks, every)
    compute = case.compute(rows, pace) + module.optimizer_seconds * pace
    state = module.trainable_parameter_bytes + module.buffer_bytes
    if case.candidate.outer == "ring":
        exchange = cluster.neighbours.seconds(state) if ranks > 1 else 0.0  # both neighbours, and both directions
        exchange *= min(ranks - 1, 2)
    else:
        exchange = cluster.all_reduce_seconds(state)
    outer = 2 * module.trainable_parameter_bytes if case.candidate.outer == "nesterov" else 0
    memory = case.weights_and_all + module.buffer_bytes + case.activations(rows) + outer
    return _Cost(compute + exchange / every, compute, memory)


def _parameter_server(case: _Case) -> _Cost:
    """Workers push gradients and pull weights; a server's link carries those of all workers."""
    module, cluster, servers = case.module, case.cluster, case.candidate.num_servers
    workers = cluster.world_size - servers
    if workers < 1:
        return _Cost(math.inf, 0.0, 0.0, f"{servers} servers leave no workers")
    rows = case.rows(workers)
    link = cluster.neighbours
    size = module.trainable_parameter_bytes
    own = servers * link.latency_seconds + size / link.bytes_per_second
    everyone = workers * (link.latency_seconds + size / servers / link.bytes_per_second)
    updating = module.optimizer_seconds / servers
    if case.candidate.max_staleness == 0:
        pace = cluster.pace_together(workers)
        compute = case.compute(rows, pace)
        seconds = compute + 2 * max(own, everyone) + updating
    else:
        # A server serves one worker at a time, while others compute: what it sends and receives overlaps in part.
        pace = cluster.pace_alone
        compute = case.compute(rows, pace)
        seconds = max(compute + 2 * own + updating, _SERVING * everyone + workers * updating)
    worker = module.parameter_bytes + size + module.buffer_bytes + case.activations(rows)
    server = module.parameter_bytes + (2 * size + module.optimizer_state_bytes) / servers
    return _Cost(seconds, compute, max(worker, server))


def _pipeline(case: _Case) -> _Cost:
    """Stages wait for the first and the last micro-batches: a part of (p - 1) / (m + p - 1) of the time.

    Huang et al., "GPipe", 2019; Narayanan et al., "Efficient large-scale language model training on GPU clusters using
    Megatron-LM", 2021.
    """
    module, cluster = case.module, case.cluster
    stages, pieces, ranks = case.candidate.stages, case.candidate.micro_batches, cluster.world_size
    if ranks % stages:
        return _Cost(math.inf, 0.0, 0.0, f"{stages} stages do not divide {ranks} ranks")
    copies = ranks // stages
    micro_rows = math.ceil(case.rows(copies) / pieces)
    largest = module.largest_stage(stages)
    pace = cluster.pace_together(ranks)
    one = module.compute_seconds(micro_rows) * largest * pace
    handing_on = 2 * cluster.link_of(stages).seconds(module.boundary_bytes_per_row * micro_rows) if stages > 1 else 0.0
    rounds = pieces + stages - 1
    reducing = ring_all_reduce(module.trainable_parameter_bytes * largest, copies, cluster.link_across(stages))
    optimizer = module.optimizer_seconds * largest * pace
    in_flight = min(stages, pieces) * micro_rows
    memory = case.weights_and_all * largest + module.buffer_bytes
    memory += module.activation_bytes_per_row * in_flight / stages
    obstacle = ""
    if module.batch_norm:
        obstacle = "its BatchNorm layers would see micro-batches"
    elif module.chain_length < stages:
        obstacle = f"{stages} stages, but the module is a chain of {module.chain_length}"
    return _Cost(rounds * (one + handing_on) + reducing + optimizer, pieces * one + optimizer, memory, obstacle)


def _tensor_parallel(case: _Case) -> _Cost:
    """Every pair of layers adds up its activations once in either pass (Shoeybi et al., "Megatron-LM", 2019)."""
    module, cluster, size = case.module, case.cluster, case.candidate.tensor_size
    ranks = cluster.world_size
    if ranks % size:
        return _Cost(math.inf, 0.0, 0.0, f"{size} ranks do not divide {ranks}")
    rows = case.rows(ranks // size)
    pace = cluster.pace_together(ranks)
    compute = case.compute(rows, pace) / size
    pairs = math.ceil(module.num_layers / 2)
    one = ring_all_reduce(module.boundary_bytes_per_row * rows, size, cluster.link_of(size))
    across = ring_all_reduce(module.trainable_parameter_bytes / size, ranks // size, cluster.link_across(size))
    optimizer = module.optimizer_seconds * pace / size
    memory = case.weights_and_all / size + module.buffer_bytes + case.activations(rows) * (1 + 1 / size) / 2
    seconds = compute + 2 * pairs * one + across + optimizer
    return _Cost(seconds, compute + optimizer, memory, "it needs a plan of layers, which nobody can guess")


_MODELS: dict[str, Callable[[_Case], _Cost]] = {
    "ddp": _ddp,
    "fsdp": _sharded,
    "hsdp": _sharded,
    "local_sgd": _local_sgd,
    "parameter_server": _parameter_server,
    "pipeline": _pipeline,
    "tensor_parallel": _tensor_parallel,
}


# ---- all of them -----------------------------------------------------------------------------------------------------
def estimate(
    candidate: Candidate,
    module: ModuleFacts,
    cluster: ClusterFacts,
    batch_size: int,
    micro_batch_size: int | None = None,
) -> Estimate:
    """What a step of one candidate costs.

    Args:
        candidate: The strategy and its options.
        module: What it trains.
        cluster: Where.
        batch_size: Rows of a step over all ranks.
        micro_batch_size: Rows of one forward of a rank; None: all that it has.
    """
    case = _Case(candidate, module, cluster, batch_size, micro_batch_size)
    cost = _MODELS[candidate.strategy](case)
    reason = cost.obstacle
    limit = cluster.memory_bytes
    if not reason and limit is not None and cost.memory > limit:
        reason = f"needs {_bytes(cost.memory)} of {_bytes(limit)} per rank"
        reason += _advice(case, limit)
    feasible = not reason
    if feasible and not candidate.exact:
        reason = _LOSSY
    pace = batch_size / cost.seconds if cost.seconds else math.inf
    return Estimate(candidate, cost.seconds, cost.compute, pace, cost.memory, feasible, reason)


def _advice(case: _Case, limit: float) -> str:
    """By which microBatchSize the candidate would fit, if by any."""
    rows = case.micro_batch_size or case.batch_size
    while rows > 1:
        rows //= 2
        if _MODELS[case.candidate.strategy](replace(case, micro_batch_size=rows)).memory <= limit:
            return f"; microBatchSize={rows} would fit"
    return ""


def rank_strategies(
    module: ModuleFacts,
    cluster: ClusterFacts,
    batch_size: int,
    *,
    micro_batch_size: int | None = None,
    exact: bool = True,
    candidates: Iterable[Candidate] | None = None,
) -> list[Estimate]:
    """All candidates, the best first: the one to choose is the first, if it is feasible.

    The best is the simplest of those that take at most 1.05 times the seconds of the fastest; others follow by seconds.

    Args:
        module: What is trained.
        cluster: Where.
        batch_size: Rows of a step over all ranks.
        micro_batch_size: Rows of one forward of a rank; None: all that it has.
        exact: Put those first that give the result of one process on the whole batches. The others are compared by
            the seconds of a step, although they may need more steps.
        candidates: What to compare, the simplest first; None: `candidates_for`.
    """
    asked = candidates_for(module, cluster) if candidates is None else candidates
    found = [estimate(one, module, cluster, batch_size, micro_batch_size) for one in asked]
    found.sort(key=lambda one: one.seconds_per_step)
    order = {one: place for place, one in enumerate(asked)}
    eligible = [one for one in found if one.feasible and (one.candidate.exact or not exact)]
    if eligible:
        close = [one for one in eligible if one.seconds_per_step <= _SIMPLER * eligible[0].seconds_per_step]
        best = min(close, key=lambda one: order[one.candidate])
        eligible.remove(best)
        eligible.insert(0, best)
    rest = [one for one in found if one not in eligible]
    return eligible + sorted(rest, key=lambda one: not one.feasible)


def table(estimates: Iterable[Estimate]) -> str:
    """Estimates as lines of text, under a head."""
    rows = [("strategy", "ms/step", "computing", "rows/s", "memory", "remark")]
    for one in estimates:
        known = math.isfinite(one.seconds_per_step) and one.seconds_per_step > 0
        rows.append(
            (
                str(one.candidate),
                f"{one.seconds_per_step * 1e3:,.1f}" if known else "-",
                f"{one.compute_seconds / one.seconds_per_step:.0%}" if known else "-",
                f"{one.rows_per_second:,.0f}" if known else "-",
                _bytes(one.memory_bytes) if one.memory_bytes else "-",
                one.reason if one.feasible or not one.reason else f"no: {one.reason}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *numbers, last = row
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(numbers, widths[1:], strict=False))]
        lines.append("  ".join([*cells, last]).rstrip())
    return "\n".join(lines)


def _bytes(size: float) -> str:
    """A size as people read it."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
