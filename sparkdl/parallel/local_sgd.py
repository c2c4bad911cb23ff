"""Ranks that train alone for some steps, and average their weights in between: far fewer messages than gradients are.

Sources of the algorithms:

- Local SGD: McMahan et al. 2017, arXiv 1602.05629 (weights by the number of rows); Stich 2019, arXiv 1805.09767.
- Post-local SGD, synchronous at first: Lin et al. 2020, arXiv 1808.07217.
- DiLoCo, an outer optimizer on what the ranks have moved by: Douillard et al. 2023, arXiv 2311.08105.
- D-PSGD, averages with two neighbours in a ring: Lian et al. 2017, arXiv 1705.09056.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.exchange import broadcast_state
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.averaging import (
    average_over_ranks,
    average_states,
    average_with_neighbours,
    neighbours_of,
    shares_of,
    wide,
)
from sparkdl.parallel.ddp import DataParallel
from sparkdl.parallel.gradients import add_up, compute_gradients
from sparkdl.parallel.rank_states import gather_states
from sparkdl.parallel.replicas import Replicas
from sparkdl.parallel.strategy import Setting, StepResult
from sparkdl.serialization import load_state, state_of

__all__ = ["LocalSGD", "Outer"]

Outer = Literal["mean", "nesterov", "ring"]

_LEARNING_RATE, _MOMENTUM = 0.7, 0.9  # of the DiLoCo paper


@dataclass
class LocalSGD:
    """Every rank takes steps on its own rows; after every `sync_every` of them the ranks bring their weights together.

    A local step divides the losses of the rank's own rows by their own denominator, and clips its own gradient. A rank
    without rows in a step leaves its weights as they are. Optimizer states stay each rank's own.

    Attributes:
        sync_every: Local steps from one exchange of weights to the next. With 1, plain SGD and `outer="mean"` the steps
            are those of synchronous training.
        start_step: Steps at the beginning of the run that are synchronous, as those of `DataParallel`.
        outer: What ranks do when they meet. `"mean"`: all go on from the mean of their weights, in which a rank counts
            by the rows (or row weights) it has consumed since the last one. `"nesterov"` (DiLoCo): the difference
            between the last common weights and that mean is the gradient of an outer SGD with Nesterov momentum, whose
            result all go on from. `"ring"` (D-PSGD): each rank takes the plain mean with the ranks before and after it,
            and waits for no other. Buffers are averaged as well; of integers the largest is taken.
        outer_learning_rate: Of the outer optimizer, for `outer="nesterov"`. None: 0.7.
        outer_momentum: Of the outer optimizer, likewise. None: 0.9.
    """

    name: ClassVar[str] = "local_sgd"

    sync_every: int = 8
    start_step: int = 0
    outer: Outer = "mean"
    outer_learning_rate: float | None = None
    outer_momentum: float | None = None

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`."""
        return Replicas.of_size(world_size)

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """See `Strategy.check`."""
        self._check_options()
        asked = f"does not work with strategy={self.name!r}, "
        if config.averaging != "none":
            raise ConfigError(
                f"averaging={config.averaging!r} {asked}whose ranks hold different weights between their averages: use "
                "averaging='none'."
            )
        if config.sync_batch_norm:
            raise ConfigError(
                f"syncBatchNorm=True {asked}whose ranks do not wait for each other in a forward: leave it out, the "
                "layers' statistics are averaged with the weights."
            )
        if config.non_finite == "skip":
            raise ConfigError(
                f"nonFinite='skip' {asked}whose ranks would each leave out steps of their own: use nonFinite='stop'."
            )
        if config.precision == "16":
            raise ConfigError(
                f"precision='16' {asked}whose ranks would each scale their losses and leave out steps of their own: "
                "use precision='bf16' or '32'."
            )

    def _check_options(self) -> None:
        who = f"strategy={self.name!r}: "
        if self.sync_every < 1:
            raise ConfigError(f"{who}sync_every={self.sync_every} is too small. Use 1 step or more.")
        if self.start_step < 0:
            raise ConfigError(f"{who}start_step={self.start_step} is no number of steps. Use 0 or more.")
        if self.outer not in get_args(Outer):
            raise ConfigError(f"{who}outer={self.outer!r} is not known. Use one of {', '.join(get_args(Outer))}.")
        given = {"outer_learning_rate": self.outer_learning_rate, "outer_momentum": self.outer_momentum}
        for name, value in given.items():
            if value is not None and self.outer != "nesterov":
                raise ConfigError(
                    f"{who}{name}={value:g} is set, but outer={self.outer!r} has no outer optimizer. Use "
                    "outer='nesterov', or leave it out."
                )
        rate, momentum = self._outer_options
        if not rate > 0:
            raise ConfigError(f"{who}outer_learning_rate={rate:g} is no learning rate. Use a number above 0.")
        if not 0 <= momentum < 1:
            raise ConfigError(f"{who}outer_momentum={momentum:g} is no momentum. Use a number from 0 to below 1.")

    @property
    def _outer_options(self) -> tuple[float, float]:
        """Learning rate and momentum of the outer optimizer."""
        rate = _LEARNING_RATE if self.outer_learning_rate is None else self.outer_learning_rate
        return rate, _MOMENTUM if self.outer_momentum is None else self.outer_momentum

    # ---- on the ranks ------------------------------------------------------------------------------------------------
    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """Give all ranks rank 0's weights, and build the optimization."""
        self._module = module
        self._objective = objective
        self._world_size = dist.get_world_size()
        self._neighbours = neighbours_of(dist.get_rank(), self._world_size)
        self._on_computed = setting.on_computed
        self._busy = self._consumed = 0.0
        self._common: _Common | None = None
        self._synchronous: DataParallel | None = None
        self.micro_batch_size = config.micro_batch_size
        # What `gather` returns; made before a forward leaves things in the module that cannot be copied.
        self._mean = copy.deepcopy(module)
        if self.start_step:
            self._synchronous = DataParallel()
            told = replace(setting, on_computed=self._computed_synchronously)
            self._synchronous.prepare(module, objective, build, config, told)
            self._optimization = self._synchronous.optimization
            return
        state = [value.detach() for value in (*module.parameters(), *module.buffers())]
        broadcast_state(state, 0, hosts=setting.hosts or [""] * self._world_size)
        self._optimization = build(module)

    def _computed_synchronously(self) -> None:
        if self._optimization.steps < self.start_step:  # its hook in the module outlives `DataParallel`
            self._on_computed()

    def meets(self, step: int) -> bool:
        """In synchronous steps, and where the weights of all ranks are averaged."""
        return step <= self.start_step or (self.outer != "ring" and self._local_steps(step) == 0)

    def _local_steps(self, step: int) -> int:
        """Local steps since ranks have exchanged weights last, after that many steps of the run."""
        return max(0, step - self.start_step) % self.sync_every

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """See `Strategy.train_step`."""
        step = self._optimization.steps + 1
        if step <= self.start_step:
            assert self._synchronous is not None
            before = self._synchronous.busy_seconds
            result = self._synchronous.train_step(batch, denominator)
            self._busy += self._synchronous.busy_seconds - before
            self.micro_batch_size = self._synchronous.micro_batch_size
            return result
        began = time.perf_counter()
        self._end_synchronous()
        if self.outer == "nesterov" and self._common is None:
            self._common = _Common(self._trained(self._module), *self._outer_options)
        own = self._objective.batch_denominator(batch)
        result = self._step_alone(batch, own)
        self._consumed += own
        self._busy += time.perf_counter() - began
        if self._local_steps(step) == 0:
            self._on_computed()
            self._meet()
        return result

    def _step_alone(self, batch: Batch, own: float) -> StepResult:
        if not batch.rows:
            self._optimization.advance()
            return StepResult(torch.zeros((), device=batch.device), {}, True)
        # A loss that is a sum has no denominator. Times the number of ranks, whose plain mean is taken, the steps add
        # up to that of the sum over all rows.
        scale = 1 / own if own else float(self._world_size)
        compute = partial(self._objective.compute, self._module)
        computed = compute_gradients(self._optimization, compute, batch.split(self.micro_batch_size), scale)
        return StepResult(*add_up(computed), self._optimization.step())

    def _meet(self) -> None:
        """Exchange weights and buffers."""
        parameters, buffers = self._trained(self._module), list(self._module.buffers())
        if self.outer == "ring":
            average_with_neighbours([*parameters, *buffers], self._neighbours)
        else:
            share = self._share()
            if self._common is None:
                average_over_ranks(parameters, parameters, share)
            else:
                self._common.step(parameters, share)
            average_over_ranks(buffers, buffers, share)
        self._consumed = 0.0

    def _share(self) -> float:
        """The weight of this rank in the mean over all; a collective."""
        if self.outer == "ring":
            return 1 / self._world_size
        total = torch.tensor(self._consumed, dtype=torch.float64, device=next(self._module.parameters()).device)
        dist.all_reduce(total)
        return self._consumed / float(total) if float(total) else 1 / self._world_size

    @staticmethod
    def _trained(module: nn.Module) -> list[Tensor]:
        return [value for value in module.parameters() if value.requires_grad]

    def _end_synchronous(self) -> None:
        if self._synchronous is not None:
            self._synchronous.close()
            self._synchronous = None

    @property
    def _all_equal(self) -> bool:
        """Whether all ranks have the same weights, as after a synchronous step."""
        steps = self._optimization.steps
        return steps <= self.start_step or (self.outer != "ring" and self._local_steps(steps) == 0)

    @torch.no_grad()
    def gather(self) -> nn.Module:
        """A copy of the module with the mean over ranks, weighted as the next one would be; what is trained stays."""
        for pair in (
            zip(self._mean.parameters(), self._module.parameters(), strict=True),
            zip(self._mean.buffers(), self._module.buffers(), strict=True),
        ):
            for target, value in pair:
                target.copy_(value)
        if not self._all_equal:
            averaged = [*self._trained(self._mean), *self._mean.buffers()]
            average_over_ranks(averaged, averaged, self._share())
        return self._mean

    def state_dict(self) -> dict[str, Any]:
        """See `Strategy.state_dict`: module and optimization of each rank, once they differ."""
        own = {
            "module": state_of(self._module),
            "optimization": self._optimization.state_dict(),
            "consumed": self._consumed,
        }
        return {
            "outer": self.outer,
            "ranks": [own] if self._optimization.steps < self.start_step else gather_states(own),
            "common": None if self._common is None else self._common.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Strategy.load_state_dict`.

        On another number of ranks all go on from the mean of the weights, with the optimizer state of rank 0.
        """
        if state["outer"] != self.outer:
            raise ConfigError(
                f"strategy={self.name!r}: outer={self.outer!r} cannot go on from this checkpoint, which "
                f"outer={state['outer']!r} wrote: use the same, or begin anew in another directory."
            )
        ranks = state["ranks"]
        if len(ranks) == self._world_size:
            own = ranks[dist.get_rank()]
            load_state(self._module, own["module"])
            self._consumed = own["consumed"]
        else:
            own, counts = ranks[0], [0.0 if self.outer == "ring" else rank["consumed"] for rank in ranks]
            load_state(self._module, average_states([rank["module"] for rank in ranks], shares_of(counts)))
            self._consumed = 0.0
        self._optimization.load_state_dict(own["optimization"])
        self._common = None
        if state["common"] is not None:
            self._common = _Common(self._trained(self._module), *self._outer_options)
            self._common.load_state_dict(state["common"])

    def close(self) -> None:
        """See `Strategy.close`."""
        self._end_synchronous()

    @property
    def module(self) -> nn.Module:
        """See `Strategy.module`."""
        return self._module

    @property
    def optimization(self) -> Optimization:
        """See `Strategy.optimization`."""
        return self._optimization

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`."""
        return self._busy


class _Common:
    """The weights that all ranks last had in common, and the optimizer that brings them forward; equal on all ranks.

    Args:
        weights: The weights, equal on all ranks.
        learning_rate: Of the outer optimizer.
        momentum: Likewise.
    """

    def __init__(self, weights: Sequence[Tensor], learning_rate: float, momentum: float) -> None:
        self._weights = [nn.Parameter(wide(value.detach()).clone()) for value in weights]
        self._optimizer = torch.optim.SGD(self._weights, learning_rate, momentum, nesterov=momentum > 0)

    @torch.no_grad()
    def step(self, weights: Sequence[Tensor], share: float) -> None:
        """Take one step by what the ranks' weights have moved by, and give them the result; a collective."""
        moved = [torch.empty_like(value) for value in self._weights]
        average_over_ranks(weights, moved, share)
        for common, mean in zip(self._weights, moved, strict=True):
            common.grad = mean.neg_().add_(common)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for value, common in zip(weights, self._weights, strict=True):
            value.copy_(common)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": [value.detach() for value in self._weights], "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for value, saved in zip(self._weights, state["weights"], strict=True):
            value.copy_(saved)
        self._optimizer.load_state_dict(dict(state["optimizer"]))
