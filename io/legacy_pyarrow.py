"""What petastorm 0.12.1 expects of pyarrow, numpy and distutils, made of what they offer now.

Only petastorm sees these stand-ins: `petastorm_loader` hands out `ADAPTERS` in place of the
modules of the same name. File systems are fsspec's, files are read by pyarrow's `ParquetFile`;
what remains here is the old vocabulary: data sets made of pieces, and partitions by hive folder.
"""

import contextlib
import functools
import operator
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.arrow import HadoopFileSystem as ConnectedHadoopFileSystem
from fsspec.implementations.local import LocalFileSystem

__all__ = ["ADAPTERS", "NUMPY_ALIASES"]

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, wanted: value in wanted,
    "not in": lambda value, wanted: value not in wanted,
}

_HADOOP_METHODS = (  # noqa: SIM905
    "cat chmod chown delete df disk_usage download exists find get_capacity get_space_used info "
    "isdir isfile ls mkdir mv open rename rm stat upload walk"
).split()


@dataclass
class PartitionSet:
    """One partition key and the values its folders have, in path order."""

    name: str
    keys: list[str]

    @functools.cached_property
    def dictionary(self) -> pa.Array:
        """The values as int64 if all of them are integers, else as strings."""
        try:
            return pa.array([int(key) for key in self.keys], pa.int64())
        except (ValueError, OverflowError):
            return pa.array(self.keys, pa.string())


class Partitions(list[PartitionSet]):
    """The partition keys of a data set, outermost folder first."""

    @property
    def partition_names(self) -> set[str]:
        """The names of the partition columns."""
        return {partition.name for partition in self}


@dataclass
class ParquetDatasetPiece:
    """One Parquet file, or one row group of it; rows carry the file's partition values."""

    path: str
    open_file_func: Callable[..., Any] = field(compare=False, repr=False)
    row_group: int | None = None
    partition_keys: Sequence[tuple[str, int]] = ()

    def get_metadata(self) -> pq.FileMetaData:
        """Read the file's footer."""
        with self._opened() as file:
            return file.metadata

    def read(self, columns: Sequence[str] | None = None, partitions: Partitions | None = None) -> pa.Table:
        """Read the piece and append its partition columns."""
        wanted = None if columns is None else list(columns)
        with self._opened() as file:
            if self.row_group is None:
                table = file.read(columns=wanted)
            else:
                table = file.read_row_group(self.row_group, columns=wanted)
        dictionaries = {partition.name: partition.dictionary for partition in partitions or ()}
        for name, index in self.partition_keys:
            table = table.append_column(name, pa.repeat(dictionaries[name][index], table.num_rows))
        return table

    @contextlib.contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        # Arrow reads a local path by itself, without the GIL; the rest goes through fsspec.
        if isinstance(getattr(self.open_file_func, "__self__", None), LocalFileSystem):
            with pq.ParquetFile(self.path) as file:
                yield file
        else:
            with self.open_file_func(self.path) as source, pq.ParquetFile(source) as file:
                yield file


