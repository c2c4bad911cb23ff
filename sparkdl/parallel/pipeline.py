"""Pipeline parallelism: ranks hold consecutive parts of the module, and micro-batches flow through them.

GPipe (Huang et al., arXiv 1811.06965), 1F1B and its interleaved form (Narayanan et al., arXiv 2104.04473), as
`torch.distributed.pipelining` runs them. The gradient is that of the whole global batch, as with every synchronous way.
"""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_leaves

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.exchange import broadcast, broadcast_state
from sparkdl.objective import Objective, TrainingStep
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.gradients import Computed, add_up
from sparkdl.parallel.pipeline_stage import Part, TimedStage, filled, owners
from sparkdl.parallel.rank_states import gather_states
from sparkdl.parallel.replicas import Replicas, check_degrees
from sparkdl.parallel.sharded import empty_copy, filler_rows, whole_copy
from sparkdl.parallel.split import check_split, split_module
from sparkdl.parallel.strategy import Setting, StepResult
from sparkdl.parallel.tensor import sum_over
from sparkdl.serialization import state_of

__all__ = ["Pipeline"]

Schedule = Literal["gpipe", "1f1b", "interleaved"]

_SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
_MICRO_BATCHES_PER_RANK = 4  # the part of the time in which ranks wait is then at most a fifth


