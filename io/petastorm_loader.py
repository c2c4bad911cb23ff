"""Import petastorm 0.12.1 as it is, next to the pyarrow, numpy and Python of today.

Petastorm asks for names that pyarrow 15, numpy 2 and Python 3.12 removed. `install` puts a finder
on `sys.meta_path` for petastorm's modules alone: their source runs unchanged, but their import
statements go through an `__import__` of their own, which answers with the stand-ins of
`legacy_pyarrow`. No real module is changed, and nobody but petastorm sees the stand-ins. A few of
petastorm's functions are wrong, or cannot work so; `CORRECTIONS` replaces them.

Importing `sparkdl.io` calls `install`. Every process needs that before it imports petastorm, or
unpickles anything of it: petastorm's own worker processes do so by themselves, functions that Spark
runs in its workers have to import `sparkdl.io` first.
"""

import builtins
import collections
import functools
import importlib.abc
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

from sparkdl.io.legacy_pyarrow import ADAPTERS, NUMPY_ALIASES

__all__ = ["install"]

SUPPORTED_VERSION = "0.12.1"

_logger = logging.getLogger(__name__)
_lock = threading.Lock()


def install() -> None:
    """Let petastorm be imported from now on; calling it again changes nothing.

    What an earlier import of petastorm left behind when it failed is dropped, so that the next
    import starts afresh. A petastorm that was imported in some other way and works stays as it is.
    """
    with _lock:
        if any(isinstance(finder, _Finder) for finder in sys.meta_path):
            return
        if hasattr(sys.modules.get("petastorm"), "make_batch_reader"):
            _logger.warning(
                "petastorm was imported before sparkdl.io and works, so it stays as it is; its "
                "readers may drop the last rows. Import sparkdl.io first to have that corrected."
            )
            return
        for name in [name for name in sys.modules if _is_petastorm(name)]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())


def _is_petastorm(name: str) -> bool:
    return name.partition(".")[0] == "petastorm"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds petastorm's modules where Python finds them, and loads them through `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _is_petastorm(fullname):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader (of a folder or a zip file), with other imports and the corrections."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = _BUILTINS
        self._loader.exec_module(module)
        CORRECTIONS.get(module.__name__, lambda corrected: None)(module)


def _import(
    name: str,
    namespace: Mapping[str, object] | None = None,
    local_names: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    """What `import` means inside petastorm: a stand-in where there is one."""
    if level == 0 and name in ADAPTERS:
        return ADAPTERS[name if fromlist else name.partition(".")[0]]
    module = builtins.__import__(name, namespace, local_names, fromlist or (), level)
    return module if fromlist or level else ADAPTERS.get(module.__name__, module)


_BUILTINS = vars(builtins) | {"__import__": _import}


def _require_supported_version(petastorm: Any) -> None:
    if petastorm.__version__ != SUPPORTED_VERSION:
        raise ImportError(
            f"sparkdl.io reads Parquet with petastorm {SUPPORTED_VERSION}, but petastorm "
            f"{petastorm.__version__} is installed. Run: pip install petastorm=={SUPPORTED_VERSION}"
        )


def _count_again_before_ending(pool_class: Any, end: type[Exception]) -> None:
    premature = pool_class.get_results

    @functools.wraps(premature)
    def get_results(pool: Any) -> Any:
        while True:
            try:
                return premature(pool)
            except end:
                # By now the ventilator has said that it is done: this count cannot change any more.
                if pool._ventilated_items == pool._ventilated_items_processed:
                    raise

    pool_class.get_results = get_results


def _install_in_children(exec_in_new_process: Any) -> None:
    def popen(args: list[str], executable: str) -> subprocess.Popen[bytes]:
        *_, entry_point, pickled_call = args
        code = (
            f"import runpy, sys; sys.path[:] = {sys.path!r}; "
            f"from {__name__} import install; install(); "
            f"runpy.run_module({entry_point!r}, run_name='__main__', alter_sys=True)"
        )
        return subprocess.Popen([executable, "-c", code, pickled_call])

    exec_in_new_process.subprocess = SimpleNamespace(Popen=popen)


def _find_old_names(unpickler_class: Any) -> None:
    present = unpickler_class.find_class

    @functools.wraps(present)
    def find_class(unpickler: Any, module: str, name: str) -> Any:
        if (module, name) == ("pyspark.serializers", "_restore"):
            return _restore_namedtuple
        if module == "numpy" and name in NUMPY_ALIASES:
            return NUMPY_ALIASES[name]
        return present(unpickler, module, name)

    unpickler_class.find_class = find_class


def _restore_namedtuple(name: str, fields: Sequence[str], values: Sequence[Any]) -> Any:
    return collections.namedtuple(name, fields)(*values)


CORRECTIONS: dict[str, Callable[[Any], None]] = {
    # Other versions need other stand-ins; 0.13 also shuffles only once and drops row groups.
    "petastorm": _require_supported_version,
    # get_results compares its counts first and asks the ventilator afterwards. Row groups queued
    # in between were dropped without a word.
    "petastorm.workers_pool.thread_pool": lambda module: _count_again_before_ending(
        module.ThreadPool, module.EmptyResultError
    ),
    "petastorm.workers_pool.process_pool": lambda module: _count_again_before_ending(
        module.ProcessPool, module.EmptyResultError
    ),
    # Worker processes start with petastorm's own entry point, where nobody has called install.
    "petastorm.workers_pool.exec_in_new_process": _install_in_children,
    # Schemas pickled under Python 2 or before pyspark 3.4 refer to names that are gone.
    "petastorm.etl.legacy": lambda module: _find_old_names(module.RestrictedUnpickler),
}
