"""What to train with on a cluster that one does not have: an answer from numbers, before anything is paid for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.objective import Loss, Objective, build_loss
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import DEFAULT_OPTIMIZER, OptimizerRecipe
from sparkdl.parallel.alpha_beta import Link
from sparkdl.parallel.cost import Estimate, rank_strategies, table
from sparkdl.parallel.facts import ClusterFacts, ModuleFacts
from sparkdl.parallel.measuring import count_module, fitting, time_module

__all__ = ["Recommendation", "recommend"]

_ROWS_PER_RANK = 32
_FLOPS = 6  # per parameter and row: 2 in the forward pass, 4 in the backward pass


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer of `recommend`; printed, it is the table of all strategies and the reason for the choice.

    Attributes:
        strategy: The name of the best strategy that gives the result of ddp; "ddp" where none is feasible.
        estimates: Of all strategies, the best first.
        module: What was found out about the module.
        cluster: What was assumed of the cluster.
        batch_size: Rows of a step over all ranks.
        reason: Why, in a sentence or two.
    """

    strategy: str
    estimates: tuple[Estimate, ...]
    module: ModuleFacts
    cluster: ClusterFacts
    batch_size: int
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}\n\n{table(self.estimates)}"


def recommend(
    module: nn.Module,
    num_train_workers: int,
    *,
    bandwidth: float = 1.25e9,
    latency: float = 50e-6,
    example: Any = None,
    loss: Loss | None = None,
    optimizer: str | Callable[..., Any] | OptimizerRecipe = DEFAULT_OPTIMIZER,
    batch_size: int | None = None,
    memory: float | None = None,
    ranks_per_host: int = 1,
    inside_bandwidth: float = 1e10,
    inside_latency: float = 10e-6,
    flops: float = 1e11,
    backend: Literal["gloo", "nccl"] = "gloo",
    exact: bool = True,
    budget_seconds: float = 5.0,
) -> Recommendation:
    """Which strategy a cluster of so many ranks should train a module with.

    Args:
        module: The module, which is copied; where it lies, it is measured.
        num_train_workers: Ranks of the cluster.
        bandwidth: Of the link of a host in bytes per second, in each direction; 1.25e9 is 10 Gbit/s.
        latency: Of a message between hosts, in seconds.
        example: Some rows, (input, label) or ((input, ...), label), to measure the module's compute in this process;
            None: it is taken from ``flops``.
        loss: A name, a torch loss or a function of (output, label); needed with an example.
        optimizer: A name, a function from parameters to an optimizer, or a recipe, as for a fit.
        batch_size: Rows of a step over all ranks; None: 32 per rank.
        memory: Bytes that a rank may use; None: no limit.
        ranks_per_host: Ranks that share a host and its link.
        inside_bandwidth: Between ranks of one host, in bytes per second.
        inside_latency: Between ranks of one host, in seconds.
        flops: Operations per second of a rank; counts where there is no example.
        backend: What the ranks reduce with.
        exact: Choose among strategies that give the result of ddp; else by speed alone.
        budget_seconds: How long to measure at most.

    Raises:
        ConfigError: An argument makes no sense.
    """
    for name, value in (
        ("num_train_workers", num_train_workers),
        ("ranks_per_host", ranks_per_host),
        ("bandwidth", bandwidth),
        ("inside_bandwidth", inside_bandwidth),
        ("flops", flops),
        ("batch_size", batch_size),
        ("memory", memory),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"recommend: {name}={value} is too small. Use a number above 0.")
    if example is not None and loss is None:
        raise ConfigError("recommend: there is an example, but no loss. Give loss=..., to measure a whole step.")
    rows = batch_size or _ROWS_PER_RANK * num_train_workers
    rows_per_rank = -(-rows // num_train_workers)
    cluster = ClusterFacts(
        world_size=num_train_workers,
        between=Link(latency, bandwidth),
        inside=Link(inside_latency, inside_bandwidth) if ranks_per_host > 1 else None,
        ranks_per_host=min(ranks_per_host, num_train_workers),
        memory_bytes=None if memory is None else int(memory),
        backend=backend,
        copied_bytes_per_second=1e12 if next(module.parameters()).device.type == "cuda" else 1e10,
    )
    if example is None or loss is None:
        facts = count_module(module)
        per_row = _FLOPS * sum(value.numel() for value in module.parameters()) / flops
        state = 2 * facts.trainable_parameter_bytes
        facts = replace(facts, seconds_per_row=per_row, optimizer_state_bytes=state)
        known = f"compute is taken from {flops:.3g} operations per second, and activations are not counted"
    else:
        facts = _measured(module, build_loss(loss), optimizer, _batch_of(example), rows_per_rank, budget_seconds)
        known = "compute was measured in this process"
    estimates = rank_strategies(facts, cluster, rows, exact=exact)
    best = estimates[0]
    found = best.feasible and (best.candidate.exact or not exact)
    strategy = best.strategy if found else "ddp"
    return Recommendation(strategy, tuple(estimates), facts, cluster, rows, _reason(best, found, exact, known))


def _reason(best: Estimate, found: bool, exact: bool, known: str) -> str:
    if not found:
        return f"No strategy is feasible; {known}. The remarks say what is in the way."
    computing = best.compute_seconds / best.seconds_per_step if best.seconds_per_step else 1.0
    kept = " of those that give the result of ddp" if exact else ""
    return (
        f"{best.candidate}: the fastest{kept}, or as good as the fastest and simpler; it computes for {computing:.0%} "
        f"of a step, and {known}."
    )


def _batch_of(example: Any) -> Batch:
    """A batch from the user's pair.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(example, Batch):
        return example
    pair = isinstance(example, tuple | list) and len(example) == 2
    inputs = (example[0] if isinstance(example[0], tuple | list) else (example[0],)) if pair else ()
    labels = (example[1],) if pair else ()
    if not pair or not inputs or not all(isinstance(value, torch.Tensor) for value in (*inputs, *labels)):
        raise ConfigError(
            f"recommend: example is a {type(example).__name__}. Give (input, label) or ((input, ...), label), tensors "
            "of some rows."
        )
    return Batch(tuple(inputs), labels)


def _measured(
    module: nn.Module,
    loss: Callable[..., torch.Tensor],
    optimizer: str | Callable[..., Any] | OptimizerRecipe,
    example: Batch,
    rows: int,
    budget_seconds: float,
) -> ModuleFacts:
    objective = Objective(loss)
    recipe = optimizer if isinstance(optimizer, OptimizerRecipe) else OptimizerRecipe(optimizer)
    build = optimization_builder(recipe, None, TrainConfig(), steps_per_epoch=1)
    facts = count_module(module, objective, example)
    timing = time_module(module, objective, build, example, rows=rows, budget_seconds=budget_seconds)
    both = [forward + backward for forward, backward in zip(timing.forward, timing.backward, strict=True)]
    fixed, per_row = fitting(timing.rows, (both[0], both[1]))
    return replace(
        facts,
        seconds_per_row=per_row,
        fixed_seconds=fixed,
        optimizer_seconds=timing.optimizer,
        backward_share=timing.backward[1] / both[1],
        optimizer_state_bytes=timing.optimizer_state_bytes,
    )
