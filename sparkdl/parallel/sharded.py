"""Modules whose parameters are `DTensor`s: each rank holds a part of them. How they become whole, and parts again.

What is saved is whole, so that it can be loaded on another number of ranks, whose parts are others. A whole tensor is
put together one at a time, and kept on the CPU of rank 0 alone.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sparkdl.batch import Batch
from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.io.exchange import broadcast, gather_numbers
from sparkdl.optimization import Optimization
from sparkdl.serialization import state_of

__all__ = [
    "axis",
    "check_optimizers",
    "check_sharded",
    "close_mesh",
    "empty_copy",
    "filled_copy",
    "filler_rows",
    "load_whole_optimization",
    "load_whole_state",
    "open_mesh",
    "whole_copy",
    "whole_optimization",
    "whole_state",
    "without_trace",
]

_meshes = itertools.count()
_FILLER_ROWS = 2  # BatchNorm takes no single row
# The state of the first is of the whole parameter; the second writes in ways that DTensors do not know.
_UNFIT = (torch.optim.Adafactor, torch.optim.Rprop)


def check_sharded(strategy: str, config: TrainConfig) -> None:
    """Refuse settings that do not suit modules whose parameters are sharded.

    Raises:
        ConfigError: Naming the first.
    """
    if config.averaging != "none":
        raise ConfigError(
            f"averaging={config.averaging!r} keeps a second copy of the whole module, which strategy={strategy!r} is "
            "there to avoid. Use averaging='none', or strategy='ddp'."
        )
    if config.torch_compile:
        raise ConfigError(
            f"torchCompile=True compiles the module before strategy={strategy!r} takes it apart. Leave it out, or use "
            "strategy='ddp'."
        )


# ---- modules ---------------------------------------------------------------------------------------------------------
def empty_copy(module: nn.Module) -> nn.Module:
    """A copy of a plain module without its numbers: parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
        for value in module.parameters()
    }
    memo |= {id(value): value.detach().to("meta") for value in module.buffers()}
    return copy.deepcopy(module, memo)


def whole_copy(empty: nn.Module, module: nn.Module) -> nn.Module:
    """A plain module with the numbers that all ranks hold between them; a collective.

    Args:
        empty: From `empty_copy`, before the module was sharded.
        module: The module, whose parameters may be sharded by now.
    """
    with torch.no_grad():
        return filled_copy(empty, module, _whole)


