"""Synchronous data parallelism: every rank holds the module, gradients are averaged by an all-reduce in each step."""

import contextlib
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkdl.batch import Batch
from sparkdl.io.exchange import broadcast_state
from sparkdl.objective import Objective
from sparkdl.optimizer import OptimizerRecipe

__all__ = ["DataParallel"]


class DataParallel:
    """`DistributedDataParallel` around module and loss together.

    The loss is inside, so that a rank without rows in a step can take part in the all-reduce with a gradient of zero
    and without a forward of the module.

    Args:
        hosts: Host of every rank; decides on the way that the initial weights take.
    """

    def __init__(self, hosts: Sequence[str] = ()) -> None:
        self._hosts = hosts

    def prepare(
        self, module: nn.Module, objective: Objective, optimizer: OptimizerRecipe, *, find_unused_parameters: bool
    ) -> None:
        """Broadcast rank 0's weights and build the optimizer."""
        device = next(module.parameters()).device
        self._module = module
        step = _RowsToLoss(module, objective)
        # Instead of DDP's own broadcast: large weights go from host to host in a chain.
        state = (*step.parameters(), *step.buffers())
        broadcast_state([value.detach() for value in state], 0, hosts=self._hosts or [""] * dist.get_world_size())
        self._step = DistributedDataParallel(
            step,
            device_ids=[device] if device.type == "cuda" else None,
            init_sync=False,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=True,
        )
        self._optimizer = optimizer.build([value for value in module.parameters() if value.requires_grad])
        self._world_size = dist.get_world_size()
        self._busy = self._begun = 0.0
        # In the backward pass the first layer's gradients come last: when they are there this rank has computed its
        # part, and what is left of the step is waiting for the others.
        first = next(value for value in module.parameters() if value.requires_grad)
        first.register_post_accumulate_grad_hook(lambda _: self._computed())

    def train_step(self, batch: Batch, denominator: float, micro_batch_size: int | None) -> Tensor:
        """See `Strategy.train_step`."""
        self._begun = time.perf_counter()
        self._optimizer.zero_grad(set_to_none=True)
        # The all-reduce takes the mean over ranks; the gradient wanted is the sum over ranks by the denominator.
        scale = self._world_size / denominator if denominator else float(self._world_size)
        losses = []
        micro_batches = list(batch.split(micro_batch_size))
        for number, micro in enumerate(micro_batches, 1):
            synchronise = number == len(micro_batches)
            with contextlib.nullcontext() if synchronise else self._step.no_sync():
                loss: Tensor = self._step(micro.inputs, micro.labels, micro.weight)
                (loss * scale).backward()
            losses.append(loss.detach())
        self._optimizer.step()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _computed(self) -> None:
        now = time.perf_counter()
        self._busy += now - self._begun
        self._begun = now

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`."""
        return self._busy

    def close(self) -> None:
        """Let go of the process group while others still hold it.

        DDP's reducer frees the group with the GIL held, which joins gloo's threads, which may be waiting for the GIL:
        as the last owner it would hang the rank for ever.
        """
        del self._step.reducer, self._step.logger
        del self._step

    @property
    def module(self) -> nn.Module:
        """The module with its current weights."""
        return self._module


class _RowsToLoss(nn.Module):
    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.module = module
        self.objective = objective

    def forward(self, inputs: tuple[Tensor, ...], labels: tuple[Tensor, ...], weight: Tensor | None) -> Tensor:
        if not len(inputs[0]):
            return torch.stack([(value * 0).sum() for value in self.parameters() if value.requires_grad]).sum()
        loss: Tensor = self.objective(self.module(*inputs), labels, weight)
        return loss