@dataclass
class Pipeline:
    """The module is cut into stages, which consecutive ranks hold; the rows of a batch pass through in micro-batches.

    With fewer stages than ranks there are several pipelines, which read different rows; the gradients of a stage are
    summed over the ranks that hold it. Each rank keeps the parameters, gradients and optimizer state of its stages
    alone, beside names and places of the others: optimizers are built for the whole module, so that patterns of names
    and functions of the module mean what they always mean. A checkpoint goes on with any number of stages.

    Micro-batches are all of one size. Where a rank has fewer rows, they are filled up with copies of its first row,
    whose outputs are cut off before the loss. BatchNorm, which would see the copies, is refused.

    Random layers draw other numbers on every rank of a pipeline, and the same when a run is resumed on as many.

    Attributes:
        stages: Parts of the module. None: one for each rank, times ``stages_per_rank``.
        cut_points: Submodules that the stages after the first begin with, in order, such as ``"3"`` or
            ``"encoder.layer.2"``. Empty: cut so that the most expensive stage, in bytes of parameters and activations,
            is as cheap as can be.
        num_microbatches: Micro-batches in flight in one step. None: four for each rank of a pipeline.
        schedule: ``"gpipe"`` runs all forwards before all backwards; ``"1f1b"`` alternates, and holds the activations
            of fewer micro-batches; ``"interleaved"`` does so with several stages on each rank, which wait less.
        stages_per_rank: More than 1 with ``"interleaved"``: rank r of n then holds stages r, r + n, r + 2n and so on.
    """

    name: ClassVar[str] = "pipeline"

    stages: int | None = None
    cut_points: Sequence[str] = ()
    num_microbatches: int | None = None
    schedule: Schedule = "1f1b"
    stages_per_rank: int = 1

    # ---- before the ranks are there ----------------------------------------------------------------------------------
    @property
    def ranks(self) -> int | None:
        """Ranks of one pipeline; None for all.

        Raises:
            ConfigError: ``stages``, ``stages_per_rank`` and ``schedule`` do not go together.
        """
        if self.stages_per_rank < 1 or (self.stages_per_rank > 1 and self.schedule != "interleaved"):
            raise ConfigError(
                f"strategy={self.name!r}: stages_per_rank={self.stages_per_rank} does not go with schedule="
                f"{self.schedule!r}. Use 1, or more with schedule='interleaved'."
            )
        if self.stages is None:
            return None
        if self.stages % self.stages_per_rank:
            raise ConfigError(
                f"strategy={self.name!r}: stages={self.stages} cannot be dealt to ranks by stages_per_rank="
                f"{self.stages_per_rank}. Use a multiple of it."
            )
        return self.stages // self.stages_per_rank

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`."""
        size = world_size if self.ranks is None else self.ranks
        check_degrees(
            self.name, world_size, {"pipeline ranks": size, "data_parallel": max(1, world_size // max(1, size))}
        )
        return Replicas.of_size(world_size, size, pipelined=True)

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """See `Strategy.check`."""
        if self.schedule not in _SCHEDULES:
            raise ConfigError(
                f"strategy={self.name!r}: schedule={self.schedule!r} is not known. Use one of {', '.join(_SCHEDULES)}."
            )
        size = len(self.replicas(config.num_train_workers).groups[0])
        self._check_config(config)
        norm = next((name for name, part in module.named_modules() if isinstance(part, _BatchNorm)), None)
        if norm is not None:
            raise ConfigError(
                f"strategy={self.name!r} passes rows through {type(module).__name__} in filled-up micro-batches, whose "
                f"statistics the BatchNorm layer {norm!r} would take for those of the batch. Use GroupNorm or "
                "LayerNorm, or strategy='ddp'."
            )
        self._check_microbatches(size)
        check_split(
            module,
            size * self.stages_per_rank,
            self.cut_points,
            [
                name
                for name, value in module.named_parameters()
                if value.requires_grad and not any(re.search(pattern, name) for pattern in config.frozen_parameters)
            ],
        )

    def _check_config(self, config: TrainConfig) -> None:
        refused = {
            "averaging": (config.averaging, "none", "no rank has the whole module to average"),
            "nonFinite": (config.non_finite, "stop", "its stages do not agree on leaving a step out"),
            "torchCompile": (config.torch_compile, False, "the module is cut up, and its own forward not called"),
        }
        for param, (value, usual, why) in refused.items():
            if value != usual:
                raise ConfigError(
                    f"{param}={value!r} does not go with strategy={self.name!r}: {why}. Use {param}={usual!r}, or "
                    "strategy='ddp'."
                )
        if config.precision == "16":
            raise ConfigError(
                f"precision='16' does not go with strategy={self.name!r}: its stages do not agree on the scale of the "
                "loss. Use precision='bf16', which needs none, or strategy='ddp'."
            )

    def _check_microbatches(self, size: int) -> None:
        number = self.num_microbatches
        if number is None:
            return
        stages = size * self.stages_per_rank
        least = {"gpipe": 1, "1f1b": stages, "interleaved": 1}[self.schedule]
        if number < least:
            raise ConfigError(
                f"strategy={self.name!r}: num_microbatches={number} with schedule={self.schedule!r} leaves some of the "
                f"{stages} stages without work. Use {least} or more."
            )
        rounds = max(1, number // size)
        if self.schedule == "interleaved" and number % rounds:
            raise ConfigError(
                f"strategy={self.name!r}: num_microbatches={number} cannot be dealt in equal rounds to {size} ranks. "
                f"Use a multiple of {size}."
            )

    # ---- on the ranks ------------------------------------------------------------------------------------------------
    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """Give everyone rank 0's weights, cut the module, and let go of what other ranks hold.

        Raises:
            ConfigError: The module cannot be cut like that, or the user's own step computes the loss.
        """
        if isinstance(objective, TrainingStep):
            raise ConfigError(
                f"strategy={self.name!r} calls the module in parts, and a trainingStep calls the whole of it. Use a "
                "loss of (output, label), or strategy='ddp'."
            )
        world_size = dist.get_world_size()
        state = [*module.parameters(), *module.buffers(), *objective.parameters(), *objective.buffers()]
        broadcast_state([value.detach() for value in state], 0, hosts=setting.hosts or [""] * world_size)
        self._module, self._objective, self._config = module, objective, config
        self._place = self.replicas(world_size).place_of(dist.get_rank())
        self._join_groups()
        self._empty = empty_copy(module)
        self._optimization = build(module)
        size, rows = self._place.size, -(-config.batch_size // self._place.dp_size)
        self._micro_batches = self.num_microbatches or size * max(1, min(_MICRO_BATCHES_PER_RANK, rows // size))
        self._rows = min(-(-rows // self._micro_batches), config.micro_batch_size or rows)
        self._find_unused = setting.find_unused_parameters
        self._on_computed = setting.on_computed
        self._busy = 0.0
        self._cut(module, filler_rows(setting.example).part(0, 1).inputs)

    def _join_groups(self) -> None:
        """The ranks of this pipeline, and those that hold the same stages; torch has all ranks make all groups."""
        groups = self.replicas(dist.get_world_size()).groups
        timeout = self._config.timeouts.collective
        self._pipeline: Any = None
        self._alike: Any = None
        for members in groups:
            group = dist.new_group(list(members), timeout=timeout)
            if dist.get_rank() in members:
                self._pipeline = group
        for members in zip(*groups, strict=True) if len(groups) > 1 else ():
            group = dist.new_group(list(members), timeout=timeout)
            if dist.get_rank() in members:
                self._alike = group

    def _cut(self, module: nn.Module, first_rows: Sequence[Tensor]) -> None:
        """Set up this rank's stages, and let go of the others."""
        size, index, autocast = self._place.size, self._place.index, self._optimization.autocast
        total = size * self.stages_per_rank
        inputs = [value.expand(self._rows, *value.shape[1:]).contiguous() for value in first_rows]
        split = split_module(module, inputs, total, self.cut_points, autocast=autocast)
        parts = [Part(split, number, autocast) for number in range(index, total, size)]
        used = {id(value) for part in parts for value in (*part.parameters(), *part.buffers())}
        self._owner = owners(module, split, size)
        tensors = state_of(module)
        self._held = {name: value for name, value in tensors.items() if id(value) in used or self._owner[name] == index}
        self._own = {name: value for name, value in tensors.items() if self._owner[name] == index}
        held = {id(value) for value in self._held.values()}
        for value in tensors.values():
            if id(value) not in held:
                value.data = value.data.new_zeros(()).expand(value.shape)  # its shape, and memory for one number
        self._trained = [value for value in module.parameters() if value.requires_grad and id(value) in used]
        self._changing = [value for value in module.buffers() if id(value) in used & split.changing]
        self._last = parts[-1]
        self._stages = [
            TimedStage(
                part,
                part.number,
                total,
                inputs[0].device,
                input_args=tuple(inputs) if part.number == 0 else split.received[part.number - 1],
                output_args=split.returned if part.is_last else split.received[part.number],
                group=self._pipeline,
            )
            for part in parts
        ]
        kind: Any = _SCHEDULES[self.schedule]
        self._schedule = kind(
            self._stages if self.schedule == "interleaved" else self._stages[0],
            self._micro_batches,
            loss_fn=self._loss,
            scale_grads=False,
        )

    def meets(self, step: int) -> bool:
        """In every step."""
        return True

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """See `Strategy.train_step`."""
        self._draw_apart(batch.device)
        self._optimization.begin_step()
        self._scale = 1 / denominator if denominator else 1.0
        self._computed: Computed = []
        for pieces in self._rounds(batch):
            self._pieces = pieces
            self._run()
        self._busy += sum(stage.take_seconds() for stage in self._stages)
        self._on_computed()
        self._sum_over_replicas()
        began = time.perf_counter()
        self._clip_norm()
        taken = self._optimization.step()
        self._busy += time.perf_counter() - began
        loss, logged = add_up(self._computed) if self._computed else (torch.zeros((), device=batch.device), {})
        return StepResult(loss, logged, taken)

    def _draw_apart(self, device: torch.device) -> None:
        """Give this rank's random layers numbers of their own: the loop seeds all ranks of a pipeline alike."""
        if self._place.index == 0:
            return
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        for generator in generators:
            text = repr((generator.initial_seed(), self._place.index))
            generator.manual_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()))

    def _rounds(self, batch: Batch) -> list[list[Batch]]:
        """The rows in micro-batches: of every run of the schedule, as many as it takes; no run for no rows.

        A replica that has more rows than its part of the batch runs the schedule more than once.
        """
        number = self._micro_batches
        pieces = batch.cut(number * -(-batch.rows // (number * self._rows))) if batch.rows else []
        return [pieces[start : start + number] for start in range(0, len(pieces), number)]

    def _run(self) -> None:
        inputs: list[Tensor] = []
        if self._place.index == 0:
            first = next(piece for piece in self._pieces if piece.rows).part(0, 1).inputs
            inputs = [
                torch.cat([filled(piece.inputs[column], self._rows, filler) for piece in self._pieces])
                for column, filler in enumerate(first)
            ]
        target = torch.arange(self._micro_batches) if self._place.index == self._place.size - 1 else None
        self._schedule.step(*inputs, target=target, return_outputs=False)

    def _loss(self, leaves: Any, number: Tensor) -> Tensor:
        """The scaled loss of a micro-batch; ``number`` of shape (1,) says which."""
        piece = self._pieces[int(number)]
        with self._stages[-1].stopwatch(), self._optimization.autocast():
            if piece.rows:
                outputs = self._last.restored(leaves, piece.rows, self._rows)
                loss: Tensor = self._objective(outputs, piece.labels, piece.weight)
            else:
                loss = torch.stack([value.sum() * 0 for value in tree_leaves(leaves) if value.requires_grad]).sum()
            self._computed.append((loss.detach(), {}))
            return loss * self._scale

    @torch.no_grad()
    def _sum_over_replicas(self) -> None:
        """Add up the gradients of this rank's stages, and take the buffers of the first replica."""
        if self._alike is None:
            return
        unused: set[int] = set()
        if self._find_unused:
            here = torch.tensor([value.grad is not None for value in self._trained], device=self._trained[0].device)
            anywhere = here.int()
            dist.all_reduce(anywhere, group=self._alike)
            unused = {id(value) for value, used in zip(self._trained, anywhere.tolist(), strict=True) if not used}
        gradients = []
        for parameter in self._trained:
            if id(parameter) not in unused:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        sum_over(gradients, self._alike)
        if self._changing:
            broadcast(self._changing, 0, group=self._alike)

    @torch.no_grad()
    def _clip_norm(self) -> None:
        """Scale the gradient down by its norm over all stages; what `Optimization` then sees needs no more of it."""
        limit = self._config.gradient_clip_norm
        if limit is None or self._place.size == 1:
            return
        gradients = [value.grad for value in self._trained if value.grad is not None]
        squared = get_total_norm(gradients).square().to(self._trained[0].device)
        dist.all_reduce(squared, group=self._pipeline)
        clip_grads_with_norm_(self._trained, limit, squared.sqrt())

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`."""
        return self._busy

    @property
    def micro_batch_size(self) -> int | None:
        """See `Strategy.micro_batch_size`."""
        return self._config.micro_batch_size

    def gather(self) -> nn.Module:
        """See `Strategy.gather`."""
        whole = whole_copy(self._empty, self._module)
        tensors = state_of(whole)
        for index in range(self._place.size):
            broadcast(
                [value.detach() for name, value in tensors.items() if self._owner[name] == index],
                index,
                group=self._pipeline,
            )
        return whole

    def state_dict(self) -> dict[str, Any]:
        """See `Strategy.state_dict`."""
        state = self._optimization.state_dict()
        own = {
            "module": self._own,
            "optimizers": [
                {index: one["state"][index] for index in indices if index in one["state"]}
                for one, indices in zip(state["optimizers"], self._own_indices(), strict=True)
            ],
        }
        # What other replicas hold is the same, and nobody saves it.
        states = (gather_states(own, self._pipeline) if self._place.dp_rank == 0 else None) or [own]
        optimizers = [
            {**one, "state": {index: kept for part in states for index, kept in part["optimizers"][number].items()}}
            for number, one in enumerate(state["optimizers"])
        ]
        merged = {name: value for part in states for name, value in part["module"].items()}
        return {"module": merged, "optimization": {**state, "optimizers": optimizers}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Strategy.load_state_dict`; any number of stages will do."""
        with torch.no_grad():
            for name, value in self._held.items():
                value.copy_(state["module"][name])
        saved = state["optimization"]
        optimizers = [
            {**one, "state": {index: one["state"][index] for index in indices if index in one["state"]}}
            for one, indices in zip(saved["optimizers"], self._own_indices(), strict=True)
        ]
        self._optimization.load_state_dict({**saved, "optimizers": optimizers})

    def _own_indices(self) -> list[list[int]]:
        """Of each optimizer, the numbers of the parameters that this rank trains."""
        own = {id(value) for value in self._trained}
        every = [
            [value for group in optimizer.param_groups for value in group["params"]]
            for optimizer in self._optimization.optimizers
        ]
        return [[number for number, value in enumerate(values) if id(value) in own] for values in every]

    def close(self) -> None:
        """See `Strategy.close`."""
        del self._schedule, self._stages
        for group in (self._pipeline, self._alike):
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        del self._pipeline, self._alike

    @property
    def module(self) -> nn.Module:
        """The module; what other ranks' stages hold is zero in it, and takes no memory."""
        return self._module

    @property
    def optimization(self) -> Optimization:
        """See `Strategy.optimization`."""
        return self._optimization
