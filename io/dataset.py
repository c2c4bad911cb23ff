"""Parquet read in place: which files there are, and what their columns are.

Nothing is copied. A `ParquetDataset` says what to read; `discover` lists its files and reads one footer. It does so in
a Spark job, because the executors see the storage and the driver may not; `discover_locally` does the same without
Spark. This hides what lies in the storage: which files there are data, which are another program's, and how to open
one. Rows are counted by `sparkdl.io.inspection` before the fit, and made by `sparkdl.io.in_place` during it.
"""

import base64
import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSelector, FileType

from sparkdl.errors import ConfigError, DataError
from sparkdl.io.draw import Draw
from sparkdl.io.filters import filter_columns
from sparkdl.io.folders import folder_texts, folder_value, infer_types
from sparkdl.io.spark_jobs import run_job
from sparkdl.io.spark_types import assembled_types, declared_types, spark_type
from sparkdl.io.unischema import UNISCHEMA_KEY, coded_fields, field_type, load_unischema
from sparkdl.storage import FileSystems, default_file_system, qualify, reason

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.types import DataType, StructType

__all__ = [
    "DiscoveredDataset",
    "FileEntry",
    "ParquetDataset",
    "dataset_schema",
    "discover",
    "discover_locally",
    "list_files",
    "open_listed",
]

_TABLE_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi"}


