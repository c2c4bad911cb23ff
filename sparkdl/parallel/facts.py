"""What a choice between strategies rests on: numbers about a module, and numbers about the ranks."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sparkdl.parallel.alpha_beta import Link, hierarchical_all_reduce, ring_all_reduce, tree_all_reduce

__all__ = ["ClusterFacts", "ModuleFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFacts:
    """What a module weighs, and how long it computes where nobody has to be waited for.

    Attributes:
        parameter_bytes: Of all parameters.
        trainable_parameter_bytes: Of those that are trained, and so of the gradients.
        optimizer_state_bytes: What the optimizer keeps for them.
        buffer_bytes: Of all buffers.
        activation_bytes_per_row: What the backward pass needs of the forward pass, beside parameters.
        seconds_per_row: Of forward and backward pass, for each row more.
        fixed_seconds: Of forward and backward pass, however few rows there are.
        optimizer_seconds: Of the optimizer's step.
        backward_share: The part of forward and backward pass that is the backward pass.
        layer_parameter_bytes: Of each layer, in the order of the forward pass; none: it is one layer.
        boundary_bytes_per_row: Of the largest output of a layer, which is what ranks of a pipeline hand on.
        low_rank_bytes: Of PowerSGD's factors at rank 1: n + m numbers for a gradient of n x m.
        vector_bytes: Of gradients that are no matrices, which PowerSGD leaves as they are.
        chain_length: Pieces that follow each other; 1 where it cannot be cut.
        batch_norm: True where it has layers that look at all rows of a batch.
    """

    parameter_bytes: int
    trainable_parameter_bytes: int
    optimizer_state_bytes: int = 0
    buffer_bytes: int = 0
    activation_bytes_per_row: float = 0.0
    seconds_per_row: float = 0.0
    fixed_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    backward_share: float = 2 / 3
    layer_parameter_bytes: tuple[int, ...] = ()
    boundary_bytes_per_row: float = 0.0
    low_rank_bytes: int = 0
    vector_bytes: int = 0
    chain_length: int = 1
    batch_norm: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """Bytes of the parameters of each layer; one layer at least."""
        return self.layer_parameter_bytes or (self.parameter_bytes,)

    @property
    def largest_layer_bytes(self) -> int:
        """Of the parameters of the largest layer."""
        return max(self.layers)

    @property
    def num_layers(self) -> int:
        """Layers with parameters."""
        return len(self.layers)

    @property
    def gradient_bytes(self) -> tuple[float, ...]:
        """Bytes of the gradients of each layer, as if all layers were trained in the same part."""
        part = self.trainable_parameter_bytes / (sum(self.layers) or 1)
        return tuple(size * part for size in self.layers)

    def compute_seconds(self, rows: int, micro_batch_size: int | None = None) -> float:
        """Of forward and backward pass of so many rows, in micro-batches."""
        pieces = 1 if micro_batch_size is None else max(1, math.ceil(rows / micro_batch_size))
        return pieces * self.fixed_seconds + rows * self.seconds_per_row

    def largest_stage(self, stages: int) -> float:
        """The part of the parameters that the largest of so many stages has, at best."""
        return _smallest_largest(self.layers, stages) / (sum(self.layers) or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """The ranks, and what connects them.

    Attributes:
        world_size: Ranks.
        between: The link of a host.
        inside: The link between two ranks of one host; None where hosts have one rank each: it is not used.
        ranks_per_host: As many consecutive ranks share a host.
        memory_bytes: What a rank may use; None: no limit is known.
        slowdowns: Of each rank, its seconds by the mean of all ranks; none: all are alike.
        jitter: Standard deviation of a rank's step, by its mean.
        copied_bytes_per_second: How fast a rank copies tensors in its memory.
        overlap: The part of an exchange that costs nothing while a rank computes: 1 where the link alone is busy with
            it, less where it takes the processor from the computing.
        backend: NCCL takes the fastest of ring, tree and hierarchy. gloo always takes the ring, and reduces whole
            tensors where it is asked to reduce and scatter.
    """

    world_size: int
    between: Link
    inside: Link | None = None
    ranks_per_host: int = 1
    memory_bytes: int | None = None
    slowdowns: tuple[float, ...] = ()
    jitter: float = 0.0
    copied_bytes_per_second: float = 1e10
    overlap: float = 1.0
    backend: Literal["gloo", "nccl"] = "gloo"

    @property
    def hosts(self) -> int:
        """Hosts."""
        return math.ceil(self.world_size / self.ranks_per_host)

    @property
    def neighbours(self) -> Link:
        """The link by which neighbours of a ring over all ranks are as fast as they are."""
        if self.ranks_per_host == 1 or self.inside is None:
            return self.between
        if self.hosts == 1:
            return self.inside
        latency = max(self.inside.latency_seconds, self.between.latency_seconds)
        return Link(latency, min(self.inside.bytes_per_second, self.between.bytes_per_second))

    def link_of(self, group: int) -> Link:
        """The slowest link between so many consecutive ranks."""
        if group <= self.ranks_per_host and self.inside is not None:
            return self.inside
        return self.neighbours

    def link_across(self, group: int) -> Link:
        """The link between ranks that are so far apart, where all ranks between them do the same at the same time."""
        if self.hosts == 1 or self.ranks_per_host == 1:
            return self.neighbours
        sharing = min(group, self.ranks_per_host)
        return Link(self.between.latency_seconds, self.between.bytes_per_second / sharing)

    def all_reduce_seconds(self, size: float) -> float:
        """Of an all-reduce of so many bytes over all ranks."""
        if self.world_size == 1:
            return 0.0
        ring = ring_all_reduce(size, self.world_size, self.neighbours)
        if self.backend == "gloo":
            return ring
        times = [ring, tree_all_reduce(size, self.world_size, self.neighbours)]
        if self.hosts > 1 and self.inside is not None and self.ranks_per_host > 1:
            times.append(hierarchical_all_reduce(size, self.hosts, self.ranks_per_host, self.inside, self.between))
        return min(times)

    def pace_together(self, ranks: int, steps: int = 1) -> float:
        """How much longer than the mean rank those need who wait for each other after so many steps.

        The slowest rank sets the pace, and of ranks that vary the one that is late: the largest of W normal numbers is
        about sqrt(2 ln W) standard deviations above their mean (Cramer, "Mathematical methods of statistics", 1946),
        and over several steps what varies averages out.
        """
        late = math.sqrt(2 * math.log(ranks) / steps) if ranks > 1 else 0.0
        return max(self.slowdowns, default=1.0) * (1 + self.jitter * late)

    def beside(self, computing: float, exchanging: float, together: float) -> float:
        """Seconds of computing and exchanging, which would be over after ``together`` if neither slowed the other."""
        return together + (1 - self.overlap) * (computing + exchanging - together)

    @property
    def pace_alone(self) -> float:
        """How much longer than the mean rank those need who wait only at the end of an epoch.

        All ranks have their share of the rows, so that a rank that is always slow is waited for in any case.
        """
        return max(self.slowdowns, default=1.0)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "slowdowns": list(self.slowdowns)}

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "ClusterFacts":
        """From what `to_json` returned."""
        inside = values["inside"]
        return cls(
            **{
                **values,
                "between": Link(**values["between"]),
                "inside": None if inside is None else Link(**inside),
                "slowdowns": tuple(values["slowdowns"]),
            }
        )


def _smallest_largest(sizes: tuple[int, ...], parts: int) -> int:
    """The sum of the largest part, where a list is cut into parts so that it is as small as can be.

    By bisection over the answer ("linear partition", Skiena, "The algorithm design manual", 8.5).
    """
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        needed = 1
        total = 0
        for size in sizes:
            total += size
            if total > middle:
                needed, total = needed + 1, size
        low, high = (low, middle) if needed <= parts else (middle + 1, high)
    return low
