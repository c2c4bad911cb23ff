"""Every public name has a docstring that tells the truth, annotations, and examples that run."""

import builtins
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from sparkdl import errors

PACKAGES = ("sparkdl", "sparkdl.parallel", "sparkdl.checkpoint", "sparkdl.barrier", "sparkdl.io")
SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")


def module_names() -> list[str]:
    """All modules of all packages of sparkdl."""
    names = set(PACKAGES)
    for package in PACKAGES:
        names |= {
            f"{package}.{found.name}" for found in pkgutil.iter_modules(importlib.import_module(package).__path__)
        }
    return sorted(names)


class Public(NamedTuple):
    """A public thing and where it is."""

    path: str
    thing: Any


def public_things() -> Iterator[Public]:
    """Classes and functions of all modules without a leading underscore, and the methods of those classes."""
    for name in module_names():
        module = importlib.import_module(name)
        for key, thing in vars(module).items():
            own = getattr(thing, "__module__", None) == name and not key.startswith("_")
            if own and inspect.isclass(thing):
                yield Public(f"{name}.{key}", thing)
                yield from (Public(f"{name}.{key}.{method}", found) for method, found in methods_of(thing))
            elif own and inspect.isfunction(thing):
                yield Public(f"{name}.{key}", thing)


def methods_of(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions and properties that are written in a class; none that a decorator or a protocol put there."""
    generated = {"__init__"} if dataclasses.is_dataclass(kind) else set()
    for name, found in vars(kind).items():
        function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if not inspect.isfunction(function) or name in generated:
            continue
        written = function.__module__ == kind.__module__ and "<locals>" not in function.__qualname__
        if written and (not name.startswith("_") or name == "__init__"):
            yield name, function


THINGS = list(public_things())
CLASSES = [public for public in THINGS if inspect.isclass(public.thing)]
FUNCTIONS = [public for public in THINGS if not inspect.isclass(public.thing)]


def section(doc: str, title: str) -> list[str]:
    """The names that a section of a Google docstring lists."""
    match = re.search(rf"^{title}:\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
    return re.findall(r"^    \*{0,2}([\w.]+)(?: \([^)]*\))?:", match[1], flags=re.MULTILINE) if match else []


def test_there_is_something_to_check() -> None:
    assert {"sparkdl.estimator.TorchClassifier", "sparkdl.model.TorchModel.predict", "sparkdl.io.plan.ShardPlan"} <= {
        public.path for public in THINGS
    }
    assert section(
        "Sum.\n\nArgs:\n    a: One.\n        More: text.\n    *rest: Others.\n\nReturns:\n    c: d.", "Args"
    ) == [
        "a",
        "rest",
    ]


# ---- docstrings ------------------------------------------------------------------------------------------------------
def test_every_module_says_what_it_is_for() -> None:
    first = {name: (importlib.import_module(name).__doc__ or "").partition("\n")[0] for name in module_names()}
    assert [name for name, line in first.items() if not line.endswith((".", ":"))] == []


def test_every_public_name_has_a_docstring_that_begins_with_a_sentence() -> None:
    faults = []
    for public in THINGS:
        doc = (public.thing.__doc__ or "").strip()
        sentence = doc.split("\n\n")[0].strip()
        if public.path.endswith("__init__"):
            continue
        if not sentence.endswith((".", ":")) or not (sentence[0].isupper() or sentence.startswith(("`", "'"))):
            faults.append(f"{public.path}: {sentence!r}")
    assert faults == []


def test_sections_are_known_and_list_something() -> None:
    faults = []
    for public in THINGS:
        doc = inspect.cleandoc(public.thing.__doc__ or "")
        faults += [
            f"{public.path}: {title}"
            for title in re.findall(r"^([A-Z][a-z]+):$", doc, flags=re.MULTILINE)
            if title not in SECTIONS or (title not in ("Returns", "Yields") and not section(doc, title))
        ]
    assert faults == []


def test_documented_arguments_are_those_that_there_are_in_their_order() -> None:
    """A docstring may leave arguments to their names and annotations, but names none that there is not."""
    faults = []
    for public in FUNCTIONS:
        documented = section(inspect.cleandoc(public.thing.__doc__ or ""), "Args")
        parameters = [name for name in inspect.signature(public.thing).parameters if name not in ("self", "cls")]
        if documented != [name for name in parameters if name in documented]:
            faults.append(f"{public.path}: documents {documented}, takes {parameters}")
    assert faults == []


def test_documented_attributes_are_the_fields() -> None:
    faults = []
    for public in CLASSES:
        doc = inspect.cleandoc(public.thing.__doc__ or "")
        attributes, arguments = section(doc, "Attributes"), section(doc, "Args")
        if attributes and dataclasses.is_dataclass(public.thing):
            fields = [field.name for field in dataclasses.fields(public.thing) if not field.name.startswith("_")]
            if attributes != fields:
                faults.append(f"{public.path}: documents {attributes}, has {fields}")
        if arguments and arguments != (parameters := list(inspect.signature(public.thing).parameters)):
            faults.append(f"{public.path}: documents {arguments}, takes {parameters}")
    assert faults == []


def test_documented_errors_are_classes_that_there_are() -> None:
    faults = [
        f"{public.path}: {name}"
        for public in THINGS
        for name in section(inspect.cleandoc(public.thing.__doc__ or ""), "Raises")
        if not any(hasattr(home, name) for home in (errors, builtins, inspect.getmodule(public.thing)))
    ]
    assert faults == []


# ---- annotations -----------------------------------------------------------------------------------------------------
def test_every_public_function_is_annotated() -> None:
    faults = []
    for public in FUNCTIONS:
        signature = inspect.signature(public.thing)
        given = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        given["return"] = signature.return_annotation
        faults += [
            f"{public.path}: {name}"
            for name, annotation in given.items()
            if annotation is inspect.Signature.empty and name not in ("self", "cls")
        ]
    assert faults == []


# ---- examples --------------------------------------------------------------------------------------------------------
def with_examples() -> list[str]:
    """Modules in whose docstrings there are examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [name for name in module_names() if any(t.examples for t in finder.find(importlib.import_module(name)))]


def test_there_are_examples() -> None:
    assert {"sparkdl.barrier.world", "sparkdl.barrier.device", "sparkdl.params"} <= set(with_examples())


@pytest.mark.parametrize("name", with_examples())
def test_the_examples_of_a_module_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert outcome.attempted > 0
    assert outcome.failed == 0
