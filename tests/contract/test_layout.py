"""The layer table of CONTRIBUTING.md, and what the wheel holds.

Nothing of sparkdl is imported here: the sources are read with ast.
"""

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "sparkdl": "sparkdl",
    "sparkdl.parallel": "sparkdl/parallel",
    "sparkdl.checkpoint": "sparkdl/checkpoint",
    "sparkdl.examples": "sparkdl/examples",
    "sparkdl.tracking": "sparkdl/tracking",
    "sparkdl.barrier": "barrier",
    "sparkdl.io": "io",
}

# Top row first. A name covers the module and all modules below it.
LAYERS = (
    ("examples",),
    (
        "cli", "estimator", "fitting", "recipes", "checks", "model", "params", "persistence", "tracking", "adapters",
        "standalone",
    ),
    ("daemon",),
    ("task", "source", "predict"),
    ("trainer", "evaluation", "epoch_sums"),
    (
        "parallel", "checkpoint", "objective", "optimization", "optimizer", "schedule", "learning_rate", "preparation",
        "trial", "metrics", "named_metrics", "callbacks", "best", "history", "serialization", "progress",
    ),
    ("barrier", "io"),
    ("errors", "config", "storage", "batch"),
)  # fmt: skip
# In one row, and yet strangers.
SIBLINGS = ("barrier", "io")

# What runs without Spark, so that a lone GPU machine can run it.
SPARK_FREE = (
    "examples",
    "standalone",
    "trainer",
    "evaluation",
    "epoch_sums",
    "parallel",
    "objective",
    "optimization",
    "optimizer",
    "schedule",
    "learning_rate",
    "preparation",
    "trial",
    "metrics",
    "named_metrics",
    "callbacks",
    "best",
    "history",
    "checkpoint",
    "serialization",
    "barrier.collectives",
    "barrier.world",
    "barrier.device",
    "barrier.directories",
    "barrier.findings",
    "barrier.process_group",
    "barrier.channel",
    "barrier.watchdog",
    "barrier.rules",
    "io.exchange",
    "io.in_memory",
    "io.plan",
    "io.reshuffle",
    "io.statistics",
    "errors",
    "config",
    "batch",
)


@dataclass(frozen=True)
class Import:
    """One imported name: where it is written, and whether loading the module runs it."""

    module: str
    target: str
    where: str
    on_load: bool


