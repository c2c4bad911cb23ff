"""Parquet read in place: which files there are, what their columns are, and which rows of them are trained on.

Nothing is copied. A `ParquetDataset` says what to read; `discover` lists its files and reads one footer;
`inspect_dataset` counts, group by group, the rows that are kept, so that the plan knows them; `select_rows` makes the
same rows of a row group that a reader has read. Listing and inspecting run in Spark jobs, because the executors see the
storage and the driver may not; `discover_locally` and `inspect_locally` do the same without Spark.
"""

import base64
import contextlib
import datetime
import decimal
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSelector, FileType

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError, DataError, SparkdlError
from sparkdl.io.convert import null_rows, to_array, whole
from sparkdl.io.plan import Piece, RowGroup
from sparkdl.io.schema import show_row
from sparkdl.io.stage import Facts, StagedDataset
from sparkdl.io.unischema import (
    UNISCHEMA_KEY,
    as_lists,
    coded_fields,
    decode_unischema,
    field_type,
    load_unischema,
)
from sparkdl.storage import FileSystems, default_file_system, qualify, reason

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.types import DataType, StructType

__all__ = [
    "DiscoveredDataset",
    "FileEntry",
    "FileReport",
    "InPlace",
    "ParquetDataset",
    "dataset_schema",
    "discover",
    "discover_locally",
    "in_place",
    "inspect_dataset",
    "inspect_file",
    "inspect_locally",
    "list_files",
    "merge_reports",
    "physical_columns",
    "select_rows",
]

