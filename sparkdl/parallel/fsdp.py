"""Sharded data parallelism: ranks share out parameters, gradients and optimizer state, and gather them layer by layer.

ZeRO stage 3 (Rajbhandari et al., arXiv 1910.02054) as `torch.distributed.fsdp.fully_shard` does it (Zhao et al., arXiv
2304.11277). Every rank reads rows of its own, as with plain data parallelism, and ends with the same weights.
"""

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.exchange import broadcast_state
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.gradients import add_up, compute_gradients, cut_alike
from sparkdl.parallel.replicas import Replicas, check_degrees
from sparkdl.parallel.sharded import (
    check_optimizers,
    check_sharded,
    close_mesh,
    empty_copy,
    filler_rows,
    load_whole_optimization,
    load_whole_state,
    open_mesh,
    whole_copy,
    whole_optimization,
    whole_state,
    without_trace,
)
from sparkdl.parallel.strategy import Setting, StepResult

__all__ = ["FullyShardedDataParallel", "HybridShardedDataParallel"]

MIN_PARAMETERS = 1_000_000
# They use the parameters of their children without calling these.
_CLOSED = (nn.MultiheadAttention,)


@dataclass
class FullyShardedDataParallel:
    """Every rank holds a slice of each parameter, of its gradient and of the optimizer's state, and reads own rows.

    The parameters of a submodule that is wrapped are gathered when it is called, and let go of afterwards; those of the
    others belong to the whole module. Mixed precision is `torch.autocast` as everywhere in this library: parameters are
    gathered, and gradients reduced, in the type that the module has. Micro-batches are not halved where memory ends.

    Attributes:
        wrap: Submodules whose parameters are gathered together: regular expressions that match their whole names.
            Empty: from the inside out, those with ``min_parameters`` parameters that are not in one of their parts.
        reshard_after_forward: Let go of a submodule's parameters after its forward, and gather them once more for its
            backward. False keeps them until then: more memory, less traffic.
        min_parameters: For an empty ``wrap``.
    """

    name: ClassVar[str] = "fsdp"

    wrap: Sequence[str] = ()
    reshard_after_forward: bool = True
    min_parameters: int = MIN_PARAMETERS

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`; every rank is one, as far as rows are concerned."""
        return Replicas.of_size(world_size)

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """See `Strategy.check`."""
        check_sharded(self.name, config)
        if self.min_parameters < 1:
            raise ConfigError(
                f"strategy={self.name!r}: min_parameters={self.min_parameters} is too small. Use 1 or more."
            )
        for name, value in module.named_parameters():
            if value.dim() == 0:
                raise ConfigError(
                    f"strategy={self.name!r} cuts parameters along their first dimension, but {name} has none. Give "
                    "it the shape (1,)."
                )
        dtypes = {str(value.dtype): name for name, value in module.named_parameters() if value.requires_grad}
        if len(dtypes) > 1:
            found = " and ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            raise ConfigError(
                f"strategy={self.name!r} reduces gradients together, but the parameters are of several types: {found}. "
                "Bring them to one type."
            )
        self._units(module)

    def _units(self, module: nn.Module) -> list[str]:
        """Names of the submodules to wrap, inner ones first.

        Raises:
            ConfigError: A pattern of ``wrap`` matches none, or one that cannot be wrapped.
        """
        parts = {name: part for name, part in module.named_modules() if name}
        reasons = {name: reason for name, part in parts.items() if (reason := _cannot_be_wrapped(name, part, module))}
        inner_first = sorted(parts, key=lambda name: -name.count("."))
        if self.wrap:
            chosen = _matching(self.name, self.wrap, list(parts))
            for name in chosen & reasons.keys():
                raise ConfigError(f"strategy={self.name!r}: wrap matches {name!r}, which {reasons[name]}.")
            return [name for name in inner_first if name in chosen]
        units: list[str] = []
        taken: set[int] = set()
        for name in inner_first:
            own = [value for value in parts[name].parameters() if id(value) not in taken]
            if name not in reasons and sum(value.numel() for value in own) >= self.min_parameters:
                units.append(name)
                taken |= {id(value) for value in own}
        return units

    def _mesh(self, device: torch.device, hosts: Sequence[str]) -> DeviceMesh:
        return open_mesh(device, torch.arange(len(hosts)), ["shard"])

    # ---- on the ranks ------------------------------------------------------------------------------------------------
    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """Give everyone rank 0's weights, and let each rank keep its slice of them.

        Raises:
            ConfigError: The optimizer does not suit slices.
        """
        device = next(module.parameters()).device
        hosts = setting.hosts or [""] * dist.get_world_size()
        state = (*module.parameters(), *module.buffers(), *objective.parameters(), *objective.buffers())
        broadcast_state([value.detach() for value in state], 0, hosts=hosts)
        self._objective = objective
        self._config = config
        self.micro_batch_size = config.micro_batch_size
        self._empty = empty_copy(module)
        self._mesh_of_ranks = self._mesh(device, hosts)
        for name in self._units(module):
            part = module.get_submodule(name)
            part.register_forward_hook(_without_views)
            fully_shard(part, mesh=self._mesh_of_ranks, reshard_after_forward=self.reshard_after_forward)
        module.register_forward_hook(_without_views)
        # The last layers' parameters are needed again at once: torch's own default keeps those of the root.
        root = None if self.reshard_after_forward else False
        self._module = fully_shard(module, mesh=self._mesh_of_ranks, reshard_after_forward=root)
        for part in module.modules():
            if isinstance(part, FSDPModule):  # gradients are summed; what they are divided by is the loss's business
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        self._finds_unused = setting.find_unused_parameters
        self._module.set_reduce_scatter_unused_params(self._finds_unused)
        self._optimization = build(module)
        check_optimizers(self.name, self._optimization.optimizers)
        self._filler = filler_rows(setting.example)
        self._on_computed = setting.on_computed
        self._busy = 0.0
        # Ranks wait for each other all the time, in calls that block where there is no GPU: the thread's own time does
        # not count them.
        self._clock: Callable[[], float] = time.perf_counter if device.type == "cuda" else time.thread_time

    def meets(self, step: int) -> bool:
        """In every step."""
        return True

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """See `Strategy.train_step`."""
        began = self._clock()
        micro_batches = cut_alike(batch, self.micro_batch_size)

        def around(number: int) -> contextlib.AbstractContextManager[Any]:
            last = number == len(micro_batches) - 1
            self._module.set_requires_gradient_sync(last)
            self._module.set_is_last_backward(last)
            idle = not micro_batches[number].rows and not self._config.sync_batch_norm
            return without_trace(self.module, batch.device) if idle else contextlib.nullcontext()

        scale = 1 / denominator if denominator else 1.0
        computed = compute_gradients(self._optimization, self._compute, micro_batches, scale, around=around)
        self._on_computed()
        if self._finds_unused:
            self._drop_unused()
        taken = self._optimization.step()
        self._busy += self._clock() - began
        own = [one for one, rows in zip(computed, micro_batches, strict=True) if rows.rows]
        return StepResult(*add_up(own or computed[:1]), taken)

    def _compute(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the rows; of none, a forward that the others wait for."""
        module = self.module
        if batch.rows:
            return self._objective.compute(module, batch)
        if self._config.sync_batch_norm:  # BatchNorm layers wait for each other as well, and count rows
            outputs = self._objective.predict(module, batch.inputs)
            leaves = [value.sum() * 0 for value in tree_leaves(outputs) if isinstance(value, Tensor)]
            return torch.stack(leaves).sum(), {}
        loss, logged = self._objective.compute(module, self._filler)
        return torch.nan_to_num(loss * 0), {name: torch.zeros_like(value) for name, value in logged.items()}

    def _drop_unused(self) -> None:
        """Take away the gradients that are zero on all ranks, as those of parameters without a part in any loss are."""
        trained = [value for value in self.module.parameters() if value.grad is not None]
        used = torch.stack([cast(DTensor, value.grad).to_local().count_nonzero() for value in trained])
        dist.all_reduce(used)
        for value, count in zip(trained, used.tolist(), strict=True):
            if not count:
                value.grad = None

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`."""
        return self._busy

    def gather(self) -> nn.Module:
        """See `Strategy.gather`."""
        return whole_copy(self._empty, self.module)

    def state_dict(self) -> dict[str, Any]:
        """See `Strategy.state_dict`."""
        return {"module": whole_state(self.module), "optimization": whole_optimization(self._optimization)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Strategy.load_state_dict`."""
        load_whole_state(self.module, state["module"])
        load_whole_optimization(self._optimization, state["optimization"])

    def close(self) -> None:
        """See `Strategy.close`."""
        close_mesh(self._mesh_of_ranks)

    @property
    def module(self) -> nn.Module:
        """See `Strategy.module`."""
        return cast(nn.Module, self._module)

    @property
    def optimization(self) -> Optimization:
        """See `Strategy.optimization`."""
        return self._optimization