def modules_in(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of all modules in the packages that are there."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = path
    return found


def imports_of(module: str, path: Path, root: Path) -> list[Import]:
    """All imports of one file, also those inside functions and under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return [
        Import(module, target, f"{path.relative_to(root)}:{node.lineno}", on_load)
        for node, on_load in _import_nodes(tree, on_load=True)
        for target in _targets(node, package)
    ]


def _import_nodes(node: ast.AST, *, on_load: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, on_load
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _import_nodes(child, on_load=False)
        elif isinstance(child, ast.If):
            for_types = "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _import_nodes(child, on_load=on_load and not for_types)
        else:
            yield from _import_nodes(child, on_load=on_load)


def _targets(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parents = package.split(".")
        base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
    return [f"{base}.{alias.name}" for alias in node.names]


def layer_of(module: str) -> tuple[int, str] | None:
    """Row and name in LAYERS; None for the package sparkdl itself, which is above all rows."""
    part = module.removeprefix("sparkdl").lstrip(".").partition(".")[0]
    if not part:
        return None
    for row, names in enumerate(LAYERS):
        if part in names:
            return row, part
    raise LookupError(f"{module} has no layer: add it to LAYERS here and to CONTRIBUTING.md")


def resolve(target: str, modules: dict[str, Path]) -> str | None:
    """The module of sparkdl that an imported name comes from, if it comes from one."""
    while target.partition(".")[0] == "sparkdl":
        if target in modules:
            return target
        target = target.rpartition(".")[0]
    return None


def upward_imports(root: Path) -> list[str]:
    """One sentence for each import that points up, or from one sibling to the other."""
    modules = modules_in(root)
    faults = []
    for module, path in modules.items():
        here = layer_of(module)
        if here is None:
            continue
        for item in imports_of(module, path, root):
            if item.target == "sparkdl.__version__":
                continue
            target = resolve(item.target, modules)
            if target is None:
                continue
            there = layer_of(target)
            if there is None:
                faults.append(f"{item.where}: {module} imports {item.target} from the top")
            elif there[0] < here[0]:
                faults.append(f"{item.where}: {module} imports {target}, which is above it")
            elif here[1] != there[1] and here[1] in SIBLINGS and there[1] in SIBLINGS:
                faults.append(f"{item.where}: {module} imports its sibling {target}")
    return faults


def import_cycle(root: Path) -> list[str]:
    """The modules of one cycle among the imports that run on load; empty if there is none."""
    modules = modules_in(root)
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = {resolve(i.target, modules) for i in imports_of(module, path, root) if i.on_load}
        graph[module] = {target for target in targets if target and target != module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def bare_imports(root: Path) -> list[str]:
    """One sentence for each import of barrier/ or io/ by its folder's name."""
    ours = {path.stem for path in (root / "io").glob("*.py")} - {"__init__"}
    files = [p for d in ("sparkdl", "barrier", "io", "tests") for p in (root / d).rglob("*.py")]
    for optional in ("examples", "benchmarks", "scripts"):
        files += (root / optional).rglob("*.py")
    sources = [(path, path.read_text(encoding="utf-8")) for path in files]
    for path in (root / "notebooks").rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources += [(path, "".join(c["source"])) for c in cells if c["cell_type"] == "code"]

    faults = []
    for path, text in sources:
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a notebook cell with a magic command
            continue
        for node, _ in _import_nodes(tree, on_load=True):
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            for target in _targets(node, ""):
                first, _, rest = target.partition(".")
                if first == "barrier" or (first == "io" and rest.partition(".")[0] in ours):
                    where = f"{path.relative_to(root)}:{node.lineno}"
                    faults.append(f"{where}: import sparkdl.{target}, not {target}")
    return faults


def strangers(root: Path) -> list[str]:
    """One sentence for each import of Petastorm or Spark where neither is known."""
    faults = []
    for module, path in modules_in(root).items():
        name = module.removeprefix("sparkdl").lstrip(".")
        for item in imports_of(module, path, root):
            library = item.target.partition(".")[0]
            if library == "petastorm" and not name.startswith("io"):
                faults.append(f"{item.where}: only sparkdl.io knows Petastorm")
            if library == "pyspark" and any(name == free or name.startswith(f"{free}.") for free in SPARK_FREE):
                faults.append(f"{item.where}: {module} knows nothing of Spark")
    return faults


def rpc_uses(root: Path) -> list[str]:
    """One sentence for each place that names torch's RPC: it runs what anybody on the network sends it."""
    faults = []
    for module, path in modules_in(root).items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        names = [(node.lineno, ast.unparse(node)) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        names += [
            (node.lineno, target) for node, _ in _import_nodes(tree, on_load=True) for target in _targets(node, "")
        ]
        for line, name in names:
            if "distributed.rpc." in f"{name}." or name == "dist.rpc":
                faults.append(f"{path.relative_to(root)}:{line}: {module} uses torch's RPC")
    return faults


def test_no_module_uses_torch_rpc():
    assert rpc_uses(ROOT) == []


def test_imports_point_down_only():
    assert upward_imports(ROOT) == []


def test_no_import_cycle():
    assert import_cycle(ROOT) == []


def test_root_folders_are_imported_by_their_package_names():
    assert bare_imports(ROOT) == []


def test_petastorm_and_spark_are_known_only_where_they_belong():
    assert strangers(ROOT) == []


@pytest.fixture
def tree(tmp_path):
    """A small tree of the same shape; write(path, text) adds a file to it."""

    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    for name in ("sparkdl/__init__", "barrier/__init__", "io/__init__", "io/plan", "barrier/world"):
        write(f"{name}.py", "")
    for name in ("errors", "trainer", "task"):
        write(f"sparkdl/{name}.py", "")
    return tmp_path, write


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("sparkdl/errors.py", "import sparkdl.trainer", "above it"),
        ("sparkdl/errors.py", "from sparkdl import trainer", "above it"),
        ("sparkdl/trainer.py", "from sparkdl.task import run_task", "above it"),
        ("sparkdl/trainer.py", "from .task import run_task", "above it"),
        ("sparkdl/trainer.py", "def f():\n    import sparkdl.task", "above it"),
        ("sparkdl/trainer.py", "from sparkdl import TorchModel", "from the top"),
        ("barrier/world.py", "from sparkdl.io.plan import ShardPlan", "sibling"),
        ("io/plan.py", "from sparkdl.barrier import World", "sibling"),
        ("io/plan.py", "from ..barrier import World", "sibling"),
    ],
)
def test_an_import_that_points_up_is_found(tree, path, text, fault):
    root, write = tree
    write(path, text)
    assert [fault in sentence for sentence in upward_imports(root)] == [True]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("sparkdl/__init__.py", "from sparkdl.task import run_task"),
        ("sparkdl/task.py", "from sparkdl import __version__, errors"),
        ("sparkdl/trainer.py", "import io, torch\nfrom sparkdl.io.plan import ShardPlan"),
        ("io/plan.py", "from . import schema\nfrom .. import errors"),
        ("barrier/world.py", "from sparkdl.barrier import device"),
    ],
)
def test_an_import_that_points_down_passes(tree, path, text):
    root, write = tree
    write(path, text)
    assert upward_imports(root) == []


