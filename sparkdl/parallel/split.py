"""How a module is cut into stages that compute one after the other.

The module's forward is written down as a graph of operations, by `torch.fx` where that can follow it and by
`torch.export` where it cannot. A cut goes between two operations: what the first part knows and the second needs is
sent. Stages hold the module's own submodules and parameters under their own names.

Where nobody says where to cut, the most expensive stage is made as cheap as can be: the linear partition problem, by
dynamic programming (Skiena, The Algorithm Design Manual, 2nd edition, section 8.5), where the cost of a stage is the
bytes of its parameters, of what it computes, and of what it receives and sends.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sparkdl.errors import ConfigError
from sparkdl.parallel.tracing import Autocast, Traced, Unfit, export_module, trace_module

__all__ = ["Stages", "check_split", "plan_cuts", "split_module"]

_CONSTANTS = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class Stages:
    """A module in parts.

    Attributes:
        modules: The stages in order. The first takes the inputs of the module, the others the tuple of tensors that the
            one before returned.
        received: What each stage but the first is called with: tensors without data, of the shapes of one micro-batch,
            which require a gradient where one has to be sent back.
        returned: The tensors in what the last stage returns, as those.
        restore: Makes what the module returns of what the last stage returns.
        changing: Buffers, by identity, that the forward changes.
    """

    modules: tuple[fx.GraphModule, ...]
    received: tuple[tuple[Tensor, ...], ...]
    returned: tuple[Tensor, ...]
    restore: Callable[[Any], Any]
    changing: frozenset[int]


def plan_cuts(
    costs: Sequence[float], stages: int, *, crossing: Sequence[float], trainable: Sequence[bool]
) -> list[int] | None:
    """Where to cut a row of pieces, so that the most expensive stage is as cheap as can be.

    Args:
        costs: Of each piece.
        stages: How many there are to be.
        crossing: What it costs the stages on both sides to be cut before each piece; infinite where that cannot be.
        trainable: Whether a piece has something to train; every stage needs one that has.

    Returns:
        The first pieces of all stages but the first; None where there are not as many stages in it.
    """
    ends = np.append(np.asarray(crossing, dtype=np.float64), 0.0)
    ends[0] = 0.0
    before = np.concatenate([[0.0], np.cumsum(costs)])
    trained = np.concatenate([[0], np.cumsum(np.asarray(trainable, dtype=np.int64))])
    best = np.full(len(before), math.inf)
    best[0] = 0.0
    begins = []
    for _ in range(stages):
        reached, begin = np.full(len(before), math.inf), np.zeros(len(before), dtype=np.int64)
        for stop in range(1, len(before)):
            stage = before[stop] - before[:stop] + ends[:stop] + ends[stop]
            stage[trained[:stop] == trained[stop]] = math.inf
            worst = np.maximum(best[:stop], stage)
            begin[stop] = worst.argmin()
            reached[stop] = worst[begin[stop]]
        best = reached
        begins.append(begin)
    if not math.isfinite(best[-1]):
        return None
    cuts = [len(costs)]
    for begin in reversed(begins):
        cuts.append(int(begin[cuts[-1]]))
    return cuts[-2:0:-1]


def check_split(module: nn.Module, stages: int, cut_points: Sequence[str], trained: Iterable[str]) -> None:
    """Refuse what the module's layers alone rule out, without calling it.

    Args:
        module: The module.
        stages: Stages that it is to be cut into.
        cut_points: Submodules that stages begin with.
        trained: Names of the parameters that are trained.

    Raises:
        ConfigError: More stages than layers, or cut points that are not there or not as many.
    """
    layers = sorted({name.rpartition(".")[0] for name in trained})
    if len(layers) < stages:
        raise ConfigError(
            f"{stages} pipeline stages need as many layers with parameters to train, but {type(module).__name__} has "
            f"{len(layers)} ({_listed(layers)}). Use at most stages={len(layers)}."
        )
    if not cut_points:
        return
    if len(cut_points) != stages - 1:
        raise ConfigError(
            f"cut_points={list(cut_points)!r} make {len(cut_points) + 1} pipeline stages, but there are to be {stages}."
            f" Name {stages - 1} submodules that a stage begins with, or leave cut_points out."
        )
    names = [name for name, _ in module.named_modules() if name]
    unknown = [name for name in cut_points if name not in names]
    if unknown:
        raise ConfigError(
            f"cut_points: {unknown[0]!r} is no submodule of {type(module).__name__}. There are {_listed(names)}."
        )


def split_module(
    module: nn.Module,
    inputs: Sequence[Tensor],
    stages: int,
    cut_points: Sequence[str] = (),
    *,
    autocast: Autocast = contextlib.nullcontext,
) -> Stages:
    """Cut a module into stages.

    The module is called twice with the inputs; random numbers and buffers are put back.

    Args:
        module: The module, in training mode.
        inputs: One micro-batch, on the module's device. The stages take micro-batches of its shapes alone.
        stages: How many.
        cut_points: Names of the submodules that the stages after the first begin with; none where costs decide.
        autocast: In what the forward is computed.

    Raises:
        ConfigError: The module cannot be cut, or not into as many stages, or not there.
    """
    problems = []
    for trace in (trace_module, export_module):
        try:
            cutting = _Cutting(trace(module, inputs, autocast))
            return cutting.stages(cutting.cuts(stages, cut_points))
        except Unfit as problem:
            problems.append(str(problem))
    name = type(module).__name__
    raise ConfigError(
        f"{name} cannot be cut into {stages} pipeline stages: {problems[0]}. With torch.export: {problems[1]}. Make the"
        " forward of what cannot be traced a chain of submodules (nn.Sequential), cut elsewhere, or use fewer stages."
    )


class _Cutting:
    """Cuts one module that was written down."""

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._pieces = traced.operations
        self._crossing = self._nodes_crossing()

    def _nodes_crossing(self) -> list[list[fx.Node]]:
        """What has to go over a cut before each piece, in order."""
        pieces = self._pieces
        place = {node: number for number, node in enumerate(pieces)}
        needed: list[list[fx.Node]] = [[] for _ in pieces]
        for node in self._traced.graph.nodes:
            if node.op in ("get_attr", "output"):
                continue
            last = max((place.get(user, len(pieces) - 1) for user in node.users), default=-1)
            for cut in range(place.get(node, -1) + 1, last + 1):
                needed[cut].append(node)
        return needed

    def cuts(self, stages: int, cut_points: Sequence[str]) -> list[int]:
        """The first pieces of all stages but the first."""
        traced, pieces = self._traced, self._pieces
        # Of what only one stage may use; other buffers may be in several.
        pinned = {id(value) for value in traced.root.parameters()} | traced.changing
        tensors = [[value for value in traced.tensors_of(node) if id(value) in pinned] for node in pieces]
        crossing = [self._crossing_bytes(nodes) for nodes in self._crossing]
        uses: dict[int, list[int]] = {}
        for number, used in enumerate(tensors):
            for value in used:
                uses.setdefault(id(value), []).append(number)
        for places in uses.values():
            for number in range(places[0] + 1, places[-1] + 1):
                crossing[number] = math.inf
        counted: set[int] = set()
        costs = []
        for node, used in zip(pieces, tensors, strict=True):
            new = {id(value): value.nbytes for value in used if id(value) not in counted}
            counted |= new.keys()
            returned = [value.nbytes for value in tree_leaves(traced.values[node]) if isinstance(value, Tensor)]
            costs.append(float(sum(new.values()) + sum(returned)))
        trainable = [any(value.requires_grad for value in used) for used in tensors]
        if cut_points:
            return self._named(cut_points, crossing, trainable)
        found = plan_cuts(costs, stages, crossing=crossing, trainable=trainable)
        if found is None:
            raise Unfit(self._too_few(crossing, trainable))
        return found

    def _crossing_bytes(self, nodes: Sequence[fx.Node]) -> float:
        values = [self._traced.values[node] for node in nodes]
        if not all(isinstance(value, (Tensor, *_CONSTANTS)) for value in values):
            return math.inf
        return float(sum(value.nbytes for value in values if isinstance(value, Tensor)))

    def _named(self, names: Sequence[str], crossing: Sequence[float], trainable: Sequence[bool]) -> list[int]:
        cuts: list[int] = []
        for name in names:
            inside = [number for number, node in enumerate(self._pieces) if _is_inside(node, name)]
            if not inside:
                around = [whole for whole in self._traced.whole if name.startswith(f"{whole}.")]
                raise Unfit(
                    f"{around[0]!r} cannot be looked into, so that no stage can begin with {name!r} in it"
                    if around
                    else f"no stage can begin with {name!r}, which the forward does not call"
                )
            if not math.isfinite(crossing[inside[0]]):
                raise Unfit(
                    f"no stage can begin with {name!r}: both sides use the same parameters, or share more than tensors"
                )
            cuts.append(inside[0])
        bounds = [0, *cuts, len(self._pieces)]
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if not any(trainable[start:stop]):
                place = f"before {names[number]!r}" if number < len(names) else f"from {names[-1]!r} on"
                raise ConfigError(
                    f"cut_points={list(names)!r}: the stage {place} has nothing to train. Name, in the order of the "
                    "forward, submodules that have parameters to train between them."
                )
        return cuts

    def _too_few(self, crossing: Sequence[float], trainable: Sequence[bool]) -> str:
        most, begun = 0, False
        for number, (cost, trains) in enumerate(zip(crossing, trainable, strict=True)):
            if begun and number and math.isfinite(cost):
                most, begun = most + 1, False
            begun = begun or trains
        most += begun
        large = [
            f"{name!r} ({type(self._traced.root.get_submodule(name)).__name__})" for name in sorted(self._traced.whole)
        ]
        why = f"; {_listed(large)} cannot be looked into" if large else ""
        return f"of the parts with something to train no more than {most} can be cut apart{why}"

    def stages(self, cuts: Sequence[int]) -> Stages:
        """The stages between the cuts."""
        traced, count = self._traced, len(self._pieces)
        known = traced.requiring_grad()
        modules, received = [], []
        sent = traced.inputs
        for start, stop in itertools.pairwise([0, *cuts, count]):
            following = [node for node in self._crossing[stop] if node in known] if stop < count else None
            modules.append(self._stage(sent, self._pieces[start:stop], following))
            if following is not None:
                received.append(tuple(known[node] for node in following))
                sent = following
        last = tree_leaves(fx.map_arg(traced.output, lambda node: known.get(node, traced.values.get(node))))
        returned = tuple(value for value in last if isinstance(value, Tensor))
        return Stages(tuple(modules), tuple(received), returned, traced.restore, traced.changing)

    def _stage(
        self, given: Sequence[fx.Node], pieces: Sequence[fx.Node], following: Sequence[fx.Node] | None
    ) -> fx.GraphModule:
        graph, made = fx.Graph(), {}
        for number, node in enumerate(given):
            made[node] = graph.placeholder(f"given_{number}")

        def argument(node: fx.Node) -> Any:
            if node in made:
                return made[node]
            if node.op == "get_attr":
                made[node] = graph.node_copy(node)
                return made[node]
            return self._traced.values[node]  # of a stage before; the shapes are those of every micro-batch

        for node in pieces:
            # Not node_copy, which takes no constant for a node.
            arguments = fx.map_arg((node.args, node.kwargs), argument)
            made[node] = graph.create_node(node.op, node.target, *arguments, name=node.name)
        if following is None:
            graph.output(fx.map_arg(self._traced.output, argument))
        else:
            graph.output(tuple(made[node] for node in following))
        return fx.GraphModule(self._traced.root, graph)


def _is_inside(node: fx.Node, name: str) -> bool:
    paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        paths.append(str(node.target))
    return any(path == name or path.startswith(f"{name}.") for path in paths)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "none"