class ParquetDataset:
    """A Parquet file, a list of them, or a folder with hive partitions below it.

    Args:
        path_or_paths: Paths on `filesystem`; a list may name files only.
        filesystem: An fsspec or pyarrow file system; the local one if None.
        filters: Tuples (column, comparison, value), all of which must hold, or a list of such
            lists, one of which must hold. They drop pieces by partition value; filters on other
            columns have no effect, as in pyarrow up to version 14.
        options: The old class's other options, which change nothing here.
    """

    def __init__(
        self,
        path_or_paths: str | list[str],
        filesystem: Any = None,
        filters: list[Any] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(filesystem, pyarrow.fs.FileSystem):
            filesystem = ArrowFSWrapper(filesystem)
        self.fs = filesystem or LocalFileSystem()
        self.paths = path_or_paths
        self.pieces: list[ParquetDatasetPiece] = []
        self.partitions: Partitions | None = None
        self.metadata_path: str | None = None
        self.common_metadata_path: str | None = None
        paths = [path_or_paths] if isinstance(path_or_paths, str) else path_or_paths
        if len(paths) == 1 and self.fs.isdir(paths[0]):
            self._discover(paths[0].rstrip("/"))
        else:
            for path in paths:
                if not self.fs.isfile(path):
                    raise FileNotFoundError(
                        f"Expected a Parquet file, or one folder of them, at {path!r}, "
                        "but there is no such file. Check the data set URL."
                    )
                self.pieces.append(ParquetDatasetPiece(path, self.fs.open))
        if filters:
            self._drop_pieces(filters)

    @functools.cached_property
    def metadata(self) -> pq.FileMetaData | None:
        """The content of `_metadata`, if there is one."""
        return self._footer(self.metadata_path)

    @functools.cached_property
    def common_metadata(self) -> pq.FileMetaData | None:
        """The content of `_common_metadata`, if there is one."""
        return self._footer(self.common_metadata_path)

    def _footer(self, path: str | None) -> pq.FileMetaData | None:
        if path is None:
            return None
        with self.fs.open(path) as source:
            return pq.read_metadata(source)

    def _discover(self, root: str) -> None:
        values: dict[str, list[str]] = {}
        key_names: set[tuple[str, ...]] = set()
        for found in sorted(self.fs.find(root)):
            # Object stores answer without the leading slash that the root may have.
            relative = posixpath.relpath("/" + found.lstrip("/"), "/" + root.lstrip("/"))
            path = f"{root}/{relative}"
            *folders, name = relative.split("/")
            if relative == "_metadata":
                self.metadata_path = path
            elif relative == "_common_metadata":
                self.common_metadata_path = path
            hidden = any(folder[0] in "_." and "=" not in folder for folder in folders)
            if hidden or name[0] in "_." or name.endswith(".crc"):
                continue
            keys = []
            for folder in folders:
                if "=" in folder:
                    key, value = map(unquote, folder.split("=", 1))
                    known = values.setdefault(key, [])
                    if value not in known:
                        known.append(value)
                    keys.append((key, known.index(value)))
            key_names.add(tuple(key for key, _ in keys))
            self.pieces.append(ParquetDatasetPiece(path, self.fs.open, partition_keys=keys))
        if len(key_names) > 1:
            raise ValueError(
                f"All files below {root!r} must have the same partition folders, but some have "
                f"{' and others '.join(map(str, sorted(key_names)))}. Name a folder in which "
                "they agree."
            )
        self.partitions = Partitions(PartitionSet(*item) for item in values.items())

    def _drop_pieces(self, filters: list[Any]) -> None:
        alternatives = [filters] if isinstance(filters[0][0], str) else filters
        keys = {partition.name: partition.keys for partition in self.partitions or ()}
        self.pieces = [
            piece
            for piece in self.pieces
            if any(
                all(
                    _holds(keys[name][index], comparison, wanted)
                    for column, comparison, wanted in conjunction
                    for name, index in piece.partition_keys
                    if name == column
                )
                for conjunction in alternatives
            )
        ]


def _holds(text: str, comparison: str, wanted: Any) -> bool:
    """Compare a folder's value, which is text, as the type of the value it is compared with."""
    example = next(iter(wanted), text) if comparison.endswith("in") else wanted
    return _COMPARISONS[comparison](type(example)(text), wanted)


def _forward(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._hdfs, name)(*args, **kwargs)

    method.__name__ = name
    return method


# Petastorm derives its fail-over client from this class and wraps every public method it finds.
HadoopFileSystem = type(
    "HadoopFileSystem",
    (),
    {
        "__doc__": "Base of petastorm's fail-over client: every method is that of the file system it is connected to.",
        **{name: _forward(name) for name in _HADOOP_METHODS},
    },
)


def numeric_version(text: str) -> tuple[int, ...]:
    """The numbers of a version, in order: vendors' suffixes do not parse as versions."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


NUMPY_ALIASES: dict[str, Any] = {
    "unicode_": np.str_,
    "string_": np.bytes_,
    "in1d": np.isin,
    "float": float,
}

ADAPTERS: dict[str, "Adapter"] = {}


class Adapter(ModuleType):
    """A module as petastorm expects it: other names first, then those of the real module."""

    def __init__(self, name: str, real: ModuleType | None = None, **names: Any) -> None:
        super().__init__(name)
        public = vars(real) if real is not None else {}
        vars(self).update({key: public[key] for key in public if not key.startswith("__")})
        vars(self).update(names, _real=real)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(ADAPTERS[parent], child, self)
        ADAPTERS[name] = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return adapter, (self.__name__,)


def adapter(name: str) -> Adapter:
    """The stand-in of that name, also for one that was pickled in another process."""
    return ADAPTERS[name]


Adapter("numpy", np, **NUMPY_ALIASES)
Adapter("distutils")
Adapter("distutils.version", LooseVersion=numeric_version)
Adapter("pyarrow", pa, LocalFileSystem=LocalFileSystem, localfs=LocalFileSystem())
Adapter("pyarrow.filesystem", LocalFileSystem=LocalFileSystem)
Adapter("pyarrow.hdfs", HadoopFileSystem=HadoopFileSystem, connect=ConnectedHadoopFileSystem)
Adapter(
    "pyarrow.parquet",
    pq,
    ParquetDataset=ParquetDataset,
    ParquetDatasetPiece=ParquetDatasetPiece,
    PartitionSet=PartitionSet,
)
