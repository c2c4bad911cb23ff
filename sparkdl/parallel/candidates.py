"""What strategies there are to choose from, with those of their options that change what they cost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparkdl.parallel import Strategy, build_strategy
from sparkdl.parallel.facts import ClusterFacts, ModuleFacts

__all__ = ["COMPRESSORS", "Candidate", "Compressor", "candidates_for"]


@dataclass(frozen=True, slots=True)
class Compressor:
    """What a way to compress gradients sends, and costs.

    Attributes:
        passes: What compressing and the way back take, in times that the gradients are copied, on a processor core.
        gathers: True where every rank sends its own to all others, as what is sent cannot be added up.
        sent: Bytes that stand for the gradients of a module, or of that part of it.
    """

    passes: float
    gathers: bool
    sent: Callable[[ModuleFacts], float]


def _low_rank(rank: int) -> Callable[[ModuleFacts], float]:
    def sent(module: ModuleFacts) -> float:
        whole = module.trainable_parameter_bytes
        return min(rank * module.low_rank_bytes + module.vector_bytes, whole) if module.low_rank_bytes else whole

    return sent


COMPRESSORS: dict[str, Compressor] = {
    "fp16": Compressor(32, False, lambda module: module.trainable_parameter_bytes / 2),
    "int8": Compressor(60, False, lambda module: module.trainable_parameter_bytes / 4),
    "topk": Compressor(80, True, lambda module: module.trainable_parameter_bytes * 0.01 * 2),
    "powersgd": Compressor(18, False, _low_rank(2)),
}
"""By name, with their defaults: top-k sends 1 % of the values with their places, PowerSGD matrices of rank 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A strategy with those of its options that change what it costs.

    Attributes:
        strategy: Its name.
        compression: A key of `COMPRESSORS`, of "ddp".
        shard_size: Ranks that hold one copy of the module, of "hsdp".
        sync_every: Steps between two exchanges, of "local_sgd".
        outer: Of "local_sgd": "mean", "nesterov" (DiLoCo) or "ring" (neighbours only).
        num_servers: Of "parameter_server".
        max_staleness: Of "parameter_server": 0 is synchronous, None has no bound.
        stages: Ranks of one pipeline.
        micro_batches: Of each pipeline in a step.
        tensor_size: Ranks that share each layer, of "tensor_parallel".
    """

    strategy: str = "ddp"
    compression: str | None = None
    shard_size: int = 1
    sync_every: int = 1
    outer: str = "mean"
    num_servers: int = 1
    max_staleness: int | None = 0
    stages: int = 1
    micro_batches: int = 1
    tensor_size: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """What the constructor of its class is called with."""
        names: dict[str, dict[str, Any]] = {
            "ddp": {} if self.compression is None else {"compression": self.compression},
            "hsdp": {"shard_size": self.shard_size},
            "local_sgd": {"sync_every": self.sync_every, "outer": self.outer},
            "parameter_server": {"num_servers": self.num_servers, "max_staleness": self.max_staleness},
            "pipeline": {"stages": self.stages, "num_microbatches": self.micro_batches},
        }
        return names.get(self.strategy, {})

    def build(self) -> Strategy:
        """The strategy itself.

        Raises:
            ConfigError: There is none of its name.
        """
        return type(build_strategy(self.strategy))(**self.options)

    @property
    def exact(self) -> bool:
        """True where the weights are those of one process on the whole batches."""
        local = self.strategy == "local_sgd"
        asynchronous = self.strategy == "parameter_server" and self.max_staleness != 0
        return self.compression is None and not local and not asynchronous

    def __str__(self) -> str:
        told = {
            "ddp": self.compression or "",
            "hsdp": f"{self.shard_size} ranks",
            "local_sgd": f"{self.outer}, every {self.sync_every}",
            "parameter_server": f"{self.num_servers} servers, " + _staleness(self.max_staleness),
            "pipeline": f"{self.stages} stages, {self.micro_batches} micro-batches",
            "tensor_parallel": f"{self.tensor_size} ranks",
        }.get(self.strategy)
        return f"{self.strategy} ({told})" if told else self.strategy


def _staleness(most: int | None) -> str:
    return "asynchronous" if most is None else f"staleness {most}" if most else "synchronous"


def candidates_for(module: ModuleFacts, cluster: ClusterFacts) -> list[Candidate]:
    """What is worth comparing, the simplest first."""
    ranks, per_host = cluster.world_size, cluster.ranks_per_host
    found = [Candidate()]
    if ranks == 1:
        return found
    found.append(Candidate(strategy="fsdp"))
    if 1 < per_host < ranks and ranks % per_host == 0:
        found.append(Candidate(strategy="hsdp", shard_size=per_host))
    for stages in (2, 4, 8, 16):
        if ranks % stages == 0 and stages <= module.chain_length:
            found.append(Candidate(strategy="pipeline", stages=stages, micro_batches=4 * stages))
    tensor_size = per_host if 1 < per_host < ranks else ranks
    found.append(Candidate(strategy="tensor_parallel", tensor_size=tensor_size))
    servers = max(1, ranks // 8)
    found.append(Candidate(strategy="parameter_server", num_servers=servers))
    found += [Candidate(compression=name) for name in COMPRESSORS]
    found += [Candidate(strategy="local_sgd", sync_every=8, outer=way) for way in ("mean", "nesterov", "ring")]
    found.append(Candidate(strategy="parameter_server", num_servers=servers, max_staleness=4))
    return found
