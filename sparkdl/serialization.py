"""Modules on disk: a description that is data, weights as safetensors, and no code that runs on loading.

A description is the tree of a module: for each part its class by name, its plain attributes, and which weights it
holds. Loading makes each part without calling its constructor and gives it those attributes. Classes are looked up in
`torch.nn`, in packages that the caller allowed, and among modules that this process has imported already; a file cannot
make Python import anything else.
"""

import contextlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from sparkdl.errors import PersistenceError

__all__ = [
    "allow_modules",
    "describe_module",
    "dump_weights",
    "load_state",
    "load_weights",
    "path_of",
    "resolve_function",
    "restore_module",
    "state_of",
]

_ALWAYS_ALLOWED = ("torch.nn",)
_FUNCTION_HOMES = ("torch.nn.functional", "torch._C._nn", "sparkdl.adapters")
_allowed: set[str] = set()
_MACHINERY = frozenset(nn.Module().__dict__)  # what every module has: parameters, hooks, ...
_SEQUENCES: tuple[Callable[..., Any], ...] = (tuple, set, frozenset, torch.Size)
_ALIASES = "aliases"


# ---- weights ---------------------------------------------------------------------------------------------------------
def dump_weights(module: nn.Module) -> bytes:
    """The state of a module as safetensors; tied weights are stored once, buffers outside the state_dict as well.

    Raises:
        PersistenceError: The module keeps extra state that is no tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, value in state_of(module).items():
        first = names.setdefault(id(value), name)
        if first == name:
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            aliases[name] = first
    return safetensors.torch.save(tensors, {_ALIASES: json.dumps(aliases)})


def load_weights(module: nn.Module, weights: bytes) -> None:
    """Give a module the weights of `dump_weights`.

    Raises:
        PersistenceError: The weights are of another module, or damaged.
    """
    try:
        tensors = safetensors.torch.load(weights)
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        aliases = json.loads(header.get("__metadata__", {}).get(_ALIASES, "{}"))
        tensors.update({name: tensors[first] for name, first in aliases.items()})
    except (safetensors.SafetensorError, ValueError, LookupError) as error:
        raise PersistenceError(f"The weights cannot be read: {error}. Was the save completed?") from error
    try:
        load_state(module, tensors)
    except (RuntimeError, KeyError) as error:
        raise PersistenceError(f"The weights do not fit the module {type(module).__name__}: {error}") from error


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module, by name: those of its state_dict, and the buffers that it leaves out.

    No constructor runs when a module is restored, so what is registered with persistent=False must be stored too.

    Raises:
        PersistenceError: The module keeps extra state that is no tensor.
    """
    found = {**dict(module.named_buffers(remove_duplicate=False)), **module.state_dict(keep_vars=True)}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise PersistenceError(
                f"{type(module).__name__} keeps {name!r}, a {type(value).__name__}, in its state; only tensors are "
                "stored. Keep such state in attributes, or store it with the module's settings."
            )
    return found


