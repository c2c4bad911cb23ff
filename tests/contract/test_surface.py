"""The public names: what is listed is there, what is there is listed, and looking at it costs nothing."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sparkdl
import sparkdl.barrier

ROOT = Path(__file__).parents[2]
PUBLIC = {
    "Callback",
    "RunView",
    "SparkdlError",
    "TorchClassificationModel",
    "TorchClassifier",
    "TorchEstimator",
    "TorchModel",
    "TorchRegressionModel",
    "TorchRegressor",
    "TrainingFailedError",
    "allow_modules",
    "launch",
}
OPERATORS = {"Pending", "all_gather", "all_reduce", "broadcast", "reduce_scatter"}


def module_names() -> Iterator[str]:
    """All modules of all packages of sparkdl."""
    for package in ("sparkdl", "sparkdl.parallel", "sparkdl.checkpoint", "sparkdl.barrier", "sparkdl.io"):
        yield package
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if not found.ispkg:
                yield f"{package}.{found.name}"


MODULES = sorted(set(module_names()))


def in_fresh_python(program: str) -> str:
    """What a program prints in an interpreter that knows nothing yet."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_exactly_these() -> None:
    assert set(sparkdl.__all__) == PUBLIC
    assert list(sparkdl.__all__) == sorted(sparkdl.__all__)


def test_what_is_visible_is_what_is_listed() -> None:
    assert set(dir(sparkdl)) == {*sparkdl.__all__, "__version__"}
    program = "import sparkdl; print(sorted(name for name in dir(sparkdl) if not name.startswith('_')))"
    assert ast.literal_eval(in_fresh_python(program)) == sorted(PUBLIC)


def test_the_barrier_package_offers_the_collective_operators() -> None:
    assert set(sparkdl.barrier.__all__) == OPERATORS == set(dir(sparkdl.barrier))
    for name in OPERATORS:
        assert getattr(sparkdl.barrier, name).__module__ == "sparkdl.barrier.collectives"
    with pytest.raises(AttributeError, match=r"module 'sparkdl.barrier' has no attribute 'allreduce'"):
        _ = sparkdl.barrier.allreduce


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_loads_and_bears_its_name(name: str) -> None:
    thing = getattr(sparkdl, name)
    assert thing.__name__ == name
    assert thing.__module__.startswith("sparkdl.")
    assert getattr(sparkdl, name) is thing


def test_the_names_for_type_checkers_are_the_same() -> None:
    """A type checker reads the imports under TYPE_CHECKING, Python the table of homes."""
    tree = ast.parse(Path(sparkdl.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {name: getattr(sparkdl, name).__module__ for name in sparkdl.__all__}


def test_a_star_import_brings_all_of_it() -> None:
    program = "from sparkdl import *; import sparkdl; print([n for n in sparkdl.__all__ if n not in globals()])"
    assert in_fresh_python(program) == "[]"


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'sparkdl' has no attribute 'TorchClasifier'"):
        _ = sparkdl.TorchClasifier
    with pytest.raises(ImportError, match="cannot import name 'TorchClasifier' from 'sparkdl'"):
        exec("from sparkdl import TorchClasifier")


def test_importing_sparkdl_loads_neither_torch_nor_spark() -> None:
    heavy = ("torch", "pyspark", "pyarrow", "numpy", "pandas", "petastorm")
    program = f"import sys, sparkdl; dir(sparkdl); print([name for name in {heavy!r} if name in sys.modules])"
    assert in_fresh_python(program) == "[]"


@pytest.mark.parametrize("module", ["sparkdl.errors", "sparkdl.config", "sparkdl.barrier", "sparkdl.barrier.world"])
def test_what_knows_nothing_of_torch_and_spark_loads_without_them(module: str) -> None:
    program = f"import sys, {module}; print([name for name in ('torch', 'pyspark') if name in sys.modules])"
    assert in_fresh_python(program) == "[]"


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert sparkdl.__version__ == version("sparkdl-torch")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_lists_names_that_are_there(name: str) -> None:
    module = importlib.import_module(name)
    listed: list[str] = getattr(module, "__all__", [])
    assert len(listed) == len(set(listed))
    assert [entry for entry in listed if not hasattr(module, entry)] == []


def own_names(module: ModuleType) -> set[str]:
    """Names of classes and functions that a module defines for others."""

    def is_own(name: str, thing: Any) -> bool:
        defined = inspect.isclass(thing) or inspect.isfunction(thing)
        return defined and not name.startswith("_") and thing.__module__ == module.__name__

    return {name for name, thing in vars(module).items() if is_own(name, thing)}


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """Names that modules of sparkdl import from each other, by the module that they come from."""
    found: dict[str, set[str]] = {name: set() for name in MODULES}
    for name in MODULES:
        path = inspect.getsourcefile(importlib.import_module(name))
        assert path is not None
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in found:
                found[node.module] |= {alias.name for alias in node.names}
    return found


def test_no_module_takes_a_private_name_of_another(imported: dict[str, set[str]]) -> None:
    private = {name: {entry for entry in names if entry.startswith("_")} for name, names in imported.items()}
    assert {name: names for name, names in private.items() if names - {"__version__"}} == {}


def test_classes_and_functions_that_other_modules_use_are_listed(imported: dict[str, set[str]]) -> None:
    unlisted = {}
    for name in MODULES:
        module = importlib.import_module(name)
        unlisted[name] = imported[name] & own_names(module) - set(getattr(module, "__all__", []))
    assert {name: names for name, names in unlisted.items() if names} == {}


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "sparkdl" / "py.typed").exists()
