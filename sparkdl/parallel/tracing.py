"""A module's forward written down as a graph of operations, by `torch.fx` or by `torch.export`, and what each returns.

`torch.fx` keeps torch's own layers as they are. It cannot follow a forward whose way depends on the numbers; such a
submodule stays one operation. `torch.export` writes down what is inside of torch's layers as well, for training alone.
"""

import contextlib
import inspect
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

__all__ = ["Autocast", "Traced", "Unfit", "export_module", "trace_module"]

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]

# How far the graph may be from the module; operations may be fused, and half precision rounds each.
_RELATIVE, _ABSOLUTE = 1e-2, 1e-4


class Unfit(Exception):
    """A way to write a module down that did not work out, or that does not serve; says why."""


@dataclass(frozen=True)
class Traced:
    """A module as operations, each with what it returned.

    Attributes:
        root: What the names in the graph mean.
        graph: All operations.
        values: By node, what it returned: a tensor without data, or something else.
        changing: Buffers, by identity, that the forward changes.
        whole: What could not be looked into, by name.
        restore: Makes the module's output of that of the graph.
    """

    root: nn.Module
    graph: fx.Graph
    values: Mapping[fx.Node, Any]
    changing: frozenset[int]
    whole: frozenset[str]
    restore: Callable[[Any], Any]

    @property
    def operations(self) -> list[fx.Node]:
        """What is computed, in order."""
        return [node for node in self.graph.nodes if node.op in ("call_module", "call_function", "call_method")]

    @property
    def inputs(self) -> list[fx.Node]:
        """What the module is given."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> Any:
        """What the graph returns: nodes, or containers of them."""
        return next(node for node in self.graph.nodes if node.op == "output").args[0]

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

    def requiring_grad(self) -> dict[fx.Node, Tensor]:
        """The tensors that operations return, which require a gradient where one may have to be known of them."""
        needs: dict[fx.Node, bool] = {}
        for node in self.graph.nodes:
            value = self.values.get(node)
            trained = any(needs[one] for one in node.all_input_nodes)
            trained = trained or any(one.requires_grad for one in self.tensors_of(node))
            needs[node] = trained and not (isinstance(value, Tensor) and not value.is_floating_point())
        return {
            node: value.detach().requires_grad_(needs[node])
            for node, value in self.values.items()
            if isinstance(value, Tensor)
        }


_Written = tuple[nn.Module, fx.Graph, frozenset[str], Callable[[Any], Any]]


def trace_module(module: nn.Module, inputs: Sequence[Tensor], autocast: Autocast) -> Traced:
    """Write a module down with `torch.fx`; it is called, and random numbers and buffers are put back.

    Args:
        module: The module, in training mode.
        inputs: What it is called with.
        autocast: In what.

    Raises:
        Unfit: Its own forward cannot be followed.
    """
    return _measured(module, inputs, _trace(module, inputs), autocast)


def export_module(module: nn.Module, inputs: Sequence[Tensor], autocast: Autocast) -> Traced:
    """As `trace_module`, with `torch.export`.

    Raises:
        Unfit: It cannot be exported.
    """
    return _measured(module, inputs, _export(module, inputs), autocast)


def _measured(module: nn.Module, inputs: Sequence[Tensor], written: _Written, autocast: Autocast) -> Traced:
    """Run the graph, and see that it computes what the module computes."""
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    devices = [value.device for value in inputs if value.device.type == "cuda"][:1]

    def run(forward: Callable[[], Any]) -> Any:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            try:
                with autocast():
                    return forward()
            finally:
                for name, value in module.named_buffers():
                    if not _equal(value, buffers[name]):
                        changed.add(name)
                        value.copy_(buffers[name])

    changed: set[str] = set()
    root, graph, whole, restore = written
    expected = run(lambda: module(*inputs))
    recorder = _Recorder(root, graph)
    try:
        found = restore(run(lambda: recorder.run(*inputs, enable_io_processing=False)))
    except Exception as error:
        raise Unfit(f"what was traced of its forward does not run ({_first_line(error)})") from error
    if not _close(found, expected):
        raise Unfit("what was traced of its forward does not compute the same")
    changing = frozenset(id(value) for name, value in module.named_buffers() if name in changed)
    return Traced(root, graph, recorder.values, changing, whole, restore)


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

    # Or what is computed of buffers alone would be computed now, once and for all.
    proxy_buffer_attributes = True

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


def _trace(module: nn.Module, inputs: Sequence[Tensor]) -> _Written:
    parameters = list(inspect.signature(module.forward).parameters.values())
    rest = {one.name: one.default for one in parameters[len(inputs) :] if one.default is not inspect.Parameter.empty}
    whole: frozenset[str] = frozenset()
    while True:
        tracer = _Tracer(whole)
        try:
            graph = tracer.trace(module, concrete_args=rest or None)
        except Exception as error:
            culprit = next((name for name in reversed(tracer.inside) if name not in whole), None)
            if culprit is None:
                raise Unfit(
                    f"the forward of {type(module).__name__} cannot be traced ({_first_line(error)})"
                ) from error
            whole |= {culprit}
            continue
        for node in [node for node in graph.nodes if node.op == "placeholder"][len(inputs) :]:
            _erase(graph, node)
        return module, graph, whole, lambda output: output


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take an operation out, with those that use it: assertions that a default value is what it was."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _export(module: nn.Module, inputs: Sequence[Tensor]) -> _Written:
    told = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = told.level
    told.setLevel(logging.ERROR)  # it prints the graph of what cannot be exported
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            program = torch.export.export(module, tuple(inputs))
        exported, spec = program.module(check_guards=False), program.call_spec.out_spec
    except Exception as error:
        raise Unfit(f"{type(module).__name__} cannot be exported ({_first_line(error)})") from error
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


def _without_data(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _equal(value: Tensor, other: Tensor) -> bool:
    nan = value.is_floating_point() and torch.allclose(value, other, rtol=0, atol=0, equal_nan=True)
    return nan or torch.equal(value, other)


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