def load_state(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `state_of`, into the tensors that the module has.

    Raises:
        KeyError: A tensor is missing.
        RuntimeError: The tensors are of another module.
    """
    state, left = module.state_dict(), dict(tensors)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if name not in state:
            found = left.pop(name)
            if found.shape != buffer.shape:
                raise RuntimeError(f"size mismatch for {name}: {tuple(found.shape)} and {tuple(buffer.shape)}")
            buffer.copy_(found)
    module.load_state_dict(left)


# ---- descriptions ----------------------------------------------------------------------------------------------------
def describe_module(module: nn.Module) -> dict[str, Any]:
    """The structure of a module as JSON values, without its weights.

    Raises:
        PersistenceError: Some part cannot be described: a class defined in a notebook or inside a function, hooks, or
            an attribute that is no plain value.
    """
    return _Writer().part(module, type(module).__name__)


def restore_module(description: Mapping[str, Any], weights: bytes, allowed: Sequence[str] = ()) -> nn.Module:
    """The module of a description, with its weights. Runs no constructor and nothing that the file names but classes.

    Args:
        description: From `describe_module`.
        weights: From `dump_weights`.
        allowed: Packages whose classes may be imported, besides `torch.nn`.

    Raises:
        PersistenceError: A class that is not trusted or does not exist, or weights of another module.
    """
    try:
        module = _Reader(allowed).part(description)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, PersistenceError):
            raise
        raise PersistenceError(f"The description of the module is damaged: {error!r}.") from error
    load_weights(module, weights)
    return module


def allow_modules(*packages: str) -> None:
    """Trust the classes of these packages when models are loaded in this process."""
    _allowed.update(packages)


def resolve(path: str, allowed: Sequence[str] = ()) -> Any:
    """What ``package.module:qualified.name`` names, if it is trusted.

    Raises:
        PersistenceError: Its package is not trusted, or there is no such thing.
    """
    name, _, qualified = path.partition(":")
    trusted = (*_ALWAYS_ALLOWED, *_allowed, *allowed)
    if name not in sys.modules and not _within(name, trusted):
        raise PersistenceError(
            f"The file asks for {path}, which is in none of the trusted packages ({', '.join(trusted)}). If you trust "
            f"it, `import {name}` before loading, or call sparkdl.allow_modules({name.partition('.')[0]!r})."
        )
    try:
        found: Any = importlib.import_module(name)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise PersistenceError(f"The file asks for {path}, which does not exist here: {error}.") from error
    if path_of(found) != path:
        # Modules hold what they import: without this, torch.nn.functional would lead to torch, and that to os.
        raise PersistenceError(f"The file asks for {path}, which is not defined there. The file is not to be trusted.")
    return found


def resolve_function(path: str, allowed: Sequence[str] = ()) -> Any:
    """What a file names to be called: functions and classes of torch, or of packages that were allowed by name.

    That a module happens to be imported is not enough here, as it is for the class of a module: ``os`` always is.
    Of torch these are trusted: `torch.nn.functional`, the arithmetic in `torch` itself, and classes of modules and
    optimizers; of sparkdl, the steps of `sparkdl.adapters`, which call the module alone.

    Raises:
        PersistenceError: As `resolve`.
    """
    package, _, name = path.partition(":")
    found: Any = None
    if package == "torch":
        found = _arithmetic(name)
    elif package in _FUNCTION_HOMES:
        found = resolve(path, (package,))
    elif _within(package, ("torch.nn", "torch.optim")):
        kind = resolve(path, ("torch.nn", "torch.optim"))
        found = kind if isinstance(kind, type) and issubclass(kind, nn.Module | torch.optim.Optimizer) else None
    elif _within(package, (*_allowed, *allowed)):
        found = resolve(path, allowed)
    if found is None:
        raise PersistenceError(
            f"The file asks for the function {path}, which is in none of the trusted packages (torch's own, and those "
            f"allowed by name). If you trust it, call sparkdl.allow_modules({package.partition('.')[0]!r})."
        )
    return found


def _within(package: str, trusted: Sequence[str]) -> bool:
    return any(package == entry or package.startswith(f"{entry}.") for entry in trusted)


def _arithmetic(name: str) -> Any:
    """``torch.<name>`` where it is one of torch's own compiled functions, such as relu; else None."""
    found = getattr(torch, name, None)
    compiled = isinstance(found, BuiltinFunctionType) and found.__qualname__.startswith("_VariableFunctionsClass.")
    return found if compiled else None


def path_of(thing: Any) -> str | None:
    """``package.module:qualified.name`` of a class or function; None where it cannot be imported by that name."""
    name, qualified = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if isinstance(thing, BuiltinFunctionType) and _arithmetic(thing.__name__) is thing:
        return f"torch:{thing.__name__}"
    if not name or not qualified or name == "__main__" or "<" in qualified:
        return None
    with contextlib.suppress(ImportError, AttributeError):
        found: Any = importlib.import_module(name)
        for part in qualified.split("."):
            found = getattr(found, part)
        return f"{name}:{qualified}" if found is thing else None
    return None


class _Writer:
    def __init__(self) -> None:
        self._parts: dict[int, int] = {}
        self._tensors: dict[int, str] = {}

    def part(self, module: nn.Module, where: str) -> dict[str, Any]:
        """One module; a module met before becomes a reference to the first."""
        if id(module) in self._parts:
            return {"same": self._parts[id(module)]}
        self._parts[id(module)] = len(self._parts)
        path = path_of(type(module))
        if path is None:
            raise PersistenceError(
                f"{where}: the class {type(module).__qualname__} cannot be imported by its name (it is defined in a "
                "notebook, a script or a function). Move it to a Python file that can be imported, or save with "
                '.option("allowPickle", "true").'
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise PersistenceError(
                f"{where}: {type(module).__name__} has no shapes yet. Run the module once on an example, give the "
                'sizes, or save with .option("allowPickle", "true").'
            )
        state = module.__getstate__() if hasattr(type(module), "__getstate__") else module.__dict__
        state = dict(state) if isinstance(state, dict) else dict(module.__dict__)
        for name, value in state.items():
            if "hook" in name and value and name in _MACHINERY:
                raise PersistenceError(f"{where}: hooks ({name}) are code and cannot be described. Remove them first.")
            _check_attribute(name, value, path)
        tensors = {}
        for kind in ("_parameters", "_buffers"):
            tensors[kind] = {
                name: None if value is None else self._tensor(value, f"{where}.{name}")
                for name, value in getattr(module, kind).items()
            }
        return {
            "class": path,
            "parameters": tensors["_parameters"],
            "buffers": tensors["_buffers"],
            "transient": sorted(getattr(module, "_non_persistent_buffers_set", ())),
            "children": {
                name: None if child is None else self.part(child, f"{where}.{name}")
                for name, child in module._modules.items()
            },
            "training": module.training,
            "attributes": {
                name: self._value(value, f"{where}.{name}") for name, value in state.items() if name not in _MACHINERY
            },
        }

    def _tensor(self, tensor: torch.Tensor, where: str) -> dict[str, Any]:
        if id(tensor) in self._tensors:
            return {"same": self._tensors[id(tensor)]}
        self._tensors[id(tensor)] = where
        return {
            "name": where,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "requires_grad": tensor.requires_grad,
        }

    def _value(self, value: Any, where: str) -> Any:
        """A plain attribute as JSON; what JSON does not have is a one-key object."""
        # Exact types: a namedtuple would come back as a tuple, an OrderedDict as a dict.
        kind = type(value)
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return value
        if kind is float:
            return {"float": repr(value)}
        if isinstance(value, nn.Parameter) and id(value) in self._tensors:
            return {"tensor": self._tensors[id(value)]}
        if kind in (torch.dtype, torch.device):
            return {kind.__name__: str(value).removeprefix("torch.")}
        if kind is list:
            return [self._value(entry, where) for entry in value]
        if kind in _SEQUENCES:
            entries = [self._value(entry, where) for entry in value]
            return {kind.__name__: entries if kind in (tuple, torch.Size) else sorted(entries, key=repr)}
        if kind is dict and all(type(key) is str for key in value):
            return {"dict": {key: self._value(entry, where) for key, entry in value.items()}}
        path = path_of(value) if callable(value) else None
        if path is not None:
            return {"import": path}
        raise PersistenceError(
            f"{where} is a {type(value).__name__}, which is no plain value and cannot be described. Keep plain values "
            'and tensors in modules, or save with .option("allowPickle", "true").'
        )


class _Reader:
    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed
        self._parts: list[nn.Module] = []
        self._tensors: dict[str, torch.Tensor] = {}

    def part(self, description: Mapping[str, Any]) -> nn.Module:
        if "same" in description:
            return self._parts[int(description["same"])]
        kind = resolve(description["class"], self._allowed)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise PersistenceError(f"The file names {description['class']} as a module, but it is {kind!r}.")
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        self._parts.append(module)
        for name, found in description["parameters"].items():
            module._parameters[name] = None if found is None else self._tensor(found, parameter=True)  # type: ignore[assignment]
        for name, found in description["buffers"].items():
            module._buffers[name] = None if found is None else self._tensor(found, parameter=False)
        module._non_persistent_buffers_set = set(description["transient"])
        for name, found in description["children"].items():
            module._modules[name] = None if found is None else self.part(found)
        module.training = description["training"]
        attributes = {
            name: self._value(value)
            for name, value in description["attributes"].items()
            if name not in _MACHINERY  # a doctored file must not bring hooks
        }
        for name, value in attributes.items():
            _check_attribute(name, value, description["class"])
        module.__setstate__({**module.__dict__, **attributes})
        return module

    def _tensor(self, found: Mapping[str, Any], *, parameter: bool) -> torch.Tensor:
        if "same" in found:
            return self._tensors[found["same"]]
        tensor = torch.zeros(found["shape"], dtype=_dtype(found["dtype"]))
        if parameter:
            tensor = nn.Parameter(tensor, requires_grad=found["requires_grad"])
        self._tensors[found["name"]] = tensor
        return tensor

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        for sequence in _SEQUENCES:
            if kind == sequence.__name__:
                return sequence(self._value(entry) for entry in content)
        builders: dict[str, Callable[[Any], Any]] = {
            "float": float,
            "tensor": self._tensors.__getitem__,
            "dtype": _dtype,
            "device": torch.device,
            "dict": lambda entries: {key: self._value(entry) for key, entry in entries.items()},
            "import": lambda path: resolve_function(path, self._allowed),
        }
        if kind not in builders:
            raise PersistenceError(
                f"The file holds an attribute of unknown kind {kind!r}. Was it written by a newer version?"
            )
        return builders[kind](content)


def _check_attribute(name: str, value: Any, where: str) -> None:
    """Refuse an attribute that stands in for a method: it would be called instead of it."""
    if callable(value) and not isinstance(value, nn.Module) and hasattr(nn.Module, name):
        raise PersistenceError(f"{where}: the method {name!r} is replaced by {value!r}, which cannot be described.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise PersistenceError(f"The file asks for the dtype {name!r}, which torch does not have.")
    return found
