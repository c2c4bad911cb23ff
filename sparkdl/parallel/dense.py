"""Layers with many parameters and little work are cut across all ranks, the others are data parallel over the same.

Krizhevsky, One weird trick for parallelizing convolutional neural networks, arXiv 1404.5997: every rank computes the
convolutions of its own rows, all ranks together the dense layers of all rows. Weights of dense layers, which are most
of the module, are then never sent; their inputs are, which are few.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.exchange import broadcast, broadcast_state
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization
from sparkdl.parallel.gradients import add_up, compute_gradients, cut_alike
from sparkdl.parallel.replicas import Replicas
from sparkdl.parallel.sharded import (
    axis,
    check_optimizers,
    check_sharded,
    empty_copy,
    filled_copy,
    filler_rows,
    open_mesh,
    without_trace,
)
from sparkdl.parallel.strategy import Setting, StepResult
from sparkdl.parallel.tensor import TensorParallel, apply_plan, resolve_plan, settle_gradients, sum_over

__all__ = ["DenseParallel"]

_FILLED = 2  # rows of a rank that has none, as `filler_rows` makes them


@dataclass
class DenseParallel(TensorParallel):
    """`sparkdl.parallel.Hybrid` with ``dense``: the layers of ``plan`` are cut across all ranks, which read own rows.

    Ranks may have different numbers of rows. Where rows of all ranks meet, those of a rank are filled up with copies of
    its last one, whose outputs are cut off again.
    """

    name: ClassVar[str] = "hybrid"

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`."""
        return Replicas.of_size(world_size)

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """See `Strategy.check`."""
        check_sharded(self.name, config)
        refused = {
            "syncBatchNorm": (config.sync_batch_norm, True, "rows that fill up others would be counted"),
            "precision": (config.precision, "16", "ranks do not agree on the scale of the loss"),
            "nonFinite": (config.non_finite, "skip", "ranks do not agree on leaving a step out"),
        }
        for param, (value, unfit, why) in refused.items():
            if value == unfit:
                raise ConfigError(
                    f"{param}={value!r} does not go with dense layers cut across ranks: {why}. Leave it out, or use "
                    "strategy='ddp'."
                )
        resolve_plan(self.plan, module, config.num_train_workers, option="dense")

    # ---- on the ranks ------------------------------------------------------------------------------------------------
    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """Give everyone rank 0's weights, and let each rank keep its part of the dense layers.

        Raises:
            ConfigError: The plan does not suit the module, or the optimizer no parts.
        """
        device = next(module.parameters()).device
        ranks = dist.get_world_size()
        state = (*module.parameters(), *module.buffers(), *objective.parameters(), *objective.buffers())
        broadcast_state([value.detach() for value in state], 0, hosts=setting.hosts or [""] * ranks)
        self._module, self._objective = module, objective
        self._empty = empty_copy(module)
        self._mesh = open_mesh(device, torch.arange(ranks), ["dense"])
        self._parts = axis(self._mesh, 0)
        self._filling = _Filling()
        for name, style in resolve_plan(self.plan, module, ranks, option="dense").items():
            self._filling.register(module.get_submodule(name), style)
        apply_plan(module, self.plan, self._parts, rows_sharded=True)
        self._filling.register_last()
        # As with `TensorParallel`, the optimizer sees nothing but DTensors.
        self._replicated = []
        self._optimization = build(filled_copy(self._empty, module, self._as_dtensor))
        check_optimizers(self.name, self._optimization.optimizers)
        self._finds_unused = setting.find_unused_parameters
        self._filler = filler_rows(setting.example)
        self._on_computed = setting.on_computed
        self._busy = 0.0
        # As in `TensorParallel`: waiting for other ranks does not count.
        self._clock = time.perf_counter if device.type == "cuda" else time.thread_time
        self.micro_batch_size = config.micro_batch_size

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """See `Strategy.train_step`."""
        began = self._clock()
        for value in self._module.parameters():
            value.grad = None
        micro_batches = cut_alike(batch, self.micro_batch_size)
        sizes = self._sizes(micro_batches)

        def around(number: int) -> contextlib.AbstractContextManager[Any]:
            rows = micro_batches[number].rows
            self._filling.rows, self._filling.size = rows or _FILLED, sizes[number]
            return contextlib.nullcontext() if rows else without_trace(self._module, batch.device)

        scale = 1 / denominator if denominator else 1.0
        computed = compute_gradients(self._optimization, self._compute, micro_batches, scale, around=around)
        settle_gradients(self._module)
        self._on_computed()
        self._reduce()
        for value, replica in self._replicated:
            replica.grad = None if value.grad is None else self._whole(value.grad)
        taken = self._optimization.step()
        if buffers := list(self._module.buffers()):
            broadcast(buffers, 0)
        self._busy += self._clock() - began
        own = [one for one, rows in zip(computed, micro_batches, strict=True) if rows.rows]
        return StepResult(*add_up(own or computed[:1]), taken)

    def _sizes(self, micro_batches: Sequence[Batch]) -> list[int]:
        """Of each micro-batch, the rows that all ranks fill theirs up to."""
        rows = torch.tensor([one.rows or _FILLED for one in micro_batches], device=micro_batches[0].device)
        dist.all_reduce(rows, dist.ReduceOp.MAX)
        return rows.tolist()

    def _compute(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the rows; of none, a forward that the others wait for."""
        if batch.rows:
            return self._objective.compute(self._module, batch)
        loss, logged = self._objective.compute(self._module, self._filler)
        return torch.nan_to_num(loss * 0), {name: torch.zeros_like(value) for name, value in logged.items()}

    def _reduce(self) -> None:
        """Sum the gradients of what every rank holds; those of dense layers are of all rows already."""
        alike = [one for one in self._module.parameters() if one.requires_grad and not isinstance(one, DTensor)]
        used = torch.tensor([value.grad is not None for value in alike], dtype=torch.int32)
        gradients = []
        for value in alike:
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
            gradients.append(value.grad)
        sum_over(gradients, self._parts.get_group())
        if self._finds_unused and alike:
            used = used.to(alike[0].device)
            dist.all_reduce(used)
            for value, count in zip(alike, used.tolist(), strict=True):
                if not count:
                    value.grad = None


class _Filling:
    """Fills up rows before a layer that needs as many of every rank, and cuts the copies off behind it.

    Attributes:
        rows: Rows of this rank's micro-batch.
        size: Rows that it is filled up to.
    """

    def __init__(self) -> None:
        self.rows = self.size = 1
        self._after: list[nn.Module] = []

    def register(self, part: nn.Module, style: str) -> None:
        """Before `apply_plan`, whose own hooks are then called between these."""
        if style in ("colwise", "colwise_gather", "rowwise_split") or isinstance(part, nn.Embedding):
            part.register_forward_pre_hook(self._fill)
        if style not in ("sharded", "colwise"):
            self._after.append(part)

    def register_last(self) -> None:
        """After `apply_plan`."""
        for part in self._after:
            part.register_forward_hook(self._cut)

    def _fill(self, part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value, *rest = inputs
        missing = len(value) // self.rows * (self.size - self.rows)  # there may be several vectors per row
        return (torch.cat([value, value[-1:].expand(missing, *value.shape[1:])]), *rest)

    def _cut(self, part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output[: len(output) // self.size * self.rows]
