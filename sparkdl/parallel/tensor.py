"""Tensor parallelism: layers are cut across ranks that read the same rows, and replicas of them share out the rows.

A plan says how each layer is cut, after Shoeybi et al. (Megatron-LM, arXiv 1909.08053): the first of two linear layers
by its outputs ("colwise"), the second by its inputs ("rowwise"), so that one sum over ranks suffices for both. Built on
`torch.distributed.tensor.parallel`.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.exchange import broadcast_state
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.gradients import add_up, compute_gradients
from sparkdl.parallel.replicas import Replicas, check_degrees
from sparkdl.parallel.sharded import (
    axis,
    check_optimizers,
    check_sharded,
    close_mesh,
    empty_copy,
    filled_copy,
    load_whole_optimization,
    load_whole_state,
    open_mesh,
    whole_copy,
    whole_optimization,
    whole_state,
)
from sparkdl.parallel.strategy import Setting, StepResult

__all__ = ["STYLES", "TensorParallel", "apply_plan", "resolve_plan", "settle_gradients", "sum_over"]

STYLES = ("colwise", "colwise_gather", "rowwise", "rowwise_split", "sharded")
"""How a plan cuts a layer; see `TensorParallel`."""

_BUCKET_BYTES = 25 << 20


@dataclass
class TensorParallel:
    """Layers cut across ``size`` consecutive ranks, which read the same rows; replicas of them are data parallel.

    Parameters that are in no layer of the plan are whole on every rank, and equal to the bit. Random layers draw the
    same numbers on all ranks of a replica, so that what is whole stays equal. Where the features are cut, each rank has
    to draw its own, or a dropout would always drop them in groups: name such layers in the plan as "sharded".

    Attributes:
        plan: How layers are cut: regular expressions that match whole names of submodules, to one of `STYLES`; the
            first that matches counts. A Linear or Embedding is cut by its outputs and leaves them cut ("colwise"), or
            puts them together ("colwise_gather"); or it is cut by its inputs (an Embedding by its rows) and finds them
            cut ("rowwise") or whole ("rowwise_split"), and its outputs are whole. A layer without parameters that works
            on cut features and draws random numbers is "sharded".
        size: Ranks of a replica; None: all.
    """

    name: ClassVar[str] = "tensor_parallel"

    plan: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None

    def replicas(self, world_size: int) -> Replicas:
        """See `Strategy.replicas`."""
        size = world_size if self.size is None else self.size
        check_degrees(self.name, world_size, {"size": size, "replicas": max(1, world_size // max(1, size))})
        return Replicas.of_size(world_size, size)

    def check(self, module: nn.Module, config: TrainConfig) -> None:
        """See `Strategy.check`."""
        check_sharded(self.name, config)
        if config.sync_batch_norm:
            raise ConfigError(
                f"syncBatchNorm=True counts the rows of every rank, but those of a replica of strategy={self.name!r} "
                "read the same ones. Leave it out."
            )
        if config.precision == "16":
            raise ConfigError(
                f"precision='16' scales the loss, and strategy={self.name!r} cannot tell which gradients overflow on "
                "other ranks. Use precision='bf16' or '32'."
            )
        resolve_plan(self.plan, module, len(self.replicas(config.num_train_workers).groups[0]))

    # ---- on the ranks ------------------------------------------------------------------------------------------------
    def prepare(
        self, module: nn.Module, objective: Objective, build: BuildOptimization, config: TrainConfig, setting: Setting
    ) -> None:
        """Give everyone rank 0's weights, and let each rank keep its part of them.

        Raises:
            ConfigError: The plan does not suit the module, or the optimizer no parts.
        """
        device = next(module.parameters()).device
        ranks = dist.get_world_size()
        size = len(self.replicas(ranks).groups[0])
        state = (*module.parameters(), *module.buffers(), *objective.parameters(), *objective.buffers())
        broadcast_state([value.detach() for value in state], 0, hosts=setting.hosts or [""] * ranks)
        self._module = module
        self._objective = objective
        self._empty = empty_copy(module)
        self._mesh = open_mesh(device, torch.arange(ranks).view(-1, size), ["dp", "tp"])
        self._replicas, self._parts = axis(self._mesh, 0), axis(self._mesh, 1)
        apply_plan(module, self.plan, self._parts, rows_sharded=False)
        # Optimizers take no mixture: for them, whole parameters are DTensors as well, in the same memory.
        self._replicated: list[tuple[nn.Parameter, Tensor]] = []
        self._optimization = build(filled_copy(self._empty, module, self._as_dtensor))
        check_optimizers(self.name, self._optimization.optimizers)
        self._finds_unused = setting.find_unused_parameters
        self._on_computed = setting.on_computed
        self._busy = 0.0
        # Ranks of a replica wait for each other in every layer, in calls that block where there is no GPU: the thread's
        # own time does not count them.
        self._clock: Callable[[], float] = time.perf_counter if device.type == "cuda" else time.thread_time
        self.micro_batch_size = config.micro_batch_size

    def _as_dtensor(self, value: Tensor) -> Tensor:
        if isinstance(value, DTensor) or not isinstance(value, nn.Parameter):
            return value
        made = nn.Parameter(self._whole(value.detach()), requires_grad=value.requires_grad)
        self._replicated.append((value, made))
        return made

    def _whole(self, value: Tensor) -> DTensor:
        return DTensor.from_local(value, self._parts, [Replicate()], run_check=False)

    def meets(self, step: int) -> bool:
        """In every step."""
        return True

    def train_step(self, batch: Batch, denominator: float) -> StepResult:
        """See `Strategy.train_step`."""
        began = self._clock()
        for value in self._module.parameters():
            value.grad = None
        scale = 1 / denominator if denominator else 1.0
        computed = compute_gradients(self._optimization, self._compute, batch.split(self.micro_batch_size), scale)
        settle_gradients(self._module)
        self._on_computed()
        if self._replicas.size() > 1:
            self._reduce()
        for value, replica in self._replicated:
            replica.grad = None if value.grad is None else self._whole(value.grad)
        taken = self._optimization.step()
        self._busy += self._clock() - began
        return StepResult(*add_up(computed), taken)

    def _compute(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses of the rows; without rows all ranks of the replica leave the forward out."""
        if batch.rows:
            return self._objective.compute(self._module, batch)
        return torch.zeros((), device=batch.device, requires_grad=True), {}

    def _reduce(self) -> None:
        """Sum the gradients over the replicas."""
        trained = [value for value in self._module.parameters() if value.requires_grad]
        used = torch.tensor([value.grad is not None for value in trained], dtype=torch.int32)
        for value in trained:
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        group = self._replicas.get_group()
        sum_over([_local(value.grad) for value in trained], group)
        if self._finds_unused:
            used = used.to(trained[0].device)
            dist.all_reduce(used, group=group)
            for value, count in zip(trained, used.tolist(), strict=True):
                if not count:
                    value.grad = None

    @property
    def busy_seconds(self) -> float:
        """See `Strategy.busy_seconds`."""
        return self._busy

    def gather(self) -> nn.Module:
        """See `Strategy.gather`."""
        return whole_copy(self._empty, self._module)

    def state_dict(self) -> dict[str, Any]:
        """See `Strategy.state_dict`."""
        return {"module": whole_state(self._module), "optimization": whole_optimization(self._optimization)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Strategy.load_state_dict`."""
        load_whole_state(self._module, state["module"])
        load_whole_optimization(self._optimization, state["optimization"])

    def close(self) -> None:
        """See `Strategy.close`."""
        close_mesh(self._mesh)

    @property
    def module(self) -> nn.Module:
        """See `Strategy.module`."""
        return self._module

    @property
    def optimization(self) -> Optimization:
        """See `Strategy.optimization`."""
        return self._optimization


# ---- plans -----------------------------------------------------------------------------------------------------------
def resolve_plan(plan: Mapping[str, str], module: nn.Module, size: int, *, option: str = "plan") -> dict[str, str]:
    """The style of every submodule that a plan names.

    Args:
        plan: As in `TensorParallel`.
        module: The whole module.
        size: Ranks that a layer is cut across.
        option: What the plan is called in messages.

    Raises:
        ConfigError: A pattern matches nothing, or a layer that cannot be cut in that way.
    """
    parts = {name: part for name, part in module.named_modules() if name}
    styles: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ConfigError(
                f"{option} has {pattern!r}: {style!r}, which is no style. Use one of {', '.join(STYLES)}."
            )
        try:
            found = [name for name in parts if re.fullmatch(pattern, name)]
        except (re.error, TypeError) as error:
            raise ConfigError(f"{option} has {pattern!r}, which is no regular expression: {error}.") from error
        if not found:
            raise ConfigError(
                f"{option} has {pattern!r}, which matches no submodule. There are "
                f"{', '.join(list(parts)[:10]) or 'none'}{', ...' if len(parts) > 10 else ''}."
            )
        for name in found:
            styles.setdefault(name, style)
    if all(style == "sharded" for style in styles.values()):
        raise ConfigError(
            f"{option}={dict(plan)!r} cuts no layer. Name Linear and Embedding layers, as in "
            "{'first': 'colwise', 'second': 'rowwise'}."
        )
    for name, style in styles.items():
        _check_layer(name, parts[name], style, size, module, option)
    return styles


def _check_layer(name: str, part: nn.Module, style: str, size: int, module: nn.Module, option: str) -> None:
    kind = type(part).__name__
    if style == "sharded":
        if any(True for _ in part.parameters()):
            raise ConfigError(
                f"{option} has {name!r} as 'sharded', but that {kind} has parameters, which would differ from rank to "
                "rank. Only layers without any can be 'sharded'."
            )
        return
    if not isinstance(part, nn.Linear | nn.Embedding):
        raise ConfigError(
            f"{option} has {name!r} as {style!r}, but that is a {kind}. Only Linear and Embedding layers can be cut."
        )
    outer = module.get_submodule(name.rpartition(".")[0])
    if isinstance(outer, nn.MultiheadAttention):
        raise ConfigError(
            f"{option} has {name!r}, which {type(outer).__name__} uses without calling it. Cut attention with Linear "
            "layers of its own."
        )
    if isinstance(part, nn.Embedding) and part.max_norm is not None:
        raise ConfigError(
            f"{option} has {name!r}, an Embedding with max_norm={part.max_norm}, which needs whole rows. Leave it out."
        )
    by_outputs = style.startswith("colwise")
    if isinstance(part, nn.Linear):
        what = "out_features" if by_outputs else "in_features"
    else:
        what = "embedding_dim" if by_outputs else "num_embeddings"
    features = getattr(part, what)
    if features % size:
        raise ConfigError(
            f"{option} has {name!r} as {style!r}, but {what}={features} is not divisible by size={size}. Use another "
            "size, or pad the layer."
        )
    own = {id(value) for value in part.parameters()}
    for other_name, other in module.named_modules():
        if other is not part and own & {id(value) for value in other.parameters(recurse=False)}:
            raise ConfigError(
                f"{option} has {name!r}, which shares its weights with {other_name or 'the module itself'!r}. Layers "
                "that are cut cannot share weights; leave it out."
            )


def apply_plan(module: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh, *, rows_sharded: bool) -> None:
    """Cut the layers of a plan in place; every rank of the mesh has the same weights before.

    Afterwards the parameters of those layers are `DTensor`s on the mesh. With ``rows_sharded``, gradients of the loss
    that each rank computes for its own rows are summed over the ranks of the mesh where they are the plan's, and the
    layers around the plan are data parallel: Krizhevsky, arXiv 1404.5997.

    Args:
        module: The whole module.
        plan: As in `TensorParallel`.
        mesh: Of one dimension: the ranks across which layers are cut.
        rows_sharded: False: all ranks of the mesh have the same rows, and whole inputs and outputs of the plan hold
            them. True: each rank has rows of its own, all as many; whole inputs and outputs hold a rank's own rows, and
            cut ones those of all ranks.

    Raises:
        ConfigError: As `resolve_plan`.
    """
    whole: Placement = Shard(0) if rows_sharded else Replicate()
    for name, style in resolve_plan(plan, module, mesh.size()).items():
        part = module.get_submodule(name)
        if style == "sharded":
            draws = _OwnDraws(mesh.get_local_rank())
            part.register_forward_pre_hook(draws.before)
            part.register_forward_hook(draws.after, always_call=True)
        else:
            parallelize_module(part, mesh, _style(part, style, whole), src_data_rank=None)
            # autograd lets no layer behind it work in place on what comes of a DTensor
            part.register_forward_hook(lambda _part, _inputs, output: output.clone())


def _style(part: nn.Module, style: str, whole: Placement) -> ParallelStyle:
    if style.startswith("colwise"):
        return ColwiseParallel(input_layouts=whole, output_layouts=whole if style == "colwise_gather" else Shard(-1))
    inputs = Shard(-1) if style == "rowwise" and isinstance(part, nn.Linear) else whole
    return RowwiseParallel(input_layouts=inputs, output_layouts=whole)


class _OwnDraws:
    """Lets a layer draw other numbers on every rank, and all ranks draw the same ones after it."""

    def __init__(self, place: int) -> None:
        self._place = place
        self._states: list[tuple[torch.Generator, Tensor]] = []

    def before(self, part: nn.Module, inputs: Sequence[Any]) -> None:
        generator = torch.default_generator
        seed = int(torch.randint(1 << 62, ()))  # equal on all ranks
        device = next((value.device for value in inputs if isinstance(value, Tensor)), torch.device("cpu"))
        if device.type == "cuda":
            generator = torch.cuda.default_generators[device.index or 0]
        self._states.append((generator, generator.get_state()))
        generator.manual_seed(seed + self._place)

    def after(self, part: nn.Module, inputs: Sequence[Any], output: Any) -> None:
        generator, state = self._states.pop()
        generator.set_state(state)


# ---- gradients -------------------------------------------------------------------------------------------------------
def _local(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.to_local() if isinstance(value, DTensor) else value


def settle_gradients(module: nn.Module) -> None:
    """Bring the gradients of `DTensor`s to where the parameters are: some are sums that are yet to be taken."""
    for value in module.parameters():
        if isinstance(value, DTensor) and isinstance(value.grad, DTensor) and value.grad.placements != value.placements:
            value.grad = value.grad.redistribute(placements=value.placements)


def sum_over(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over the ranks of a group in place, many in one message."""
    for bucket in _buckets(tensors):
        flat = torch.cat([value.reshape(-1) for value in bucket])
        dist.all_reduce(flat, group=group)
        for value, summed in zip(bucket, flat.split([value.numel() for value in bucket]), strict=True):
            value.copy_(summed.view_as(value))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type, of some megabytes each."""
    bucket: list[Tensor] = []
    for value in tensors:
        held = sum(one.nbytes for one in bucket)
        if bucket and (value.dtype != bucket[0].dtype or held + value.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(value)
    if bucket:
        yield bucket