Split = Literal["train", "validation"]
_SPARK_SCHEMA = b"org.apache.spark.sql.parquet.row.metadata"
_NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"
_TABLE_FORMATS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
_JOB_SCHEMA = "found string"
_SIGNED = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.int64(),
    pa.float16(): pa.float32(),
}
_FIRST_ROWS = 1024


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
    """

    dataset: ParquetDataset
    files: tuple[FileEntry, ...]
    schema: "StructType"
    arrow_schema: pa.Schema
    partition_types: Mapping[str, pa.DataType]
    coded: Mapping[str, Any] = field(default_factory=dict)
    time_zone: str = "UTC"

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


# ---- discovery -------------------------------------------------------------------------------------------------------
def list_files(dataset: ParquetDataset) -> tuple[FileEntry, ...]:
    """The Parquet files of a data set, sorted by path; opens none of them.

    Raises:
        ConfigError: A URL that does not exist or cannot be reached, or a table whose files cannot be read without its
            log (Delta, Iceberg, Hudi).
        DataError: No file, an empty one, or files that lie in folders of different keys.
    """
    files, _ = _list(dataset, FileSystems(dataset.storage_options))
    return _typed(files, _infer_partition_types(files), "UTC")


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
    (found,) = _run(spark, 1, functools.partial(_look_job, complete))
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
    with _opened(systems, files[0], dataset.storage_options) as source:
        footer = pq.read_schema(source)
    if common is None:
        return _Listing(files, footer, pa.schema([]))
    with _opened(systems, common, dataset.storage_options) as source:
        return _Listing(files, footer, pq.read_schema(source))


def _list(dataset: ParquetDataset, systems: FileSystems) -> tuple[tuple[FileEntry, ...], FileEntry | None]:
    """The files below all URLs, with the texts of their folders; and ``_common_metadata``, if there is one."""
    files: dict[str, FileEntry] = {}
    common: FileEntry | None = None
    for url in dataset.urls:
        for relative, info in _below(url, systems, dataset.storage_options):
            *folders, name = relative.split("/")
            path = f"{url.rstrip('/')}/{relative}" if relative else url
            entry = FileEntry(path, info.size or 0, info.mtime_ns, _folder_texts(folders))
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


def _folder_texts(folders: Sequence[str]) -> dict[str, Any]:
    """The text of each ``key=value`` folder; None for a null."""
    pairs = (tuple(map(unquote, folder.split("=", 1))) for folder in folders if "=" in folder)
    return {key: None if text == _NULL_FOLDER else text for key, text in pairs}


@contextlib.contextmanager
def _opened(systems: FileSystems, entry: FileEntry, options: Mapping[str, Any] | None) -> Iterator[pa.NativeFile]:
    """A listed file. What fails while it is open is told with its name."""
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


# ---- folders' values -------------------------------------------------------------------------------------------------
def _infer_partition_types(files: Sequence[FileEntry]) -> dict[str, "DataType"]:
    """Types of the folders' columns as Spark's PartitioningUtils infers them, over the values of all files."""
    found = {}
    for name in files[0].partitions:
        texts = {entry.partitions[name] for entry in files} - {None}
        found[name] = _common_type([_type_of(text) for text in sorted(texts)])
    return found


def _type_of(text: str) -> "DataType":
    from pyspark.sql import types as T

    if re.fullmatch(r"[+-]?[0-9]+", text) and -(1 << 63) <= int(text) < 1 << 63:
        return T.IntegerType() if -(1 << 31) <= int(text) < 1 << 31 else T.LongType()
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,9})?", text):
        _, digits, exponent = decimal.Decimal(text).as_tuple()
        if isinstance(exponent, int) and exponent >= 0 and len(digits) + exponent <= 38:
            return T.DecimalType(len(digits) + exponent, 0)
        return T.DoubleType()
    if re.fullmatch(r"[+-]?(NaN|Infinity|([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?[fFdD])", text):
        return T.DoubleType()
    if re.search(r"\.[0-9]{2}", text):  # Spark's pattern has one digit for the fraction of a second
        return T.StringType()
    moment: DataType = T.TimestampType() if ":" in text else T.DateType()
    try:
        _value_of(text, moment, "UTC")
    except ValueError:
        return T.StringType()
    return moment


def _common_type(kinds: Sequence["DataType"]) -> "DataType":
    from pyspark.sql import types as T

    names = {kind.typeName() for kind in kinds}
    if len(names) == 1 and "decimal" not in names:
        return kinds[0]
    if names and names <= {"integer", "long"}:
        return T.LongType()
    if names == {"integer", "double"}:
        return T.DoubleType()
    if names == {"date", "timestamp"}:
        return T.TimestampType()
    if "decimal" in names and names <= {"integer", "long", "decimal"}:
        widths = {"integer": 10, "long": 20}
        digits = [kind.precision if isinstance(kind, T.DecimalType) else widths[kind.typeName()] for kind in kinds]
        return T.DecimalType(max(digits), 0)
    return T.StringType()


def _value_of(text: str | None, kind: "DataType", time_zone: str) -> Any:
    """The value of a folder.

    Raises:
        ValueError: The text is not of that type.
    """
    name = kind.typeName()
    if text is None or name == "string":
        return text
    if name in ("byte", "short", "integer", "long"):
        return int(text)
    if name in ("float", "double"):
        return float(text.rstrip("fFdD") if text[-1:] in "fFdD" else text)
    if name == "decimal":
        return decimal.Decimal(text)
    found = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)(?: (\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?)?", text, re.ASCII)
    if found is None or name not in ("date", "timestamp"):
        raise ValueError(text)
    year, month, day, hour, minute, second = (int(part or 0) for part in found.groups()[:6])
    if name == "date":
        return datetime.date(year, month, day)
    microsecond = int((found[7] or "").ljust(6, "0"))
    return datetime.datetime(year, month, day, hour, minute, second, microsecond, ZoneInfo(time_zone))


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
                values[name] = _value_of(text, kinds[name], time_zone)
            except (ValueError, ArithmeticError):
                raise DataError(
                    f"{entry.path} lies in a folder {name}={text}, but the data set's metadata says that {name!r} is "
                    f"{kinds[name].simpleString()}. Correct the folder or the metadata."
                ) from None
        typed.append(replace(entry, partitions=values))
    return tuple(typed)


# ---- columns ---------------------------------------------------------------------------------------------------------
def _discovered(dataset: ParquetDataset, listing: _Listing, time_zone: str) -> DiscoveredDataset:
    from pyspark.sql import types as T
    from pyspark.sql.pandas.types import to_arrow_type

    declared = {**_declared_types(listing.common), **_declared_types(listing.footer)}
    folders = _infer_partition_types(listing.files)
    folders.update((name, declared[name]) for name in folders.keys() & declared.keys())
    physical = [one for one in listing.footer.remove_metadata() if one.name not in folders]
    kinds = {one.name: declared.get(one.name) or _spark_type(one.type) for one in physical} | folders
    coded: dict[str, Any] = {}
    if dataset.unischema is not None:
        stored = (listing.common.metadata or {}).get(UNISCHEMA_KEY)
        binary = [name for name, kind in kinds.items() if isinstance(kind, T.BinaryType)]
        coded = coded_fields(load_unischema(dataset.unischema, stored, str(dataset)), binary)
        kinds.update((name, field_type(one)) for name, one in coded.items())
    kinds.update(_assembled_types(dataset.assemble, kinds))
    partition_types = {name: to_arrow_type(kind, timezone="UTC") for name, kind in folders.items()}
    arrow_schema = pa.schema([*physical, *(pa.field(name, kind) for name, kind in partition_types.items())])
    _filter_columns(dataset.filters, arrow_schema)
    return DiscoveredDataset(
        dataset=dataset,
        files=_typed(listing.files, folders, time_zone),
        schema=T.StructType([T.StructField(name, kind) for name, kind in kinds.items()]),
        arrow_schema=arrow_schema,
        partition_types=partition_types,
        coded=coded,
        time_zone=time_zone,
    )


def _declared_types(footer: pa.Schema) -> dict[str, "DataType"]:
    """The types that Spark itself left in a footer; none where another program wrote it."""
    from pyspark.errors import PySparkException
    from pyspark.sql.types import StructType

    try:
        described = json.loads((footer.metadata or {}).get(_SPARK_SCHEMA, b"null"))
        fields = StructType.fromJson(_without_foreign_types(described)).fields if described else []
    except (KeyError, TypeError, ValueError, PySparkException):
        return {}
    return {one.name: one.dataType for one in fields}


def _without_foreign_types(described: Any) -> Any:
    """Spark's JSON with user-defined types replaced by what they are stored as, but for those of Spark ML.

    The JSON of such a type names a class to import, or holds a pickle of it. No data file may have that done.
    """
    if isinstance(described, list):
        return [_without_foreign_types(one) for one in described]
    if not isinstance(described, dict):
        return described
    if described.get("type") == "udt":
        known = described.get("pyClass") in ("pyspark.ml.linalg.VectorUDT", "pyspark.ml.linalg.MatrixUDT")
        kept = {key: value for key, value in described.items() if key != "serializedClass"}
        return kept if known else _without_foreign_types(described["sqlType"])
    return {key: _without_foreign_types(value) for key, value in described.items()}


def _spark_type(kind: pa.DataType) -> "DataType":
    """What Spark would call a column of another program's file; void where it has no word for it."""
    from pyspark.errors import PySparkException
    from pyspark.ml.linalg import VectorUDT
    from pyspark.sql import types as T
    from pyspark.sql.pandas.types import from_arrow_type

    if isinstance(kind, pa.BaseExtensionType):
        return _spark_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _spark_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return T.ArrayType(_spark_type(kind.value_type), kind.value_field.nullable)
    if pa.types.is_map(kind):
        return T.MapType(_spark_type(kind.key_type), _spark_type(kind.item_type), kind.item_field.nullable)
    if pa.types.is_struct(kind):
        if [one.name for one in kind] == ["type", "size", "indices", "values"]:
            return VectorUDT()
        return T.StructType([T.StructField(one.name, _spark_type(one.type), one.nullable) for one in kind])
    try:
        return from_arrow_type(_SIGNED.get(kind, kind))
    except PySparkException:
        return T.NullType()