@dataclass
class HybridShardedDataParallel(FullyShardedDataParallel):
    """Groups of ranks share out the module as with `FullyShardedDataParallel`; every group holds all of it.

    Parameters are gathered within a group, best of one host; between groups, gradients are summed in each step.

    Attributes:
        wrap: As of `FullyShardedDataParallel`.
        reshard_after_forward: Likewise.
        min_parameters: Likewise.
        shard_size: Ranks of one group. None: the ranks of a host where all hosts have as many, and more than one; else
            all ranks. A number makes groups of consecutive ranks.
    """

    name: ClassVar[str] = "hsdp"

    shard_size: int | None = None

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`."""
        if self.shard_size is not None:
            groups = max(1, world_size // max(1, self.shard_size))
            check_degrees(self.name, world_size, {"shard_size": self.shard_size, "groups": groups})
        return super().replicas(world_size)

    def _mesh(self, device: torch.device, hosts: Sequence[str]) -> DeviceMesh:
        groups = host_groups(hosts) if self.shard_size is None else torch.arange(len(hosts)).view(-1, self.shard_size)
        return open_mesh(device, groups, ["replicate", "shard"])


def host_groups(hosts: Sequence[str]) -> Tensor:
    """The ranks of each host, shape (hosts, ranks of one); one row where hosts differ in number or have one each."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    sizes = {len(own) for own in ranks.values()}
    return torch.tensor([list(range(len(hosts)))] if len(sizes) > 1 or sizes == {1} else list(ranks.values()))


def _without_views(part: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: outputs that are views become tensors of their own.

    What gathers the parameters for the backward hangs at the output, and would be lost if a view were changed in place,
    as in ``x = layer(x); x += y``.
    """
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) and value._is_view() else value, output)


def _cannot_be_wrapped(name: str, part: nn.Module, module: nn.Module) -> str | None:
    """Why the parameters of a submodule have to be gathered with those of what is around it; None if not so."""
    if type(part).forward is nn.Module.forward:
        return "is a container that is never called. Match the submodules in it"
    if not any(True for _ in part.parameters()):
        return "has no parameters. Match another"
    outer = name
    while "." in outer:
        outer = outer.rpartition(".")[0]
        if isinstance(module.get_submodule(outer), _CLOSED):
            return f"{outer!r} ({type(module.get_submodule(outer)).__name__}) never calls. Match {outer!r}"
    if isinstance(module, _CLOSED):
        return f"{type(module).__name__} never calls. Leave wrap out"
    inside = set(part.modules())
    own = {id(value): key for key, value in part.named_parameters()}
    for outside, other in module.named_modules():
        for key, value in other.named_parameters(recurse=False):
            if other not in inside and id(value) in own:
                held = f"{outside}.{key}" if outside else key
                return f"shares {own[id(value)]!r} with {held!r}. Match a submodule that holds both, or none"
    return None


def _matching(strategy: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            own = {name for name in names if re.fullmatch(pattern, name)}
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"strategy={strategy!r}: wrap has {pattern!r}, which is no regular expression: {error}."
            ) from error
        if not own:
            raise ConfigError(
                f"strategy={strategy!r}: wrap has {pattern!r}, which matches no submodule. There are "
                f"{', '.join(names[:10]) or 'none'}{', ...' if len(names) > 10 else ''}."
            )
        found |= own
    return found