@dataclass(frozen=True, eq=False)
class ParquetDataset:
    """Parquet files that are trained on where they lie.

    Attributes:
        url: Directory or file, or several of them, as Spark users write it. Folders named ``key=value`` below a
            directory become columns, typed as Spark types them; files and folders whose names begin with ``_`` or ``.``
            are left out.
        filters: Rows to train on: an expression such as ``pyarrow.compute.field("day") > 3``, or the lists of tuples
            that `pyarrow.parquet.filters_to_expression` takes. Folders and row groups that cannot hold such rows are
            never read.
        assemble: Number columns to be put together into one vector column, as VectorAssembler would: the new column's
            name, and the columns that hold its values, in order.
        unischema: The Petastorm Unischema by which the files were written, to have its images and arrays decoded; or
            ``"stored"`` for the one in the data set's own metadata. That one is a pickle. Petastorm's restricted
            unpickler opens it, which lets pass everything of ``builtins``, numpy and pyspark: a data set of somebody
            who means harm can run code. Hence never unless asked for.
        storage_options: Credentials and addresses of the store; see `sparkdl.storage.open_file_system`. They travel to
            the executors, and are never printed, logged or saved.

    Raises:
        ConfigError: No URL, or filters of another form.
    """

    url: str | Sequence[str]
    filters: Any = None
    assemble: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unischema: Any = None
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        given: Any = self.url
        urls = [given] if isinstance(given, str) or not isinstance(given, Sequence) else given
        if not urls or not all(isinstance(url, str) and url for url in urls):
            raise ConfigError(f"url={self.url!r} names no files. Give a path or URL, or a list of them.")
        if self.filters is None or isinstance(self.filters, pc.Expression):
            return
        try:
            object.__setattr__(self, "filters", pq.filters_to_expression(self.filters))
        except (ValueError, TypeError, IndexError, pa.ArrowException) as error:
            raise ConfigError(
                f"filters={self.filters!r} is not a filter: {reason(error)}. Use an expression, as in "
                "pyarrow.compute.field('day') > 3, or tuples, as in [('day', '>', 3)]."
            ) from error

    @property
    def urls(self) -> tuple[str, ...]:
        """All URLs."""
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    def __str__(self) -> str:
        return ", ".join(self.urls)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One Parquet file.

    Attributes:
        path: Its URL.
        size: Bytes.
        mtime_ns: When it was changed last, in nanoseconds since 1970; None where the store does not say.
        partitions: Values of the ``key=value`` folders above it.
    """

    path: str
    size: int
    mtime_ns: int | None
    partitions: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class DiscoveredDataset:
    """A data set whose files and columns are known; stands for a DataFrame where columns are resolved.

    Attributes:
        dataset: What was asked for, with complete URLs.
        files: Its files, sorted by path.
        schema: Its columns in Spark's types: those of the files, of the folders, and the assembled ones.
        arrow_schema: Types of the files' columns in the first file, and of the folders'.
        partition_types: Types of the folders' columns.
        coded: Fields that a Petastorm codec decodes, by column.
        time_zone: Of timestamps in folder names.
        draw: Which rows are drawn for validation; None: none are.
    """

    dataset: ParquetDataset
    files: tuple[FileEntry, ...]
    schema: "StructType"
    arrow_schema: pa.Schema
    partition_types: Mapping[str, pa.DataType]
    coded: Mapping[str, Any] = field(default_factory=dict)
    time_zone: str = "UTC"
    draw: Draw | None = None

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [column.name for column in self.schema.fields]

    @property
    def filters(self) -> pc.Expression | None:
        """Which rows are trained on; None: all."""
        return self.dataset.filters

    @property
    def assemble(self) -> dict[str, tuple[str, ...]]:
        """Parts of the assembled columns."""
        return {name: tuple(parts) for name, parts in self.dataset.assemble.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one row of the columns that a Petastorm codec decodes, where the Unischema states them."""
        return {name: coded.shape for name, coded in self.coded.items() if None not in coded.shape}

    @property
    def file_names(self) -> dict[str, str]:
        """By path, the names of the files from the folder on that holds all that was asked for.

        They are the same wherever the data set lies, and stay so when files are added.
        """
        paths = {entry.path for entry in self.files}
        roots = [url.rpartition("/")[0] if url in paths else url.rstrip("/") for url in self.dataset.urls]
        above = roots[0].split("/")
        for root in roots[1:]:
            both = zip(above, root.split("/"), strict=False)
            above = [mine for mine, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
        return {path: "/".join(path.split("/")[len(above) :]) for path in paths}


def list_files(dataset: ParquetDataset) -> tuple[FileEntry, ...]:
    """The Parquet files of a data set, sorted by path; opens none of them.

    Raises:
        ConfigError: A URL that does not exist or cannot be reached, or a table whose files cannot be read without its
            log (Delta, Iceberg, Hudi).
        DataError: No file, an empty one, or files that lie in folders of different keys.
    """
    files, _ = _list(dataset, FileSystems(dataset.storage_options))
    return _typed(files, infer_types([entry.partitions for entry in files]), "UTC")


def dataset_schema(dataset: ParquetDataset) -> "StructType":
    """The columns of a data set in Spark's types, from the footer of its first file.

    Files that Spark wrote say so themselves, Vectors included; the types of others follow from Arrow's.

    Raises:
        SparkdlError: As `list_files`, or the footer cannot be read, or ``filters``, ``assemble`` or ``unischema`` do
            not fit it.
    """
    return discover_locally(dataset).schema


def discover_locally(dataset: ParquetDataset) -> DiscoveredDataset:
    """List a data set and read its first footer in this process.

    Raises:
        SparkdlError: As `dataset_schema`.
    """
    return _discovered(dataset, _look(dataset), "UTC")


def discover(spark: "SparkSession", dataset: ParquetDataset) -> DiscoveredDataset:
    """List a data set and read its first footer on an executor, in one Spark job.

    Args:
        spark: Completes URLs without a scheme, and knows the time zone of timestamps in folder names.
        dataset: What to read.

    Raises:
        SparkdlError: As `dataset_schema`.
    """
    default = default_file_system(spark)
    complete = replace(dataset, url=tuple(qualify(url, default) for url in dataset.urls))
    (found,) = run_job(spark, 1, functools.partial(_look_job, complete))
    return _discovered(complete, _Listing.of_json(found), str(spark.conf.get("spark.sql.session.timeZone")))


@dataclass(frozen=True, slots=True)
class _Listing:
    """What the storage says: files, with the texts of their folders; the first footer; the metadata of all."""

    files: tuple[FileEntry, ...]
    footer: pa.Schema
    common: pa.Schema

    def to_json(self) -> dict[str, Any]:
        return {
            "files": [[one.path, one.size, one.mtime_ns, dict(one.partitions)] for one in self.files],
            "schemas": [base64.b64encode(one.serialize()).decode() for one in (self.footer, self.common)],
        }

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "_Listing":
        footer, common = (pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text))) for text in values["schemas"])
        return cls(tuple(FileEntry(*entry) for entry in values["files"]), footer, common)