def test_a_module_without_a_layer_is_named(tree):
    root, write = tree
    write("sparkdl/utils.py", "")
    with pytest.raises(LookupError, match=r"sparkdl\.utils has no layer"):
        upward_imports(root)


def test_a_cycle_is_found_but_not_one_of_deferred_imports(tree):
    root, write = tree
    write("sparkdl/task.py", "import sparkdl.trainer")
    write("sparkdl/trainer.py", "def f():\n    import sparkdl.task")
    assert import_cycle(root) == []
    write("sparkdl/trainer.py", "import sparkdl.task")
    assert set(import_cycle(root)) == {"sparkdl.task", "sparkdl.trainer"}


@pytest.mark.parametrize(
    "text",
    ["import barrier", "from barrier.world import World", "import io.plan", "from io import plan"],
)
def test_a_bare_import_is_found(tree, text):
    root, write = tree
    write("tests/unit/test_x.py", text)
    assert len(bare_imports(root)) == 1


def test_the_standard_librarys_io_passes(tree):
    root, write = tree
    write("io/plan.py", "import io\nfrom io import BytesIO\nfrom sparkdl.io import plan")
    assert bare_imports(root) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("sparkdl/trainer.py", "from pyspark import BarrierTaskContext"),
        ("barrier/world.py", "import pyspark.sql"),
        ("sparkdl/task.py", "from petastorm.reader import Reader"),
    ],
)
def test_a_stranger_is_found(tree, path, text):
    root, write = tree
    write(path, text)
    assert len(strangers(root)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed.rpc",
        "from torch.distributed import rpc",
        "from torch.distributed.rpc import rpc_sync",
        "def f():\n    import torch.distributed.rpc as r",
        "import torch\ntorch.distributed.rpc.init_rpc('x')",
        "import torch.distributed as dist\ndist.rpc.init_rpc('x')",
    ],
)
def test_a_use_of_rpc_is_found(tree, text):
    root, write = tree
    write("sparkdl/trainer.py", text)
    assert rpc_uses(root)


@pytest.mark.slow
def test_the_wheel_holds_the_four_packages_and_nothing_else(tmp_path):
    # A build leaves folders beside the sources, so it works on a copy.
    copy = tmp_path / "copy"
    for folder in ("sparkdl", "barrier", "io"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(copy)],
        check=True,
    )
    (wheel,) = wheels.glob("*.whl")

    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).glob("*.py")
    } | {"sparkdl/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected

    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True)
    # -I: neither the working folder nor PYTHONPATH may lend the sources. The target goes before
    # the environment's own editable install.
    program = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(target)!r})\n"
        f"for name in {list(PACKAGES)!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(target)!r}), module.__file__\n"
    )
    subprocess.run([sys.executable, "-I", "-c", program], check=True, cwd=tmp_path)
