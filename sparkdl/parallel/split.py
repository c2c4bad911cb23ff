"""How a module is cut into stages that compute one after the other.

The module's forward is written down as a graph of operations, by `torch.fx` where that can follow it and by
`torch.export` where it cannot. A cut goes between two operations: what the first part knows and the second needs is
sent. Stages hold the module's own submodules and parameters under their own names.

Where nobody says where to cut, the most expensive stage is made as cheap as can be: the linear partition problem, by
dynamic programming (Skiena, The Algorithm Design Manual, 2nd edition, section 8.5), where the cost of a stage is the
bytes of its parameters, of what it computes, and of what it receives and sends.
"""

import contextlib
import inspect
import io
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from sparkdl.errors import ConfigError

__all__ = ["Stages", "check_split", "plan_cuts", "split_module"]

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]

_CONSTANTS = (int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device)
# How far the traced module may be from the module; operations may be fused, and half precision rounds each.
_RELATIVE, _ABSOLUTE = 1e-2, 1e-4


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
    """

    modules: tuple[fx.GraphModule, ...]
    received: tuple[tuple[Tensor, ...], ...]
    returned: tuple[Tensor, ...]
    restore: Callable[[Any], Any]


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
    for trace in (_trace, _export):
        try:
            traced = _measured(module, inputs, trace, autocast)
            return traced.stages(traced.cuts(stages, cut_points))
        except _Unfit as problem:
            problems.append(str(problem))
    name = type(module).__name__
    raise ConfigError(
        f"{name} cannot be cut into {stages} pipeline stages: {problems[0]}. With torch.export: {problems[1]}. Make the"
        " forward of what cannot be traced a chain of submodules (nn.Sequential), cut elsewhere, or use fewer stages."
    )


class _Unfit(Exception):
    """One way to write the module down, or to cut it, that did not work out; says why."""


@dataclass(frozen=True)
class _Traced:
    """A module as operations, each with what it is known to return.

    Attributes:
        root: What the names in the graph mean.
        graph: All operations.
        values: By node, what it returned: a tensor without data, a constant, or something else.
        pinned: Tensors, by identity, that only one stage may use: parameters, and buffers that the forward changes.
        whole: What could not be looked into, by name.
        restore: Makes the module's output of that of the graph.
    """

    root: nn.Module
    graph: fx.Graph
    values: Mapping[fx.Node, Any]
    pinned: frozenset[int]
    whole: frozenset[str]
    restore: Callable[[Any], Any]

    @property
    def pieces(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op in ("call_module", "call_function", "call_method")]

    def crossing(self, pieces: Sequence[fx.Node]) -> list[list[fx.Node]]:
        """What has to go over a cut before each piece, in order."""
        place = {node: number for number, node in enumerate(pieces)}
        needed: list[list[fx.Node]] = [[] for _ in pieces]
        for node in self.graph.nodes:
            if node.op in ("get_attr", "output"):
                continue
            last = max((place.get(user, len(pieces) - 1) for user in node.users), default=-1)
            for cut in range(place.get(node, -1) + 1, last + 1):
                needed[cut].append(node)
        return needed

    def tensors_of(self, node: fx.Node) -> list[Tensor]:
        """Parameters and buffers that an operation uses."""
        found: list[Tensor] = []
        if node.op == "call_module":
            part = self.root.get_submodule(str(node.target))
            found = [*part.parameters(), *part.buffers()]
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and isinstance(value := _attribute(self.root, str(argument.target)), Tensor):
                found.append(value)
        return found

    def cuts(self, stages: int, cut_points: Sequence[str]) -> list[int]:
        """The first pieces of all stages but the first."""
        pieces = self.pieces
        tensors = [[value for value in self.tensors_of(node) if id(value) in self.pinned] for node in pieces]
        crossing = [self._crossing_bytes(nodes) for nodes in self.crossing(pieces)]
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
            returned = [value.nbytes for value in tree_leaves(self.values[node]) if isinstance(value, Tensor)]
            costs.append(float(sum(new.values()) + sum(returned)))
        trainable = [any(value.requires_grad for value in used) for used in tensors]
        if cut_points:
            return self._named(pieces, cut_points, crossing, trainable)
        found = plan_cuts(costs, stages, crossing=crossing, trainable=trainable)
        if found is None:
            raise _Unfit(self._too_few(crossing, trainable))
        return found

    def _crossing_bytes(self, nodes: Sequence[fx.Node]) -> float:
        values = [self.values[node] for node in nodes]
        if not all(isinstance(value, (Tensor, *_CONSTANTS)) for value in values):
            return math.inf
        return float(sum(value.nbytes for value in values if isinstance(value, Tensor)))

    def _named(
        self, pieces: Sequence[fx.Node], names: Sequence[str], crossing: Sequence[float], trainable: Sequence[bool]
    ) -> list[int]:
        cuts: list[int] = []
        for name in names:
            inside = [number for number, node in enumerate(pieces) if _is_inside(node, name)]
            if not inside:
                around = [whole for whole in self.whole if name.startswith(f"{whole}.")]
                raise _Unfit(
                    f"{around[0]!r} cannot be looked into, so that no stage can begin with {name!r} in it"
                    if around
                    else f"no stage can begin with {name!r}, which the forward does not call"
                )
            if not math.isfinite(crossing[inside[0]]):
                raise _Unfit(
                    f"no stage can begin with {name!r}: both sides use the same parameters, or share more than tensors"
                )
            cuts.append(inside[0])
        bounds = [0, *cuts, len(pieces)]
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
        large = [f"{name!r} ({type(self.root.get_submodule(name)).__name__})" for name in sorted(self.whole)]
        why = f"; {_listed(large)} cannot be looked into" if large else ""
        return f"there are {most} parts with something to train that can be cut apart{why}"

    def stages(self, cuts: Sequence[int]) -> Stages:
        """The stages between the cuts."""
        pieces = self.pieces
        crossing = self.crossing(pieces)
        grads = self._requiring_grad()
        known = {
            node: value.detach().requires_grad_(grads[node])
            for node, value in self.values.items()
            if isinstance(value, Tensor)
        }
        bounds = [0, *cuts, len(pieces)]
        modules, received = [], []
        sent = [node for node in self.graph.nodes if node.op == "placeholder"]
        for start, stop in itertools.pairwise(bounds):
            needed = crossing[stop] if stop < len(pieces) else None
            following = None if needed is None else [node for node in needed if isinstance(self.values[node], Tensor)]
            modules.append(self._stage(sent, pieces[start:stop], following))
            if following is not None:
                received.append(tuple(known[node] for node in following))
                sent = following
        output = next(node for node in self.graph.nodes if node.op == "output")
        last = tree_leaves(fx.map_arg(output.args[0], lambda node: known.get(node, self.values[node])))
        returned = tuple(value for value in last if isinstance(value, Tensor))
        return Stages(tuple(modules), tuple(received), returned, self.restore)

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
            return self.values[node]  # of a stage before; the shapes are those of every micro-batch

        for node in pieces:
            # Not node_copy, which takes no constant for a node.
            arguments = fx.map_arg((node.args, node.kwargs), argument)
            made[node] = graph.create_node(node.op, node.target, *arguments, name=node.name)  # type: ignore[misc]
        if following is None:
            output = next(node for node in self.graph.nodes if node.op == "output")
            graph.output(fx.map_arg(output.args[0], argument))
        else:
            graph.output(tuple(made[node] for node in following))
        return fx.GraphModule(self.root, graph)

    def _requiring_grad(self) -> dict[fx.Node, bool]:
        """Which tensors a gradient has to be known of; some more than needed do no harm."""
        found: dict[fx.Node, bool] = {}
        for node in self.graph.nodes:
            needs = any(found[one] for one in node.all_input_nodes)
            needs = needs or any(value.requires_grad for value in self.tensors_of(node))
            value = self.values.get(node)
            found[node] = needs and not (isinstance(value, Tensor) and not value.is_floating_point())
        return found


# ---- writing a module down -------------------------------------------------------------------------------------------
Written = tuple[nn.Module, fx.Graph, frozenset[str], Callable[[Any], Any]]
Trace = Callable[[nn.Module, Sequence[Tensor]], Written]


def _measured(module: nn.Module, inputs: Sequence[Tensor], trace: Trace, autocast: Autocast) -> _Traced:
    """Trace a module, and see that the graph computes what the module computes."""
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    devices = [value.device for value in inputs if value.device.type == "cuda"][:1]

    def run(forward: Callable[[], Any]) -> Any:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            with autocast():
                result = forward()
            changed.update(name for name, value in module.named_buffers() if not _equal(value, buffers[name]))
            for name, value in module.named_buffers():
                value.copy_(buffers[name])
        return result

    changed: set[str] = set()
    root, graph, whole, restore = trace(module, inputs)
    expected = run(lambda: module(*inputs))
    recorder = _Recorder(root, graph)
    try:
        found = restore(run(lambda: recorder.run(*inputs, enable_io_processing=False)))
    except Exception as error:
        raise _Unfit(f"what was traced of its forward does not run ({_first_line(error)})") from error
    if not _close(found, expected):
        raise _Unfit("what was traced of its forward does not compute the same")
    mutable = {id(value) for name, value in module.named_buffers() if name in changed}
    pinned = {id(value) for value in module.parameters()} | mutable
    return _Traced(root, graph, recorder.values, frozenset(pinned), whole, restore)


class _Recorder(fx.Interpreter):
    """Runs a graph, and remembers what its operations return, without the data."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """See `torch.fx.Interpreter`."""
        result = super().run_node(n)
        if n.op != "output":
            self.values[n] = tree_map_only(Tensor, _without_data, result)
        return result


class _Tracer(fx.Tracer):
    """Looks into all submodules but torch's own layers and those that cannot be looked into."""

    def __init__(self, whole: frozenset[str]) -> None:
        super().__init__()
        self._whole = whole
        self.inside: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `torch.fx.Tracer`; a forward of its own object is one that computes activations again."""
        whole = module_qualified_name in self._whole or "forward" in vars(m)
        return whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `torch.fx.Tracer`."""
        self.inside.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not where it failed: the last one is the culprit
        return result