def _look(dataset: ParquetDataset) -> _Listing:
    systems = FileSystems(dataset.storage_options)
    files, common = _list(dataset, systems)
    with open_listed(systems, files[0], dataset.storage_options) as source:
        footer = pq.read_schema(source)
    if common is None:
        return _Listing(files, footer, pa.schema([]))
    with open_listed(systems, common, dataset.storage_options) as source:
        return _Listing(files, footer, pq.read_schema(source))


def _list(dataset: ParquetDataset, systems: FileSystems) -> tuple[tuple[FileEntry, ...], FileEntry | None]:
    """The files below all URLs, with the texts of their folders; and ``_common_metadata``, if there is one."""
    files: dict[str, FileEntry] = {}
    common: FileEntry | None = None
    for url in dataset.urls:
        for relative, info in _below(url, systems, dataset.storage_options):
            *folders, name = relative.split("/")
            path = f"{url.rstrip('/')}/{relative}" if relative else url
            entry = FileEntry(path, info.size or 0, info.mtime_ns, folder_texts(folders))
            if relative == "_common_metadata":
                common = entry
            elif not any(map(_is_hidden, (*folders, name))):
                files[path] = entry
    if not files:
        raise DataError(
            f"{dataset} holds no Parquet file. Check the path; files and folders whose names begin with _ or . do not "
            "count."
        )
    ordered = tuple(files[path] for path in sorted(files))
    for entry in ordered:
        if not entry.size:
            raise DataError(f"{entry.path} is empty: it has 0 bytes. Remove it, or write it again.")
        if entry.partitions.keys() != ordered[0].partitions.keys():
            raise DataError(
                f"{entry.path} lies in folders of the keys {list(entry.partitions)}, but {ordered[0].path} in those of "
                f"{list(ordered[0].partitions)}. Name a directory below which all files have the same keys."
            )
    return ordered, common


def _below(url: str, systems: FileSystems, options: Mapping[str, Any] | None) -> list[tuple[str, FileInfo]]:
    """All files below a URL with their paths from there; the file itself, with an empty path, if it is one."""
    file_system, root = systems.open(url)
    try:
        found = file_system.get_file_info(root)
        if found.type == FileType.NotFound:
            raise ConfigError(f"{url} does not exist. Check the path; patterns such as * are not expanded.")
        if found.type == FileType.File:
            return [("", found)]
        start = len(root.strip("/"))
        below = [
            (info.path.strip("/")[start:].lstrip("/"), info)  # some stores leave out the leading slash
            for info in file_system.get_file_info(FileSelector(root, recursive=True))
        ]
        parents = [root.rstrip("/")]
        while "=" in parents[-1].rpartition("/")[2]:
            parents.append(parents[-1].rpartition("/")[0])
        logs = [f"{parent}/{name}" for parent in parents[1:] for name in _TABLE_FORMATS]
        above = [one.path for one in file_system.get_file_info(logs) if one.type == FileType.Directory]
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{url} cannot be listed: {reason(error, options)}. Check the address and the storage_options, and that "
            "all executors reach the store."
        ) from None
    _refuse_table_formats(url, [*above, *(relative for relative, _ in below)])
    return [(relative, info) for relative, info in below if info.type == FileType.File]


def _refuse_table_formats(url: str, paths: Iterable[str]) -> None:
    for path in paths:
        folder, _, name = path.rpartition("/")
        kind = _TABLE_FORMATS.get(name)
        if folder.rpartition("/")[2] == "metadata" and name.endswith(".metadata.json"):
            kind = "Iceberg"
        if kind is not None:
            raise ConfigError(
                f"{url} belongs to a {kind} table, whose log says which of its files and rows are valid. Read it "
                f'through Spark: fit(spark.read.format("{kind.lower()}").load({url!r})).'
            )