def filled_copy(empty: nn.Module, module: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of an empty module with one tensor in the place of each of another module's.

    Args:
        empty: From `empty_copy`; its tensors tell the names and what is tied.
        module: What it is a copy of.
        make: Called once with every parameter and buffer of ``module``.
    """
    values = dict(_tensors(module))
    made: dict[int, Tensor] = {}
    memo: dict[int, Any] = {}
    for name, value in _tensors(empty):
        found = values[name]
        if id(found) not in made:
            one = make(found)
            wanted = isinstance(found, nn.Parameter) and not isinstance(one, nn.Parameter)
            made[id(found)] = nn.Parameter(one, requires_grad=found.requires_grad) if wanted else one
        memo[id(value)] = made[id(found)]
    return copy.deepcopy(empty, memo)


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _whole(value: Tensor) -> Tensor:
    """A plain tensor of its own memory."""
    if not isinstance(value, DTensor):
        return value.detach().clone()
    whole = cast(DTensor, value.detach()).full_tensor()
    return whole.clone() if whole.data_ptr() == value.to_local().data_ptr() else whole


def whole_state(module: nn.Module) -> dict[str, Tensor | None]:
    """What `sparkdl.serialization.state_of` returns of the whole module, on rank 0; a collective.

    Other ranks get None in the places of sharded tensors.
    """
    return {name: _kept(value) for name, value in state_of(module).items()}


def load_whole_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module its part of what `whole_state` returned on rank 0; every rank has all of it.

    Raises:
        KeyError: A tensor is missing.
        RuntimeError: A tensor is of another shape.
    """
    with torch.no_grad():
        for name, value in state_of(module).items():
            found = state[name]
            if found.shape != value.shape:
                raise RuntimeError(f"size mismatch for {name}: {tuple(found.shape)} and {tuple(value.shape)}")
            if isinstance(value, DTensor):
                value.to_local().copy_(_part(found, value).to_local())
            else:
                value.copy_(found)


def _kept(value: Any) -> Any:
    """A tensor as it is saved."""
    if not isinstance(value, DTensor):
        return value
    whole = cast(DTensor, value.detach()).full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else None


def _part(whole: Tensor, like: DTensor) -> DTensor:
    """A tensor that every rank has, sharded as another is."""
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


# ---- optimizers ------------------------------------------------------------------------------------------------------
def check_optimizers(strategy: str, optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that do not work on sharded parameters.

    Raises:
        ConfigError: Naming it.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, _UNFIT):
            raise ConfigError(
                f"strategy={strategy!r} updates each part of a parameter where it is, but {type(optimizer).__name__} "
                "needs the whole. Use another optimizer, such as 'adamw'."
            )


def whole_optimization(optimization: Optimization) -> dict[str, Any]:
    """The state of an optimization, whole on rank 0; a collective. Other ranks get parts of it."""
    state = optimization.state_dict()
    optimizers, sharded = [], []
    for one in state["optimizers"]:
        sharded.append(
            {
                index: [name for name, value in values.items() if isinstance(value, DTensor)]
                for index, values in one["state"].items()
            }
        )
        values_by_index = {
            index: {name: _kept(value) for name, value in values.items()} for index, values in one["state"].items()
        }
        optimizers.append({**one, "state": values_by_index})
    return {**state, "optimizers": optimizers, "sharded": sharded}


def load_whole_optimization(optimization: Optimization, state: Mapping[str, Any]) -> None:
    """Go on from what `whole_optimization` returned on rank 0; every rank has all of it."""
    optimizers = []
    for optimizer, one, sharded in zip(optimization.optimizers, state["optimizers"], state["sharded"], strict=True):
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        parts = {
            index: {
                name: _part(value, parameters[index]) if name in sharded[index] else value
                for name, value in values.items()
            }
            for index, values in one["state"].items()
        }
        optimizers.append({**one, "state": parts})
    optimization.load_state_dict({**state, "optimizers": optimizers})


# ---- what else sharded strategies share ------------------------------------------------------------------------------
def filler_rows(example: Batch) -> Batch:
    """Some rows for a rank that has none, equal on all ranks: the first of any rank, else zeros; a collective."""
    counts = gather_numbers([example.rows], None)[:, 0].tolist()
    source = next((rank for rank, rows in enumerate(counts) if rows), None)
    tensors = [*example.inputs, *example.labels, *([] if example.weight is None else [example.weight])]
    first = [
        value[:1].clone() if source == dist.get_rank() else value.new_zeros((1, *value.shape[1:])) for value in tensors
    ]
    if source is not None:
        broadcast(first, source)
    rows = [value.repeat(_FILLER_ROWS, *[1] * (value.dim() - 1)) for value in first]
    inputs, labels = len(example.inputs), len(example.labels)
    return Batch(
        tuple(rows[:inputs]),
        tuple(rows[inputs : inputs + labels]),
        None if example.weight is None else rows[-1],
    )


@contextlib.contextmanager
def without_trace(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Buffers and random numbers are after the block what they were before: the backward needs them as well."""
    buffers = [value.clone() for value in module.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for value, before in zip(module.buffers(), buffers, strict=True):
            value.copy_(before)


def open_mesh(device: torch.device, ranks: Tensor, names: Sequence[str]) -> DeviceMesh:
    """A mesh that is equal to none before it; a collective.

    DTensors remember, for the rest of the process, what an operation on a mesh results in, the mesh included, and to
    them meshes of the same ranks and names are equal. That of an earlier fit would come back, whose groups are gone.

    Args:
        device: Of the tensors.
        ranks: The ranks, one dimension for every name.
        names: What its dimensions are called, once a number is added; `axis` finds them again.
    """
    number = next(_meshes)
    return DeviceMesh(device.type, ranks, mesh_dim_names=tuple(f"{name}_{number}" for name in names))


def axis(mesh: DeviceMesh, dimension: int) -> DeviceMesh:
    """The ranks that this one shares all other dimensions of a mesh with."""
    assert mesh.mesh_dim_names is not None
    found: DeviceMesh = mesh[mesh.mesh_dim_names[dimension]]
    return found


def close_mesh(mesh: DeviceMesh) -> None:
    """Let go of the groups that a mesh made."""
    for group in mesh.get_all_groups():
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