def _assembled_types(assemble: Mapping[str, Sequence[str]], kinds: Mapping[str, "DataType"]) -> dict[str, "DataType"]:
    """Types of the assembled columns: arrays of floats if they hold all parts exactly, else of doubles.

    Raises:
        ConfigError: A name that is taken, or a part that is missing or no number.
    """
    from pyspark.sql import types as T

    found: dict[str, DataType] = {}
    for name, parts in assemble.items():
        if name in kinds:
            raise ConfigError(f"assemble names a column {name!r}, but the files have one. Choose another name.")
        if isinstance(parts, str) or not parts:
            raise ConfigError(f"assemble={{{name!r}: {parts!r}}} names no parts. Give a list of columns.")
        for part in parts:
            if part not in kinds:
                raise ConfigError(f"assemble: {name!r} has a part {part!r}, but there are {', '.join(kinds)}.")
            if not isinstance(kinds[part], T.NumericType | T.BooleanType):
                raise ConfigError(
                    f"assemble: {name!r} has a part {part!r} of type {kinds[part].simpleString()}. Parts must be "
                    "numbers; index strings with pyspark.ml.feature.StringIndexer."
                )
        exact = all(isinstance(kinds[part], T.FloatType | T.ByteType | T.ShortType | T.BooleanType) for part in parts)
        found[name] = T.ArrayType(T.FloatType() if exact else T.DoubleType())
    return found


