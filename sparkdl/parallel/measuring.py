"""What a module weighs, and how long it computes: measured on a copy of it, in this process alone."""

import copy
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from sparkdl.batch import Batch
from sparkdl.objective import Objective
from sparkdl.optimization import BuildOptimization, Optimization
from sparkdl.parallel.facts import ModuleFacts

__all__ = ["Timing", "copy_seconds_per_byte", "count_module", "fitting", "of_rows", "time_module"]

_LEAST_ROWS = 2  # BatchNorm refuses to train on one
_MOST_REPEATS = 25
_COPIED = 16 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the steps of a module without any exchange.

    Attributes:
        rows: Rows of each series of steps, few and many.
        forward: Seconds of the forward pass and the loss: the lower quartile of each series.
        backward: Seconds of the backward pass, likewise.
        optimizer: Seconds of the optimizer's step: the lower quartile of all.
        jitter: Standard deviation of a step of many rows, by its mean.
        optimizer_state_bytes: What the optimizer keeps after a step.
    """

    rows: tuple[int, int]
    forward: tuple[float, float]
    backward: tuple[float, float]
    optimizer: float
    jitter: float
    optimizer_state_bytes: int


def of_rows(example: Batch, rows: int) -> Batch:
    """The rows of an example over and over, until there are so many; zeros where it has none."""

    def repeat(value: Tensor) -> Tensor:
        if not len(value):
            return value.new_zeros((rows, *value.shape[1:]))
        return value[torch.arange(rows, device=value.device) % len(value)]

    weight = None if example.weight is None else torch.ones_like(repeat(example.weight))
    return Batch(tuple(map(repeat, example.inputs)), tuple(map(repeat, example.labels)), weight)


def count_module(module: nn.Module, objective: Objective | None = None, example: Batch | None = None) -> ModuleFacts:
    """What can be counted: bytes of parameters, of layers, and of what rows leave behind; it takes no time.

    Args:
        module: The module; unchanged.
        objective: The loss, where there are rows.
        example: Some rows; None counts no activations.
    """
    layers = [list(part.parameters(recurse=False)) for part in module.modules()]
    trained = [value for value in module.parameters() if value.requires_grad]
    low_rank = vectors = 0
    for value in trained:
        rows = value.shape[0] if value.ndim > 1 else 1
        columns = value.numel() // max(rows, 1)
        if value.ndim > 1 and (rows + columns) * 4 < value.numel():
            low_rank += (rows + columns) * value.element_size()
        else:
            vectors += value.nbytes
    activations, boundary = (0.0, 0.0) if objective is None or example is None else _traces(module, objective, example)
    return ModuleFacts(
        parameter_bytes=sum(value.nbytes for value in module.parameters()),
        trainable_parameter_bytes=sum(value.nbytes for value in trained),
        buffer_bytes=sum(value.nbytes for value in module.buffers()),
        activation_bytes_per_row=activations,
        boundary_bytes_per_row=boundary,
        layer_parameter_bytes=tuple(sum(value.nbytes for value in layer) for layer in layers if layer),
        low_rank_bytes=low_rank,
        vector_bytes=vectors,
        chain_length=_chain_length(module),
        batch_norm=any(isinstance(part, _BatchNorm) for part in module.modules()),
    )


def _chain_length(module: nn.Module) -> int:
    """Pieces of a chain that have parameters: each stage needs one."""
    if isinstance(module, nn.Sequential):
        return max(1, sum(_chain_length(part) for part in module if any(True for _ in part.parameters())))
    return 1


def _traces(module: nn.Module, objective: Objective, example: Batch) -> tuple[float, float]:
    """Bytes per row that the backward pass needs, and of the largest output of a layer."""
    module, objective = copy.deepcopy(module).train(), copy.deepcopy(objective)
    own = {value.untyped_storage().data_ptr() for value in (*module.parameters(), *module.buffers())}

    def saved_bytes(rows: int) -> tuple[int, int]:
        kept: dict[int, Tensor] = {}
        largest = 0

        def pack(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = value  # kept alive: another one must not get its address
            return value

        def look(part: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal largest
            leaves = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
            largest = max(largest, sum(value.nbytes for value in leaves))

        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=_devices(module)))
            for part in module.modules():
                if part is not module and any(True for _ in part.parameters(recurse=False)):
                    stack.callback(part.register_forward_hook(look).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value))
            loss, _ = objective.compute(module, of_rows(example, rows))
        del loss
        return sum(value.untyped_storage().nbytes() for value in kept.values()), largest

    few, many = _LEAST_ROWS, 2 * _LEAST_ROWS
    (bytes_few, _), (bytes_many, largest) = saved_bytes(few), saved_bytes(many)
    return max(0.0, (bytes_many - bytes_few) / (many - few)), largest / many


def time_module(
    module: nn.Module,
    objective: Objective,
    build: BuildOptimization,
    example: Batch,
    *,
    rows: int,
    budget_seconds: float,
) -> Timing:
    """Whole steps of a copy of the module on rows made of an example, without any exchange.

    Nothing of the module changes, nor what random layers draw next.

    Args:
        module: The module, on its device.
        objective: The loss.
        build: Makes the optimization of the copy.
        example: Some rows.
        rows: The larger number of rows; fewer are taken where memory does not hold as many.
        budget_seconds: After so long the last series ends.

    Raises:
        RuntimeError: Not even the step of two rows fits: `torch.OutOfMemoryError`.
    """
    devices = _devices(module)
    many = max(rows, 2 * _LEAST_ROWS)
    with torch.random.fork_rng(devices=devices):
        while True:
            try:
                return _time(module, objective, build, example, many, budget_seconds)
            except torch.OutOfMemoryError:
                if many <= 2 * _LEAST_ROWS:
                    raise
            # Outside of the handler, whose traceback holds on to the tensors of the step.
            many = max(many // 2, 2 * _LEAST_ROWS)
            if devices:
                torch.cuda.empty_cache()


def _devices(module: nn.Module) -> list[torch.device]:
    """Where random layers draw, beside the CPU."""
    device = next(module.parameters()).device
    return [device] if device.type == "cuda" else []


def _time(
    module: nn.Module,
    objective: Objective,
    build: BuildOptimization,
    example: Batch,
    many: int,
    budget_seconds: float,
) -> Timing:
    trained, loss = copy.deepcopy(module).train(), copy.deepcopy(objective)
    optimization = build(trained)
    device = next(trained.parameters()).device
    few = max(many // 4, _LEAST_ROWS)
    series: dict[int, list[tuple[float, float, float]]] = {few: [], many: []}
    for number, size in enumerate(series):
        batch = of_rows(example, size)
        _step(trained, loss, optimization, batch, device)  # brings memory and the optimizer's state
        end = time.perf_counter() + budget_seconds * (0.3, 0.7)[number]
        while len(series[size]) < 3 or (time.perf_counter() < end and len(series[size]) < _MOST_REPEATS):
            series[size].append(_step(trained, loss, optimization, batch, device))
    states = [state for one in optimization.optimizers for state in one.state.values()]
    usual = {size: [_usual(part) for part in zip(*times, strict=True)] for size, times in series.items()}
    totals = sorted(sum(step) for step in series[many])
    return Timing(
        rows=(few, many),
        forward=(usual[few][0], usual[many][0]),
        backward=(usual[few][1], usual[many][1]),
        optimizer=_usual([step[2] for times in series.values() for step in times]),
        jitter=_spread(totals),
        optimizer_state_bytes=sum(
            value.nbytes for state in states for value in tree_leaves(state) if isinstance(value, Tensor)
        ),
    )


def _usual(seconds: Sequence[float]) -> float:
    """The lower quartile: what else the machine does in between only adds."""
    return statistics.quantiles(seconds, n=4)[0]


def _spread(values: list[float]) -> float:
    """Standard deviation by mean, without the largest value: something else came in between."""
    kept = sorted(values)[:-1]
    return statistics.pstdev(kept) / statistics.fmean(kept)


def _step(
    module: nn.Module, objective: Objective, optimization: Optimization, batch: Batch, device: torch.device
) -> tuple[float, float, float]:
    """Seconds of forward pass, backward pass and optimizer of one step."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begun = now()
    optimization.begin_step()
    with optimization.autocast():
        loss, _ = objective.compute(module, batch)
    forward = now()
    optimization.backward(loss, 1 / batch.rows)
    backward = now()
    optimization.step()
    return forward - begun, backward - forward, now() - backward


def copy_seconds_per_byte(device: torch.device) -> float:
    """Of copying a tensor in the device's memory: the lower quartile of some copies."""
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return _usual(times) / _COPIED


def fitting(rows: tuple[float, float], seconds: tuple[float, float]) -> tuple[float, float]:
    """Fixed seconds and seconds per row, neither negative, from two measurements."""
    few, many = rows
    slope = max((seconds[1] - seconds[0]) / (many - few), 0.0)
    fixed = max(seconds[0] - slope * few, 0.0)
    return fixed, slope if fixed else seconds[1] / many
