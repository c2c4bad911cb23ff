"""Synchronous data parallelism: every rank holds the module, gradients are averaged by an all-reduce in each step."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparkdl.batch import Batch
from sparkdl.io.exchange import broadcast_state
from sparkdl.objective import Objective
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.serialization import load_state, state_of

__all__ = ["DataParallel"]


class DataParallel:
    """`DistributedDataParallel` around module and loss together.

    The loss is inside, so that a rank without rows in a step can take part in the all-reduce with a gradient of zero
    and without a forward of the module.

    Args:
        hosts: Host of every rank; decides on the way that the initial weights take.
        on_computed: Called in every step when this rank has computed its part, and begins to wait for the others.
    """

    def __init__(self, hosts: Sequence[str] = (), *, on_computed: Callable[[], None] = lambda: None) -> None:
        self._hosts = hosts
        self._on_computed = on_computed

    def prepare(
        self,
        module: nn.Module,
        objective: Objective,
        optimizer: OptimizerRecipe,
        *,
        find_unused_parameters: bool,
        example: Batch,
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
        if self._world_size > 2:
            self._warm_up(example)
        self._busy = self._begun = 0.0
        # In the backward pass the first layer's gradients come last: when they are there this rank has computed its
        # part, and what is left of the step is waiting for the others.
        first = next(value for value in module.parameters() if value.requires_grad)
        first.register_post_accumulate_grad_hook(lambda _: self._computed())

    def _warm_up(self, example: Batch) -> None:
        """A backward pass that changes nothing but the order of DDP's buckets.

        DDP puts gradients into buckets by the order in which the first backward pass brings them, and with it changes
        the order of summation over three and more ranks. A resumed run must not sum its first step in another order
        than the run that it goes on with.
        """
        buffers = [value.clone() for value in self._step.buffers()]
        devices = [value.device for value in example.inputs if value.device.type == "cuda"][:1]
        with torch.random.fork_rng(devices=devices):
            self._step(example.inputs, example.labels, example.weight).backward()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for value, before in zip(self._step.buffers(), buffers, strict=True):
                value.copy_(before)

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
        self._on_computed()

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`."""
        return self._busy

    def state_dict(self) -> dict[str, Any]:
        """See `Strategy.state_dict`."""
        return {"module": state_of(self._module), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Strategy.load_state_dict`."""
        load_state(self._module, state["module"])
        self._optimizer.load_state_dict(dict(state["optimizer"]))

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