def _filter_columns(filters: pc.Expression | None, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that a filter looks at: those without which it cannot be evaluated.

    Raises:
        ConfigError: It cannot be evaluated with all of them, or takes columns by position.
    """
    if filters is None:
        return ()

    def works(candidate: pa.Schema) -> bool:
        try:
            _filter(candidate.empty_table(), filters)
        except (pa.ArrowException, KeyError, IndexError):
            return False
        return True

    def needed(suspects: Sequence[str]) -> list[str]:
        if works(pa.schema([one for one in schema if one.name not in suspects])):
            return []
        if len(suspects) == 1:
            return list(suspects)
        half = len(suspects) // 2
        return needed(suspects[:half]) + needed(suspects[half:])

    try:
        _filter(schema.empty_table(), filters)
    except (pa.ArrowException, KeyError, IndexError) as error:
        raise ConfigError(
            f"filters={filters} cannot be evaluated: {reason(error)}. The columns are {', '.join(schema.names)}."
        ) from error
    if works(pa.schema([one.with_name(f"renamed {one.name}") for one in schema])) and not works(pa.schema([])):
        raise ConfigError(
            f"filters={filters} takes columns by position. Name them, as in pyarrow.compute.field('day')."
        )
    return tuple(needed(schema.names))


# ---- reading ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False, slots=True)
class InPlace:
    """All that a reader needs to know to make the rows of a plan out of row groups; small, and can be pickled.

    Attributes:
        columns: What is trained on, under the user's names.
        filters: Which rows are; None: all.
        row_filters: The same, unless folders alone decide: then the plan holds no other file, and no row is looked at.
        filter_columns: The columns that ``row_filters`` looks at.
        schema: Types of the columns of files and folders that any of this names.
        partition_types: Types of the folders' columns among them.
        coded: Fields among the columns that a Petastorm codec decodes.
        time_zone: Of timestamps in folder names.
        storage_options: For the store.
    """

    columns: Columns
    filters: pc.Expression | None
    row_filters: pc.Expression | None
    filter_columns: tuple[str, ...]
    schema: pa.Schema
    partition_types: Mapping[str, pa.DataType]
    coded: Mapping[str, Any]
    time_zone: str
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)


def in_place(discovered: DiscoveredDataset, columns: Columns) -> InPlace:
    """What a reader of these columns needs to know of a data set."""
    filter_columns = _filter_columns(discovered.filters, discovered.arrow_schema)
    by_folder = discovered.partition_types.keys() >= set(filter_columns)
    used = {name for column in columns for name in _sources(column)} | set(filter_columns)
    if columns.validation is not None:
        used.add(columns.validation.name)
    return InPlace(
        columns=columns,
        filters=discovered.filters,
        row_filters=None if by_folder else discovered.filters,
        filter_columns=() if by_folder else filter_columns,
        schema=pa.schema([one for one in discovered.arrow_schema if one.name in used]),
        partition_types={name: kind for name, kind in discovered.partition_types.items() if name in used},
        coded={name: one for name, one in discovered.coded.items() if name in used},
        time_zone=discovered.time_zone,
        storage_options=discovered.dataset.storage_options,
    )


def physical_columns(context: InPlace) -> tuple[str, ...]:
    """Names of the columns to read from the files."""
    return tuple(name for name in context.schema.names if name not in context.partition_types)


def select_rows(table: pa.Table, piece: Piece, *, context: InPlace, split: Split = "train") -> pa.Table:
    """The rows of a piece, out of all rows of its row group.

    Args:
        table: The row group as read from the file: the `physical_columns`.
        piece: Which of the kept rows. Its row group counts the kept rows, not those in the file.
        context: What `in_place` returned.
        split: Training or validation rows.

    Returns:
        The columns of ``context.columns`` under the user's names: those of folders added, those of Petastorm decoded to
        lists of fixed size, and those that only filters look at left out.

    Raises:
        DataError: Not as many rows are kept as were planned, or a cell that a codec cannot decode.
    """
    group = piece.row_group
    table = _with_folders(table, context, group.path)
    if table.num_rows != group.rows:
        table = _kept(table, context, split)
    if table.num_rows != group.rows:
        raise DataError(
            f"Row group {group.index} of {group.path} has {table.num_rows} rows to train on, but {group.rows} were "
            "planned. The file was changed after it was inspected; fit again."
        )
    names = list(dict.fromkeys(name for column in context.columns for name in _sources(column)))
    rows = table.slice(piece.start, piece.rows).select(names)
    return as_lists(rows, decode_unischema(rows, context.coded, [name for name in names if name in context.coded]))


def _sources(column: Column) -> tuple[str, ...]:
    return column.parts or (column.name,)


def _dropping(context: InPlace) -> dict[str, Column]:
    return {name: column for column in context.columns if column.nulls == "drop" for name in _sources(column)}


def _with_folders(table: pa.Table, context: InPlace, path: str) -> pa.Table:
    """The table with the columns of the folders of its file; a folder further down wins over one above."""
    from pyspark.sql.pandas.types import from_arrow_type

    texts = _folder_texts(path.split("/")[:-1])
    for name, kind in context.partition_types.items():
        value = _value_of(texts[name], from_arrow_type(kind), context.time_zone)
        constant = pa.repeat(pa.scalar(value, kind), table.num_rows)
        table = table.append_column(name, constant)
    return table


def _kept(table: pa.Table, context: InPlace, split: Split | None) -> pa.Table:
    table = _without_nulls(_filter(table, context.row_filters), _dropping(context))
    if split is None or context.columns.validation is None:
        return table
    held = pc.coalesce(pc.field(context.columns.validation.name), pc.scalar(False))
    return _filter(table, held if split == "validation" else ~held)


def _without_nulls(table: pa.Table, dropping: Mapping[str, Column]) -> pa.Table:
    gone = [null_rows(whole(table.column(name)), column) for name, column in dropping.items()]
    found = [mask for mask in gone if mask is not None]
    return table.filter(pa.array(~np.logical_or.reduce(found))) if found else table


def _all_of(conditions: Sequence[pc.Expression]) -> pc.Expression | None:
    return functools.reduce(lambda left, right: left & right, conditions) if conditions else None


def _filter(table: pa.Table, condition: pc.Expression | None) -> pa.Table:
    if condition is None:
        return table
    steps = [
        acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
        acero.Declaration("filter", acero.FilterNodeOptions(condition)),
    ]
    return acero.Declaration.from_sequence(steps).to_table(use_threads=False)  # threads would change the order


# ---- inspection ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class FileReport:
    """What a plan needs to know of one file.

    Attributes:
        path: The file.
        size: Bytes.
        train: Index and number of kept rows of each row group that has training rows.
        validation: The same of validation rows.
        facts: What is known of the rows.
        nulls: How many kept rows have a null where none may be, by column.
    """

    path: str
    size: int
    train: tuple[tuple[int, int], ...]
    validation: tuple[tuple[int, int], ...]
    facts: Facts
    nulls: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "path": self.path,
            "size": self.size,
            "train": self.train,
            "validation": self.validation,
            "facts": self.facts.to_json(),
            "nulls": dict(self.nulls),
        }

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> "FileReport":
        """The inverse of `to_json`."""
        train, validation = (tuple((index, rows) for index, rows in values[split]) for split in ("train", "validation"))
        return cls(values["path"], values["size"], train, validation, Facts.of_json(values["facts"]), values["nulls"])


def inspect_file(discovered: DiscoveredDataset, entry: FileEntry, columns: Columns) -> FileReport:
    """Count the rows of one file that are kept, reading as little as the answer takes.

    Row groups are left out by the values of folders and by the statistics in the footer. Rows are counted from the
    footer where no filter, split or null can concern them; else the columns that decide are read.

    Raises:
        DataError: The file cannot be read, its columns are not those of the first file, or values in it cannot be
            trained on. Nulls are only counted.
    """
    return _inspect(in_place(discovered, columns), entry, FileSystems(discovered.dataset.storage_options))


def inspect_locally(discovered: DiscoveredDataset, columns: Columns) -> StagedDataset:
    """Inspect all files in this process.

    Raises:
        DataError: As `inspect_file` and `merge_reports`.
    """
    context, systems = in_place(discovered, columns), FileSystems(discovered.dataset.storage_options)
    return merge_reports(discovered, columns, [_inspect(context, entry, systems) for entry in discovered.files])


def inspect_dataset(spark: "SparkSession", discovered: DiscoveredDataset, columns: Columns) -> StagedDataset:
    """Inspect all files on the executors, in one Spark job.

    Raises:
        DataError: As `inspect_file` and `merge_reports`.
    """
    work = functools.partial(_inspect_job, in_place(discovered, columns), discovered.files)
    reports = _run(spark, len(discovered.files), work)
    return merge_reports(discovered, columns, [FileReport.of_json(report) for report in reports])


def merge_reports(discovered: DiscoveredDataset, columns: Columns, reports: Sequence[FileReport]) -> StagedDataset:
    """What the plan needs to know of all files; a data set of which no row is kept has no row groups.

    Raises:
        DataError: Nulls where none may be, or rows of different widths.
    """
    facts = Facts()
    for report in reports:
        facts = facts.merge(report.facts, columns)
    for name in dict.fromkeys(name for report in reports for name in report.nulls):
        bad = [report for report in reports if report.nulls.get(name)]
        raise DataError(
            f"{name!r} is null in {sum(report.nulls[name] for report in bad)} rows of {discovered.dataset}, in "
            f"{len(bad)} of {len(reports)} files; the first is {bad[0].path}. Leave such rows out with "
            f"filters=pyarrow.compute.field({name!r}).is_valid(), or fill them before fit."
        )
    train = [RowGroup(report.path, *group) for report in reports for group in report.train]
    validation = [RowGroup(report.path, *group) for report in reports for group in report.validation]
    files = {report.path: report.size for report in reports}
    return StagedDataset(str(discovered.dataset), tuple(sorted(train)), tuple(sorted(validation)), facts, files)


def _inspect(context: InPlace, entry: FileEntry, systems: FileSystems) -> FileReport:
    with _opened(systems, entry, context.storage_options) as source, pq.ParquetFile(source) as file:
        _check_types(file.schema_arrow, context, entry)
        try:
            return _Inspection(context, entry, source, file).report()
        except DataError as error:
            raise DataError(f"{entry.path}: {error}") from error


def _check_types(found: pa.Schema, context: InPlace, entry: FileEntry) -> None:
    for name in physical_columns(context):
        expected = _spark_type(context.schema.field(name).type).simpleString()
        if name not in found.names:
            raise DataError(
                f"{entry.path} has no column {name!r}, but the first file has one, of type {expected}. All files need "
                "the columns that are trained on; name files of one schema, or write them again."
            )
        kind = _spark_type(found.field(name).type).simpleString()
        if kind != expected:
            raise DataError(
                f"{entry.path} holds {name!r} as {kind}, but the first file as {expected}. All files need the same "
                "types; name files of one schema, or write them again."
            )


class _Inspection:
    """The inspection of one open file."""

    def __init__(self, context: InPlace, entry: FileEntry, source: pa.NativeFile, file: pq.ParquetFile) -> None:
        self._context = context
        self._entry = entry
        self._source = source
        self._file = file
        self._leaves = _leaves_by_column(file.schema_arrow)
        self._nulls: dict[str, int] = {}
        self._labels: tuple[int, int] | None = None
        self._dropped = 0

    def report(self) -> FileReport:
        train, validation = [], []
        for index in self._possible_groups():
            rows = self._file.metadata.row_group(index).num_rows
            kept, held = self._count(index, rows) if rows else (0, 0)
            if kept > held:
                train.append((index, kept - held))
            if held:
                validation.append((index, held))
        widths, row = self._first_row(min((*train, *validation))[0]) if train or validation else ({}, "")
        facts = Facts(widths, self._labels, row, self._dropped)
        return FileReport(self._entry.path, self._entry.size, tuple(train), tuple(validation), facts, self._nulls)

    def _possible_groups(self) -> list[int]:
        """Row groups that may hold rows that the filter keeps, as far as folders and statistics tell."""
        context, every = self._context, list(range(self._file.metadata.num_row_groups))
        if context.filters is None:
            return every
        one_row = _with_folders(pa.table({"": [0]}), context, self._entry.path)
        if context.row_filters is None:
            return every if _filter(one_row, context.filters).num_rows else []
        folders = [
            pc.field(name).is_null() if not (value := one_row.column(name)[0]).is_valid else pc.field(name) == value
            for name in context.partition_types
        ]
        known = _all_of(folders)
        fragment = ds.ParquetFileFormat().make_fragment(
            self._source, partition_expression=pc.scalar(True) if known is None else known
        )
        parts = fragment.split_by_row_group(filter=context.row_filters, schema=context.schema)
        return sorted(group.id for part in parts for group in part.row_groups)

    def _count(self, index: int, rows: int) -> tuple[int, int]:
        """How many rows of a row group are kept, and how many of these are held out for validation."""
        context, columns = self._context, self._context.columns
        deciding = set(context.filter_columns)
        if columns.validation is not None:
            deciding.add(columns.validation.name)
        sources = {name: column for column in columns for name in _sources(column)}
        uncertain = {name for name in sources if not self._never_null(index, name)}
        dropping = {name: column for name, column in _dropping(context).items() if name in uncertain}
        checked = [name for name in sources if name in uncertain and sources[name].nulls == "error"]
        certain = context.row_filters is None and not dropping
        labels = [
            column
            for column in columns.labels
            if column.validity == "class" and not (certain and self._note_statistics(index, column))
        ]
        read = {*deciding, *dropping, *checked, *(column.name for column in labels)}
        if not read:
            return rows, 0
        passed = _filter(self._read(index, read), context.row_filters)
        kept = _without_nulls(passed, dropping)
        self._dropped += passed.num_rows - kept.num_rows
        for name in checked:
            gone = null_rows(whole(kept.column(name)), sources[name])
            if gone is not None and gone.any():
                self._nulls[name] = self._nulls.get(name, 0) + int(gone.sum())
        for column in labels:
            if column.name not in self._nulls:
                self._note_labels(column, kept)
        if columns.validation is None:
            return kept.num_rows, 0
        return kept.num_rows, pc.sum(kept.column(columns.validation.name).cast(pa.int64())).as_py() or 0

    def _read(self, index: int, names: set[str]) -> pa.Table:
        wanted = [name for name in self._context.schema.names if name in names - self._context.partition_types.keys()]
        table = self._file.read_row_group(index, columns=wanted, use_threads=False)
        return _with_folders(table, self._context, self._entry.path)

    def _never_null(self, index: int, name: str) -> bool:
        if name in self._context.partition_types:
            return self._entry.partitions[name] is not None
        group = self._file.metadata.row_group(index)
        # One leaf without nulls is enough: a null or an empty list further up counts as a null of every leaf below. And
        # an array has but one leaf, so that none of its elements is null either.
        statistics = (group.column(leaf).statistics for leaf in self._leaves[name])
        return any(one is not None and one.has_null_count and one.null_count == 0 for one in statistics)

    def _note_statistics(self, index: int, column: Column) -> bool:
        """Take the smallest and largest label from the footer; False where it does not tell, or tells of bad ones."""
        name = column.name
        if name in self._context.partition_types or not pa.types.is_integer(self._file.schema_arrow.field(name).type):
            return False
        found = self._file.metadata.row_group(index).column(self._leaves[name][0]).statistics
        if found is None or not found.has_min_max or found.min < 0 or found.max >= 1 << 31:
            return False
        self._widen_labels(found.min, found.max)
        return True

    def _note_labels(self, column: Column, kept: pa.Table) -> None:
        if kept.num_rows:
            values = to_array(whole(kept.column(column.name)), column, kept)
            self._widen_labels(int(values.min()), int(values.max()))

    def _widen_labels(self, low: int, high: int) -> None:
        known = self._labels or (low, high)
        self._labels = min(known[0], low), max(known[1], high)

    def _first_row(self, index: int) -> tuple[dict[str, int], str]:
        """Values per row of each column, and a row as text, from the first kept rows of a row group."""
        context = self._context
        widths = {column.field: 1 for column in context.columns if column.kind in ("scalar", "text")}
        open_columns = []
        for column in context.columns:
            if column.kind == "assembled":
                widths[column.field] = len(column.parts)
            elif column.name in context.coded and column.kind == "array":
                widths[column.field] = math.prod(context.coded[column.name].shape)
            elif column.kind in ("vector", "array"):
                open_columns.append(column)
        if not open_columns or self._nulls:
            return widths, ""
        row = ""
        wanted = list(physical_columns(context))
        for batch in self._file.iter_batches(_FIRST_ROWS, row_groups=[index], columns=wanted, use_threads=False):
            table = _with_folders(pa.Table.from_batches([batch]), context, self._entry.path)
            kept = _kept(table, context, None)
            if kept.num_rows and not row:
                row = show_row(kept.slice(0, 1), 0)
            for column in list(open_columns):
                values = whole(kept.column(column.name)).drop_null().slice(0, 1)
                if len(values):
                    widths[column.field] = math.prod(to_array(values, column).shape[1:])
                    open_columns.remove(column)
            if not open_columns:
                break
        return widths, row


def _leaves_by_column(schema: pa.Schema) -> dict[str, list[int]]:
    """Where the leaves of each column are among those of the file, which has them in the same order."""

    def count(kind: pa.DataType) -> int:
        if isinstance(kind, pa.BaseExtensionType):
            return count(kind.storage_type)
        if pa.types.is_dictionary(kind):
            return count(kind.value_type)
        return sum(count(kind.field(number).type) for number in range(kind.num_fields)) or 1

    found, first = {}, 0
    for one in schema:
        leaves = 2 if pa.types.is_map(one.type) else count(one.type)
        found[one.name] = list(range(first, first + leaves))
        first += leaves
    return found


# ---- Spark jobs ------------------------------------------------------------------------------------------------------
Work = Callable[[Iterator[int]], Iterator[dict[str, Any]]]


def _look_job(dataset: ParquetDataset, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
    for _ in numbers:
        yield _look(dataset).to_json()


def _inspect_job(context: InPlace, files: Sequence[FileEntry], numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
    systems = FileSystems(context.storage_options)
    for number in numbers:
        yield _inspect(context, files[number], systems).to_json()


def _run(spark: "SparkSession", count: int, work: Work) -> list[dict[str, Any]]:
    """Do work for the numbers from 0 to ``count`` on the executors; its results in that order.

    Raises:
        SparkdlError: What the work raised, for the smallest number where it did.
    """
    job = spark.range(count).mapInArrow(functools.partial(_run_task, work), _JOB_SCHEMA)
    found = sorted((json.loads(text) for text in job.toArrow().column("found").to_pylist()), key=lambda one: one[0])
    for _, kind, result in found:
        if kind != "":
            raise (ConfigError if kind == ConfigError.__name__ else DataError)(result)
    return [result for _, _, result in found]


def _run_task(work: Work, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    numbers = [number for batch in batches for number in batch.column(0).to_pylist()]
    done = 0
    try:
        for result in work(iter(numbers)):
            yield pa.RecordBatch.from_pydict({"found": [json.dumps([numbers[done], "", result])]})
            done += 1
    except SparkdlError as error:
        # Raised here, Spark would run the task again, and wrap the message into its own and a traceback.
        yield pa.RecordBatch.from_pydict({"found": [json.dumps([numbers[done], type(error).__name__, str(error)])]})
