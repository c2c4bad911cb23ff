"""What strategies do alike before anything is reduced: the gradient of some rows, a micro-batch at a time."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparkdl.batch import Batch
from sparkdl.optimization import Optimization

__all__ = ["Computed", "add_up", "compute_gradients", "cut_alike"]

Computed = list[tuple[Tensor, dict[str, Tensor]]]
"""Of each micro-batch, the sum of its losses, detached, and the sums of what else was logged."""


def compute_gradients(
    optimization: Optimization,
    compute: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]],
    micro_batches: Iterable[Batch],
    scale: float,
    *,
    around: Callable[[int], contextlib.AbstractContextManager[Any]] = lambda number: contextlib.nullcontext(),
) -> Computed:
    """Forget the last gradients and accumulate those of the rows.

    Args:
        optimization: Knows the precision.
        compute: From rows to the sum of their losses, shape (), and sums of what else is logged.
        micro_batches: The rows.
        scale: What the gradient of the sum is multiplied by.
        around: By number, in what the forward and backward of a micro-batch are to happen.
    """
    optimization.begin_step()
    computed = []
    for number, micro_batch in enumerate(micro_batches):
        with around(number):
            with optimization.autocast():
                loss, logged = compute(micro_batch)
            optimization.backward(loss, scale)
        computed.append((loss.detach(), logged))
    return computed


def add_up(computed: Computed) -> tuple[Tensor, dict[str, Tensor]]:
    """The sums over all micro-batches."""
    losses, logged = zip(*computed, strict=True)
    if len(computed) == 1:
        return losses[0], logged[0]
    return torch.stack(losses).sum(), {name: torch.stack([one[name] for one in logged]).sum() for name in logged[0]}


def cut_alike(batch: Batch, rows: int | None) -> list[Batch]:
    """Micro-batches of at most ``rows`` rows, as many on all ranks; a collective where there is a limit."""
    if rows is None:
        return [batch]
    pieces = torch.tensor(max(1, -(-batch.rows // rows)), device=batch.device)
    dist.all_reduce(pieces, dist.ReduceOp.MAX)
    return batch.cut(int(pieces))