def _trace(module: nn.Module, inputs: Sequence[Tensor]) -> Written:
    parameters = list(inspect.signature(module.forward).parameters.values())
    rest = {one.name: one.default for one in parameters[len(inputs) :] if one.default is not inspect.Parameter.empty}
    whole: frozenset[str] = frozenset()
    while True:
        tracer = _Tracer(whole)
        try:
            graph = tracer.trace(module, concrete_args=rest or None)
        except Exception as error:
            if not tracer.inside:
                raise _Unfit(
                    f"the forward of {type(module).__name__} cannot be traced ({_first_line(error)})"
                ) from error
            whole |= {tracer.inside[-1]}
            continue
        for node in [node for node in graph.nodes if node.op == "placeholder"][len(inputs) :]:
            _erase(graph, node)
        return module, graph, whole, lambda output: output


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take an operation out, with those that use it: assertions that a default value is what it was."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _export(module: nn.Module, inputs: Sequence[Tensor]) -> Written:
    told = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = told.level
    told.setLevel(logging.ERROR)  # it prints the graph of what cannot be exported
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            program = torch.export.export(module, tuple(inputs))
        exported, spec = program.module(check_guards=False), program.call_spec.out_spec
    except Exception as error:
        raise _Unfit(f"{type(module).__name__} cannot be exported ({_first_line(error)})") from error
    finally:
        told.setLevel(level)
    # The exported module has the same names, but may have tensors of its own.
    for kind in ("_parameters", "_buffers"):
        for name, part in module.named_modules(remove_duplicate=False):
            own = {key: value for key, value in getattr(part, kind).items() if value is not None}
            if own:
                with contextlib.suppress(AttributeError):  # of a part that the forward does not use
                    getattr(exported.get_submodule(name), kind).update(own)
    graph = exported.graph
    for node in [one for one in graph.nodes if one.op == "call_module" and not one.users]:
        graph.erase_node(node)
    return exported, graph, frozenset(), lambda leaves: tree_unflatten(list(leaves), spec)


def _attribute(root: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(root.get_submodule(path), last)


def _is_inside(node: fx.Node, name: str) -> bool:
    paths = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        paths.append(str(node.target))
    return any(path == name or path.startswith(f"{name}.") for path in paths)


def _without_data(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _equal(value: Tensor, other: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(value), torch.nan_to_num(other))


def _close(found: Any, expected: Any) -> bool:
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=False))
    return len(tree_leaves(found)) == len(tree_leaves(expected)) and all(
        isinstance(one, Tensor)
        and one.shape == other.shape
        and torch.allclose(one.double(), other.double(), rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
        if isinstance(other, Tensor)
        else one == other
        for one, other in pairs
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')[:200]}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "none"
