"""What a module is worth on validation rows: loss and metrics over the rows of all ranks."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparkdl.batch import Batch
from sparkdl.objective import Objective

if TYPE_CHECKING:
    from sparkdl.metrics import Metrics

__all__ = ["evaluate", "refresh_batch_norm"]


def evaluate(
    module: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    metrics: "Metrics | None",
    logged: Sequence[str],
    over_ranks: Callable[..., Sequence[float]],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    on_batch: Callable[[], None],
) -> dict[str, float]:
    """Loss, what a training step returned besides, and metrics; every rank calls it, with its own rows.

    Args:
        module: The module; it is in eval mode afterwards.
        objective: The loss as sum and denominator.
        batches: This rank's rows; may be none.
        metrics: Further measures of output and labels.
        logged: Names of what a training step returns of validation rows besides the loss.
        over_ranks: Sums numbers over all ranks.
        device: Where the module is.
        autocast: In which the module is called.
        on_batch: Called before every batch.

    Returns:
        By name, means over all ranks' rows; equal on all ranks.
    """
    module.eval()
    loss = denominator = rows = 0.0
    others = dict.fromkeys(logged, 0.0)
    with torch.inference_mode():
        for batch in batches:
            on_batch()
            moved = batch.to(device)
            with autocast():
                found, extra, outputs = objective.evaluate(module, moved, with_outputs=metrics is not None)
            loss += float(found)
            denominator += objective.batch_denominator(batch)
            rows += batch.rows
            for name in others:
                others[name] += float(extra[name])
            if metrics is not None:
                metrics.update(outputs, moved.labels)
        loss, denominator, rows, *sums = over_ranks(loss, denominator, rows, *others.values())
        measured = {} if metrics is None else metrics.compute()
    means = {name: total / (rows or 1.0) for name, total in zip(others, sums, strict=True)}
    return {"loss": loss / (denominator or 1.0), **means, **measured}


def refresh_batch_norm(
    module: nn.Module,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    on_batch: Callable[[], None],
) -> None:
    """Take the statistics of BatchNorm layers anew; every rank calls it, with its own rows.

    For averaged weights, as `torch.optim.swa_utils.update_bn` does it in one process: plain means over the batches,
    here over those of all ranks.

    Args:
        module: The module, in eval mode.
        objective: Knows how it is called.
        batches: Training rows.
        device: Where the module is.
        on_batch: Called before every batch.
    """
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean
        layer.train()
    count = 0
    with torch.no_grad():
        for batch in batches if layers else ():
            on_batch()
            if batch.rows > 1:  # one row has no variance
                objective.predict(module, batch.to(device).inputs)
                count += 1
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
        for buffer in (layer.running_mean, layer.running_var):
            assert buffer is not None
            weighted = torch.cat([buffer.double() * count, buffer.new_tensor([count], dtype=torch.float64)])
            dist.all_reduce(weighted)
            buffer.copy_(weighted[:-1] / weighted[-1].clamp(min=1))