def _is_hidden(name: str) -> bool:
    # A folder of a column whose name begins with _ is none; Hadoop's S3 clients once left files for folders.
    return name.startswith(".") or (name.startswith("_") and "=" not in name) or name.endswith("_$folder$")


def _typed(files: Sequence[FileEntry], kinds: Mapping[str, "DataType"], time_zone: str) -> tuple[FileEntry, ...]:
    """The files with values in place of the texts of their folders.

    Raises:
        DataError: A text that is not of the type that the data set's metadata states.
    """
    typed = []
    for entry in files:
        values = {}
        for name, text in entry.partitions.items():
            try:
                values[name] = folder_value(text, kinds[name], time_zone)
            except (ValueError, ArithmeticError):
                raise DataError(
                    f"{entry.path} lies in a folder {name}={text}, but the data set's metadata says that {name!r} is "
                    f"{kinds[name].simpleString()}. Correct the folder or the metadata."
                ) from None
        typed.append(replace(entry, partitions=values))
    return tuple(typed)


def _discovered(dataset: ParquetDataset, listing: _Listing, time_zone: str) -> DiscoveredDataset:
    from pyspark.sql import types as T
    from pyspark.sql.pandas.types import to_arrow_type

    declared = {**declared_types(listing.common), **declared_types(listing.footer)}
    folders = infer_types([entry.partitions for entry in listing.files])
    folders.update((name, declared[name]) for name in folders.keys() & declared.keys())
    physical = [one for one in listing.footer.remove_metadata() if one.name not in folders]
    kinds = {one.name: declared.get(one.name) or spark_type(one.type) for one in physical} | folders
    coded: dict[str, Any] = {}
    if dataset.unischema is not None:
        stored = (listing.common.metadata or {}).get(UNISCHEMA_KEY)
        binary = [name for name, kind in kinds.items() if isinstance(kind, T.BinaryType)]
        coded = coded_fields(load_unischema(dataset.unischema, stored, str(dataset)), binary)
        kinds.update((name, field_type(one)) for name, one in coded.items())
    kinds.update(assembled_types(dataset.assemble, kinds))
    partition_types = {name: to_arrow_type(kind, timezone="UTC") for name, kind in folders.items()}
    arrow_schema = pa.schema([*physical, *(pa.field(name, kind) for name, kind in partition_types.items())])
    filter_columns(dataset.filters, arrow_schema)
    return DiscoveredDataset(
        dataset=dataset,
        files=_typed(listing.files, folders, time_zone),
        schema=T.StructType([T.StructField(name, kind) for name, kind in kinds.items()]),
        arrow_schema=arrow_schema,
        partition_types=partition_types,
        coded=coded,
        time_zone=time_zone,
    )


def _look_job(dataset: ParquetDataset, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
    for _ in numbers:
        yield _look(dataset).to_json()


@contextlib.contextmanager
def open_listed(systems: FileSystems, entry: FileEntry, options: Mapping[str, Any] | None) -> Iterator[pa.NativeFile]:
    """A listed file, open for reading; what fails while it is open is told with its name.

    Args:
        systems: Of the data set.
        entry: The file.
        options: The ``storage_options``, which no message repeats.

    Raises:
        DataError: It cannot be read, or has another size than when it was listed; also for what Arrow raises in the
            ``with`` block.
    """
    file_system, path = systems.open(entry.path)
    try:
        with file_system.open_input_file(path) as source:
            if source.size() != entry.size:
                raise pa.ArrowInvalid(f"it has {source.size()} bytes, {entry.size} when it was listed")
            yield source
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{entry.path} cannot be read as Parquet: {reason(error, options)}. It is of another format or damaged, "
            "was changed or removed after it was listed, or not all executors reach it; fit again, or write it again."
        ) from None
