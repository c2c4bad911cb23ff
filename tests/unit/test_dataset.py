"""Parquet read in place: which files, which columns, which rows; and errors that name the file."""

import contextlib
import datetime
import json
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow.fs import AwsStandardS3RetryStrategy
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import types as T

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.convert import convert
from sparkdl.io.dataset import (
    DiscoveredDataset,
    FileReport,
    ParquetDataset,
    dataset_schema,
    discover_locally,
    in_place,
    inspect_file,
    inspect_locally,
    list_files,
    physical_columns,
    select_rows,
)
from sparkdl.io.petastorm import PlannedReader
from sparkdl.io.plan import Piece, plan_pieces
from sparkdl.io.resolve import ColumnRules, resolve_column
from sparkdl.io.stage import StagedDataset
from sparkdl.io.unischema import UNISCHEMA_KEY, coded_fields, decode_unischema
from tests.unit.test_storage import SECRETS, S3Server, closed_port, s3_server, silent_port

__all__ = ["s3_server"]

pytestmark = pytest.mark.timeout(60)

ID = Column("id", "label_0", "scalar", "int64", flat=True)
COLUMNS = Columns((Column("x", "input_0", "scalar", "float32"),), (ID,))
SPARK_SCHEMA = "org.apache.spark.sql.parquet.row.metadata"


def write(path: Path, columns: Mapping[str, Any] | pa.Table, rows_per_group: int = 10, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, row_group_size=rows_per_group, **settings)
    return path


def numbers(first: int, last: int) -> dict[str, Any]:
    ids = np.arange(first, last)
    return {"id": ids, "x": ids.astype(np.float32) / 2}


def discovered(folder: Path, **options: Any) -> DiscoveredDataset:
    return discover_locally(ParquetDataset(str(folder), **options))


def read_rows(
    found: DiscoveredDataset,
    columns: Columns,
    staged: StagedDataset,
    split: str = "train",
    shards: int = 1,
) -> list[dict[str, Any]]:
    """The rows of a split as a rank's reader makes them, shard after shard."""
    context = pickle.loads(pickle.dumps(in_place(found, columns)))
    rows: list[dict[str, Any]] = []
    for pieces in plan_pieces(getattr(staged, split), shards):
        with PlannedReader(
            pieces,
            columns=physical_columns(context),
            select=lambda table, piece: select_rows(table, piece, context=context, split=split),  # type: ignore[arg-type]
            decode=lambda table, number: table,
            storage_options=context.storage_options,
        ) as reader:
            for table in reader:
                rows += table.to_pylist()
    return rows


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """No file stays open and no thread is left behind."""
    files, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    yield
    assert len(os.listdir("/proc/self/fd")) <= files
    assert set(threading.enumerate()) == threads


# ---- what is asked for -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("url", ["", [], [""], Path("/data"), None])
def test_a_data_set_needs_a_url(url: Any) -> None:
    with pytest.raises(ConfigError, match=r"^url=.* names no files\. Give a path or URL, or a list of them\.$"):
        ParquetDataset(url)


@pytest.mark.parametrize("filters", [[("day", ">")], "day > 3", 7, [("day", "~", 3)]])
def test_filters_of_another_form_are_refused(filters: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a filter: .*Use an expression, as in"):
        ParquetDataset("/data", filters=filters)


def test_tuples_are_an_expression() -> None:
    asked = ParquetDataset("/data", filters=[[("day", ">", 3)], [("day", "in", {1})]])
    assert asked.filters.equals((pc.field("day") > 3) | pc.field("day").isin([1]))


def test_the_options_are_in_no_text() -> None:
    asked = ParquetDataset("/data", storage_options={"secret_key": SECRETS[1]})
    assert str(asked) == "/data"
    assert SECRETS[1] not in repr(asked)
    assert pickle.loads(pickle.dumps(asked)).storage_options == {"secret_key": SECRETS[1]}


# ---- files -----------------------------------------------------------------------------------------------------------
def test_files_are_sorted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    shown = [write(tmp_path / name, numbers(0, 3)) for name in ("b/z.parquet", "a.parquet", "b/_k=1/y.parquet")]
    for name in ("_SUCCESS", ".a.parquet.crc", "_temporary/0/x.parquet", ".hidden/x.parquet", "b_$folder$"):
        write(tmp_path / name, numbers(0, 3))
    shown.pop()  # in the folder of a column named _k, where the others are in none
    with pytest.raises(DataError, match=r"b/_k=1/y\.parquet lies in folders of the keys \['_k'\], but .*a\.parquet in"):
        list_files(ParquetDataset(str(tmp_path)))
    (tmp_path / "b/_k=1/y.parquet").unlink()
    files = list_files(ParquetDataset(str(tmp_path)))
    assert [file.path for file in files] == sorted(map(str, shown))
    assert [file.size for file in files] == [Path(file.path).stat().st_size for file in files]
    assert [file.mtime_ns for file in files] == [Path(file.path).stat().st_mtime_ns for file in files]


@pytest.mark.parametrize("scheme", ["", "file:", "file://"])
def test_a_file_or_several_urls_may_be_named_and_no_file_counts_twice(tmp_path: Path, scheme: str) -> None:
    paths = [str(write(tmp_path / name, numbers(0, 3))) for name in ("a/1.parquet", "a/2.parquet", "b/3.parquet")]
    one = list_files(ParquetDataset(f"{scheme}{paths[0]}"))
    assert [file.path for file in one] == [f"{scheme}{paths[0]}"]
    both = ParquetDataset([f"{scheme}{tmp_path}/a/", f"{scheme}{paths[0]}", f"{scheme}{tmp_path}/b"])
    assert [file.path for file in list_files(both)] == [f"{scheme}{path}" for path in paths]


def test_folders_are_columns_below_the_url_only(tmp_path: Path) -> None:
    write(tmp_path / "year=2024" / "place=a%2Fb" / "1.parquet", numbers(0, 3))
    write(tmp_path / "year=2024" / "place=__HIVE_DEFAULT_PARTITION__" / "2.parquet", numbers(0, 3))
    found = {file.path.rpartition("/")[2]: file.partitions for file in list_files(ParquetDataset(str(tmp_path)))}
    assert found == {"1.parquet": {"year": 2024, "place": "a/b"}, "2.parquet": {"year": 2024, "place": None}}
    below = list_files(ParquetDataset(f"{tmp_path}/year=2024"))
    assert [list(file.partitions) for file in below] == [["place"], ["place"]]


@pytest.mark.parametrize(
    ("texts", "kind", "values"),
    [
        (["1", "02"], "int", [1, 2]),
        (["1", "3000000000"], "bigint", [1, 3000000000]),
        (["1", "9" * 20], "decimal(20,0)", [Decimal(1), Decimal("9" * 20)]),
        (["1e3", "2"], "decimal(10,0)", [Decimal(1000), Decimal(2)]),
        (["9" * 39], "double", [float("9" * 39)]),
        (["1.5", "2"], "double", [1.5, 2.0]),
        (["1.5f", "2d"], "double", [1.5, 2.0]),
        (["1.5", "3000000000"], "string", ["1.5", "3000000000"]),
        (["2024-01-02"], "date", [datetime.date(2024, 1, 2)]),
        (["2024-1-2"], "string", ["2024-1-2"]),
        (["2024-02-30"], "string", ["2024-02-30"]),
        (
            ["2024-01-02 03:04:05", "2024-01-02"],
            "timestamp",
            [
                datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
                datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
            ],
        ),
        (["2024-01-02 03:04:05.12"], "string", ["2024-01-02 03:04:05.12"]),
        (["2024-01-02", "7"], "string", ["2024-01-02", "7"]),
        (["a", "1"], "string", ["a", "1"]),
        (["__HIVE_DEFAULT_PARTITION__", "7"], "int", [None, 7]),
        (["__HIVE_DEFAULT_PARTITION__"], "string", [None]),
    ],
)
def test_folders_are_typed_as_spark_types_them(tmp_path: Path, texts: list[str], kind: str, values: list[Any]) -> None:
    for number, text in enumerate(texts):
        write(tmp_path / f"k={text}" / f"{number}.parquet", numbers(number, number + 1))
    found = discovered(tmp_path)
    assert found.schema["k"].dataType.simpleString() == kind
    assert {file.path.rpartition("/")[2]: file.partitions["k"] for file in found.files} == {
        f"{number}.parquet": value for number, value in enumerate(values)
    }


def test_the_schema_in_the_metadata_has_the_last_word_on_folders(tmp_path: Path) -> None:
    write(tmp_path / "k=1" / "a.parquet", numbers(0, 3))
    spark = T.StructType([T.StructField("id", T.LongType()), T.StructField("k", T.StringType())])
    pq.write_metadata(
        pa.schema([pa.field("id", pa.int64())], {SPARK_SCHEMA: spark.json()}), tmp_path / "_common_metadata"
    )
    found = discovered(tmp_path)
    assert found.schema["k"].dataType == T.StringType()
    assert found.files[0].partitions == {"k": "1"}
    wrong = T.StructType([T.StructField("k", T.DateType())])
    pq.write_metadata(
        pa.schema([pa.field("id", pa.int64())], {SPARK_SCHEMA: wrong.json()}), tmp_path / "_common_metadata"
    )
    with pytest.raises(DataError, match=r"a\.parquet lies in a folder k=1, but the data set's metadata says.*date"):
        discovered(tmp_path)


@pytest.mark.parametrize(
    ("make", "kind", "error", "message"),
    [
        (lambda folder: folder.mkdir(), "", DataError, r"^\S+/t holds no Parquet file\. Check the path"),
        (lambda folder: write(folder / "_x.parquet", numbers(0, 1)), "", DataError, r"/t holds no Parquet file"),
        (lambda folder: None, "", ConfigError, r"^\S+/t does not exist\. Check the path; patterns such as \* are not"),
        (
            lambda folder: write(folder / "a", numbers(0, 1)).write_bytes(b""),
            "",
            DataError,
            r"^\S+/a is empty: it has 0",
        ),
        (
            lambda folder: write(folder / "_delta_log" / "0.json", numbers(0, 1)),
            "",
            ConfigError,
            r'/t belongs to a Delta table.*fit\(spark\.read\.format\("delta"\)\.load\(.*/t\'\)\)\.$',
        ),
        (
            lambda folder: (write(folder / "day=1" / "x", numbers(0, 1)), (folder / "_delta_log").mkdir()),
            "/day=1",
            ConfigError,
            r"/t/day=1 belongs to a Delta table",
        ),
        (lambda folder: (folder / ".hoodie").mkdir(parents=True), "", ConfigError, r"Hudi table.*format\(\"hudi\"\)"),
        (
            lambda folder: write(folder / "metadata" / "v1.metadata.json", numbers(0, 1)),
            "",
            ConfigError,
            r"Iceberg table.*format\(\"iceberg\"\)",
        ),
    ],
    ids=["empty", "hidden only", "missing", "no bytes", "delta", "partition of delta", "hudi", "iceberg"],
)
def test_what_is_no_parquet_data_set_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], Any], kind: str, error: type[Exception], message: str
) -> None:
    make(tmp_path / "t")
    with nothing_left(), pytest.raises(error, match=message):
        list_files(ParquetDataset(f"{tmp_path}/t{kind}"))


@pytest.mark.parametrize("content", [b"id,x\n1,2\n", b"PAR1", b"x" * 5000])
def test_a_file_of_another_format_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with nothing_left(), pytest.raises(DataError, match=r"^\S+/table\.csv cannot be read as Parquet: .*another format"):
        discovered(tmp_path)


# ---- columns ---------------------------------------------------------------------------------------------------------
def test_spark_says_itself_what_its_columns_are(tmp_path: Path) -> None:
    vector = {"type": [1], "size": [None], "indices": [None], "values": [[1.0, 2.0]]}
    kinds = {"type": pa.int8(), "size": pa.int32(), "indices": pa.list_(pa.int32()), "values": pa.list_(pa.float64())}
    struct = pa.StructArray.from_arrays([pa.array(vector[name], kind) for name, kind in kinds.items()], list(kinds))
    spark = T.StructType([T.StructField("v", VectorUDT()), T.StructField("n", T.DecimalType(9, 2))])
    table = pa.table({"v": struct, "n": pa.array([Decimal("1.50")])})
    write(tmp_path / "a.parquet", table.replace_schema_metadata({SPARK_SCHEMA: spark.json()}))
    schema = dataset_schema(ParquetDataset(str(tmp_path)))
    assert schema == spark
    write(tmp_path / "a.parquet", table)
    assert dataset_schema(ParquetDataset(str(tmp_path)))["v"].dataType == VectorUDT()


def test_a_type_that_names_a_class_to_import_is_not_imported(tmp_path: Path) -> None:
    udt = {
        "type": "udt",
        "class": None,
        "pyClass": "this.Hurts",
        "serializedClass": "gASVHAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjARleGl0lIWUUpQu",
        "sqlType": "binary",
    }
    nested = {"type": "array", "elementType": udt, "containsNull": True}
    fields = [
        {"name": name, "type": kind, "nullable": True, "metadata": {}} for name, kind in (("id", udt), ("x", nested))
    ]
    text = json.dumps({"type": "struct", "fields": fields})
    write(tmp_path / "a.parquet", pa.table(numbers(0, 3)).replace_schema_metadata({SPARK_SCHEMA: text}))
    assert discovered(tmp_path).schema.simpleString() == "struct<id:binary,x:array<binary>>"


@pytest.mark.parametrize(
    "text", ["no json", '{"type": "struct"}', '{"type": "struct", "fields": [{"name": "id"}]}', "7"]
)
def test_a_footer_that_only_looks_like_sparks_is_ignored(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a.parquet", pa.table(numbers(0, 3)).replace_schema_metadata({SPARK_SCHEMA: text}))
    assert discovered(tmp_path).schema.simpleString() == "struct<id:bigint,x:float>"


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (pa.array([1], pa.uint8()), "smallint"),
        (pa.array([1], pa.uint16()), "int"),
        (pa.array([1], pa.uint32()), "bigint"),
        (pa.array([1], pa.uint64()), "bigint"),
        (pa.array([1.0], pa.float16()), "float"),
        (pa.array(["a"]).dictionary_encode(), "string"),
        (pa.array(["a"], pa.large_string()), "string"),
        (pa.array([b"a"], pa.binary(1)), "binary"),
        (pa.array([[1, 2]], pa.list_(pa.uint8(), 2)), "array<smallint>"),
        (pa.array([[[1.0]]], pa.large_list(pa.list_(pa.float32()))), "array<array<float>>"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())), "map<string,tinyint>"),
        (pa.array([{"a": 1}], pa.struct([("a", pa.uint16())])), "struct<a:int>"),
        (pa.array([datetime.datetime(2024, 1, 1)], pa.timestamp("ns")), "timestamp_ntz"),
        (pa.array([datetime.datetime(2024, 1, 1)], pa.timestamp("ms", "UTC")), "timestamp"),
        (pa.array([1], pa.time32("s")), "void"),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((1, 2), np.float32)), "array<float>"),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else None,
)
def test_columns_of_other_programs_have_the_types_that_spark_would_give_them(
    tmp_path: Path, array: pa.Array, kind: str
) -> None:
    write(tmp_path / "a.parquet", {"c": array})
    assert discovered(tmp_path).schema["c"].dataType.simpleString() == kind


def test_assembled_columns_are_arrays(tmp_path: Path) -> None:
    table = {"f": pa.array([1.0], pa.float32()), "b": [True], "i": [1], "s": ["a"]}
    write(tmp_path / "k=1" / "a.parquet", table)
    found = discovered(tmp_path, assemble={"few": ["f", "b"], "more": ["i", "f", "k"]})
    assert found.columns == ["f", "b", "i", "s", "k", "few", "more"]
    assert found.schema["few"].dataType == T.ArrayType(T.FloatType())
    assert found.schema["more"].dataType == T.ArrayType(T.DoubleType())
    rules = ColumnRules(assemble=found.assemble)
    column = resolve_column(
        found, "more", field="input_0", param="featuresCol", floating="float32", role="input", rules=rules
    )
    assert column.parts == ("i", "f", "k")


@pytest.mark.parametrize(
    ("assemble", "message"),
    [
        ({"f": ["i"]}, r"^assemble names a column 'f', but the files have one\. Choose another name\.$"),
        ({"v": []}, r"^assemble=\{'v': \[\]\} names no parts\. Give a list of columns\.$"),
        ({"v": "fi"}, r"^assemble=\{'v': 'fi'\} names no parts"),
        ({"v": ["f", "g"]}, r"^assemble: 'v' has a part 'g', but there are f, i, s\.$"),
        ({"v": ["f", "s"]}, r"^assemble: 'v' has a part 's' of type string\. Parts must be numbers; index strings"),
    ],
)
def test_what_cannot_be_assembled_is_refused(tmp_path: Path, assemble: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.parquet", {"f": [1.0], "i": [1], "s": ["a"]})
    with pytest.raises(ConfigError, match=message):
        discovered(tmp_path, assemble=assemble)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (
            pc.field("y") > 3,
            r"^filters=\(y > 3\) cannot be evaluated: .*FieldRef.Name\(y\).*The columns are id, x, day",
        ),
        (pc.field("id") > "a", r"^filters=.* cannot be evaluated: .*The columns are"),
        (pc.field("id") + 1, r"^filters=.* cannot be evaluated: .*The columns are"),
        (pc.field(0) > 3, r"^filters=.* takes columns by position\. Name them"),
    ],
)
def test_a_filter_that_does_not_suit_the_columns_is_refused(tmp_path: Path, filters: Any, message: str) -> None:
    write(tmp_path / "day=1" / "a.parquet", numbers(0, 3))
    with pytest.raises(ConfigError, match=message):
        discovered(tmp_path, filters=filters)


def test_the_files_columns_that_a_filter_looks_at_are_read(tmp_path: Path) -> None:
    columns = {name: [1.0] for name in "abcdefgh"} | {"id": [1], "x": [1.0]}
    write(tmp_path / "day=1" / "a.parquet", columns)
    for filters, expected in [
        (None, {"id", "x"}),
        (pc.field("day") == 1, {"id", "x"}),
        (((pc.field("a") > 1) | (pc.field("g") > pc.field("c"))) & (pc.field("day") == 1), {"id", "x", "a", "c", "g"}),
        (pc.scalar(True), {"id", "x"}),
    ]:
        context = in_place(discovered(tmp_path, filters=filters), COLUMNS)
        assert set(physical_columns(context)) == expected


# ---- rows ------------------------------------------------------------------------------------------------------------
VALIDATED = Columns(
    (
        Column("x", "input_0", "scalar", "float32", nulls="drop"),
        Column("v", "input_1", "assembled", "float32", parts=("p", "day"), nulls="drop"),
        Column("a", "input_2", "array", "float64", nulls="drop"),
    ),
    (ID,),
    validation=Column("held", "validation", "scalar", "bool", flat=True),
)
FILTERS: list[tuple[Any, Callable[[dict[str, Any]], bool]]] = [
    (None, lambda row: True),
    (pc.field("day") > 1, lambda row: row["day"] is not None and row["day"] > 1),
    (pc.field("day").is_null(), lambda row: row["day"] is None),
    (pc.field("id") < 40, lambda row: row["id"] < 40),
    ([("id", ">=", 35), ("day", "in", {0, 2})], lambda row: row["id"] >= 35 and row["day"] in (0, 2)),
    ((pc.field("x") > 10) | (pc.field("day") == 1), lambda row: (row["x"] or 0) > 10 or row["day"] == 1),
    (
        pc.field("p") > 3,
        lambda row: (row["p"] or 0) > 3,
    ),
    (pc.field("id") > 1000, lambda row: False),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), which=st.integers(0, len(FILTERS) - 1), shards=st.integers(1, 4))
def test_the_rows_are_those_of_a_loop_over_all_rows(
    tmp_path_factory: pytest.TempPathFactory, seed: int, which: int, shards: int
) -> None:
    filters, keeps = FILTERS[which]
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(seed)
    expected: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    first = 0
    for day in (None, 0, 1, 2):
        for number in range(2):
            count = int(random.integers(1, 30))
            ids = list(range(first, first + count))
            first += count
            some = random.random() < 0.5  # files without nulls are counted from their footers

            def holes(values: Sequence[Any], some: bool = some) -> list[Any]:
                return [None if some and random.random() < 0.2 else value for value in values]

            columns = {
                "id": pa.array(ids),
                "x": pa.array(holes([float(id_) / 2 for id_ in ids]), pa.float32()),
                "p": pa.array(holes([id_ % 7 for id_ in ids]), pa.int32()),
                "a": pa.array(holes([holes([1.0 * id_, 2.0]) for id_ in ids]), pa.list_(pa.float64())),
                "held": pa.array(holes([bool(random.random() < 0.3) for _ in ids]), pa.bool_()),
            }
            text = "__HIVE_DEFAULT_PARTITION__" if day is None else day
            write(folder / f"day={text}" / f"{number}.parquet", columns, rows_per_group=int(random.integers(1, 12)))
    found = discovered(folder, filters=filters)
    for file in found.files:
        for row in pq.ParquetFile(file.path).read().to_pylist():
            row = {**row, **file.partitions}
            whole = None not in (row["x"], row["p"], row["day"], row["a"]) and None not in row["a"]
            if keeps(row) and whole:
                kept = {name: row[name] for name in ("x", "p", "day", "a", "id")}
                expected["validation" if row["held"] else "train"].append(kept)
    staged = inspect_locally(found, VALIDATED)
    for split, rows in expected.items():
        assert read_rows(found, VALIDATED, staged, split, shards) == rows
    assert all(group.rows for group in (*staged.train, *staged.validation))
    if filters is None:
        assert staged.facts.dropped == first - sum(map(len, expected.values()))


def test_what_a_footer_tells_is_not_read(tmp_path: Path) -> None:
    """All pages are destroyed, and the inspection does not notice."""
    table = {**numbers(0, 100), "class": np.arange(100) % 7}
    for day in (1, 2):
        path = write(tmp_path / f"day={day}" / "a.parquet", table, rows_per_group=50)
        content = path.read_bytes()
        end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        path.write_bytes(content[:4] + b"\xff" * (end - 4) + content[end:])
    columns = Columns(COLUMNS.inputs, (Column("class", "label_0", "scalar", "int64", flat=True, validity="class"),))
    for filters, rows in [(None, 200), (pc.field("day") == 2, 100), (pc.field("id") > 100, 0)]:
        staged = inspect_locally(discovered(tmp_path, filters=filters), columns)
        assert sum(group.rows for group in staged.train) == rows
        assert staged.facts.labels == ((0, 6) if rows else None)
        assert staged.facts.widths == ({"input_0": 1, "label_0": 1} if rows else {})
    with pytest.raises(DataError, match=r"day=1/a\.parquet cannot be read as Parquet: .*damaged"):
        inspect_locally(discovered(tmp_path, filters=pc.field("id") > 90), columns)


def test_a_data_set_may_have_none_of_its_columns_in_files(tmp_path: Path) -> None:
    for day in (1, 2):
        write(tmp_path / f"day={day}" / "a.parquet", numbers(0, 3))
    columns = Columns((Column("day", "input_0", "scalar", "float32"),), (Column("day", "label_0", "scalar", "int64"),))
    found = discovered(tmp_path)
    assert physical_columns(in_place(found, columns)) == ()
    assert read_rows(found, columns, inspect_locally(found, columns)) == 3 * [{"day": 1}] + 3 * [{"day": 2}]


def test_the_deepest_folder_of_a_key_counts(tmp_path: Path) -> None:
    folder = tmp_path / "day=7" / "table"
    write(folder / "day=1" / "a.parquet", numbers(0, 1))
    found = discovered(folder)
    columns = Columns((Column("day", "input_0", "scalar", "float32"),), (ID,))
    assert read_rows(found, columns, inspect_locally(found, columns)) == [{"day": 1, "id": 0}]


def test_a_row_group_with_other_rows_than_planned_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbers(0, 20), rows_per_group=20)
    found = discovered(tmp_path, filters=pc.field("id") >= 5)
    staged = inspect_locally(found, COLUMNS)
    write(path, numbers(1, 21), rows_per_group=20)
    context = in_place(found, COLUMNS)
    table = pq.read_table(path).select(physical_columns(context))
    (group,) = staged.train
    with pytest.raises(DataError, match=rf"^Row group 0 of {path} has 16 rows to train on, but 15 were planned\. The"):
        select_rows(table, Piece(group, 0, 15), context=context)


# ---- facts -----------------------------------------------------------------------------------------------------------
def labelled(kind: str = "int64") -> Columns:
    return Columns(COLUMNS.inputs, (Column("c", "label_0", "scalar", kind, flat=True, validity="class"),))


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([3, 1, 9, 2], pa.int16()),
        pa.array([3, 1, 9, 2], pa.uint64()),
        pa.array([3, 1, 9, 2], pa.float64()),
        pa.array([Decimal(3), Decimal(1), Decimal(9), Decimal(2)]),
    ],
    ids=lambda array: str(array.type),
)
def test_the_range_of_the_labels_is_that_of_the_kept_rows(tmp_path: Path, labels: pa.Array) -> None:
    write(tmp_path / "a.parquet", {**numbers(0, 4), "c": labels})
    assert inspect_locally(discovered(tmp_path), labelled()).facts.labels == (1, 9)
    assert inspect_locally(discovered(tmp_path, filters=pc.field("id") != 2), labelled()).facts.labels == (1, 3)


def test_a_folder_may_be_the_label(tmp_path: Path) -> None:
    for label in (4, 2):
        write(tmp_path / f"c={label}" / "a.parquet", numbers(0, 4))
    assert inspect_locally(discovered(tmp_path), labelled()).facts.labels == (2, 4)


@pytest.mark.parametrize("labels", [[0, -1], [0, 1 << 31], [0.0, 0.5]])
def test_a_bad_label_is_shown_with_its_file(tmp_path: Path, labels: list[Any]) -> None:
    path = write(tmp_path / "a.parquet", {**numbers(0, 2), "c": labels})
    with pytest.raises(DataError, match=rf"^{path}: 'c' must hold class numbers 0, 1, .*\"c\": {labels[1]}"):
        inspect_locally(discovered(tmp_path), labelled())


def test_widths_come_from_the_first_rows(tmp_path: Path) -> None:
    columns = Columns(
        (
            Column("a", "input_0", "array", "float32", nulls=0.0),
            Column("v", "input_1", "assembled", "float32", parts=("x", "id", "x")),
        ),
        (ID,),
    )
    write(tmp_path / "a.parquet", {**numbers(0, 3), "a": [None, [1.0, 2.0], [3.0, 4.0]]})
    facts = inspect_locally(discovered(tmp_path), columns).facts
    assert facts.widths == {"input_0": 2, "input_1": 3, "label_0": 1}
    assert json.loads(facts.row) == {"id": 0, "x": 0.0, "a": None}
    write(tmp_path / "b.parquet", {**numbers(3, 5), "a": [[1.0], [2.0]]})
    with pytest.raises(DataError, match=r"'a' has 2 values in some rows, .* and 1 in others"):
        inspect_locally(discovered(tmp_path), columns)


@pytest.mark.parametrize("statistics", [True, False])
def test_nulls_are_counted_over_all_files(tmp_path: Path, statistics: bool) -> None:
    holes = pa.array([None, 1.0, None, 2.0], pa.float32())
    for name in ("b", "c"):
        write(tmp_path / f"{name}.parquet", {"id": np.arange(4), "x": holes}, 2, write_statistics=statistics)
    write(tmp_path / "a.parquet", numbers(0, 4), write_statistics=statistics)
    with pytest.raises(
        DataError, match=rf"^'x' is null in 4 rows of {tmp_path}, in 2 of 3 files; the first is \S+/b\.parquet\. Leave"
    ):
        inspect_locally(discovered(tmp_path), COLUMNS)
    found = discovered(tmp_path, filters=pc.field("x").is_valid())
    assert len(read_rows(found, COLUMNS, inspect_locally(found, COLUMNS))) == 8


def test_a_null_folder_is_a_null(tmp_path: Path) -> None:
    write(tmp_path / "day=1" / "a.parquet", numbers(0, 4))
    write(tmp_path / "day=__HIVE_DEFAULT_PARTITION__" / "a.parquet", numbers(0, 4))
    columns = Columns((Column("day", "input_0", "scalar", "float32"),), (ID,))
    with pytest.raises(DataError, match=r"^'day' is null in 4 rows of"):
        inspect_locally(discovered(tmp_path), columns)


# ---- files that are not what they were -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"id": [1]}, r"/b\.parquet has no column 'x', but the first file has one, of type float\. All files need"),
        ({"id": [1], "x": ["a"]}, r"/b\.parquet holds 'x' as string, but the first file as float\. All files need the"),
    ],
)
def test_files_of_different_schemas_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.parquet", numbers(0, 3))
    write(tmp_path / "b.parquet", other)
    write(tmp_path / "c.parquet", other)
    with nothing_left(), pytest.raises(DataError, match=message):
        inspect_locally(discovered(tmp_path), COLUMNS)


def test_columns_that_nobody_needs_may_differ_and_so_may_the_encoding(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**numbers(0, 3), "s": ["a", "b", "c"], "y": [1, 2, 3]})
    write(tmp_path / "b.parquet", {**numbers(0, 3), "s": pa.array(["a", "b", "c"]).dictionary_encode()})
    columns = Columns((*COLUMNS.inputs, Column("s", "input_1", "raw", "")), (ID,))
    assert len(inspect_locally(discovered(tmp_path), columns).train) == 2


@pytest.mark.parametrize("damage", ["cut short", "replaced", "removed", "page"])
def test_a_file_that_changes_after_it_was_listed_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "a.parquet", numbers(0, 100))
    path = write(tmp_path / "b.parquet", numbers(100, 200), compression="snappy", use_dictionary=False)
    found = discovered(tmp_path, filters=pc.field("x") > 3)
    content = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(content[:-40])
    elif damage == "replaced":
        write(path, numbers(0, 7))
    elif damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:4] + b"\xff" * 300 + content[304:])
    with nothing_left(), pytest.raises(DataError, match=rf"^{path} cannot be read as Parquet: .*fit again"):
        inspect_locally(found, COLUMNS)


def test_a_report_survives_json(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"id": [1, 2], "x": pa.array([None, 1.0], pa.float32())})
    found = discovered(tmp_path)
    report = inspect_file(found, found.files[0], COLUMNS)
    assert report.nulls == {"x": 1}
    assert report.train == ((0, 2),)
    assert FileReport.of_json(json.loads(json.dumps(report.to_json()))) == report


# ---- stores ----------------------------------------------------------------------------------------------------------
def test_folders_on_s3_are_read_in_place_and_the_options_stay_secret(tmp_path: Path, s3_server: S3Server) -> None:
    from sparkdl.storage import open_file_system

    url = f"s3a://{s3_server.bucket}/{tmp_path.name}/table"
    file_system, path = open_file_system(url, s3_server.options)
    ids = np.arange(60)
    table = pa.table({**numbers(0, 60), "day": ids % 3, "place": np.where(ids < 30, "a/b", "c")})
    pq.write_to_dataset(table, path, filesystem=file_system, partition_cols=["day", "place"])
    dataset = ParquetDataset(
        url,
        filters=(pc.field("day") > 0) & (pc.field("id") < 50),
        assemble={"v": ["x", "day"]},
        storage_options=s3_server.options,
    )
    found = discover_locally(dataset)
    assert [file.partitions for file in found.files[:2]] == [{"day": 0, "place": "a/b"}, {"day": 0, "place": "c"}]
    columns = Columns((Column("v", "input_0", "assembled", "float32", parts=("x", "day")),), (ID,))
    staged = inspect_locally(found, columns)
    rows = read_rows(found, columns, staged, shards=2)
    assert sorted(rows, key=lambda row: row["id"]) == [
        {"x": number / 2, "day": number % 3, "id": number} for number in range(50) if number % 3
    ]
    texts = [repr(value) for value in (dataset, found, in_place(found, columns), staged)]
    texts.append(pickle.dumps(staged).decode("latin-1"))
    for asked, error in [
        (ParquetDataset(f"{url}/nothing", storage_options=s3_server.options), ConfigError),
        (ParquetDataset("s3a://nobucket/x", storage_options=s3_server.options), ConfigError),
        (ParquetDataset(url, filters=pc.field("y") > 1, storage_options=s3_server.options), ConfigError),
    ]:
        with pytest.raises(error) as caught:
            discover_locally(asked)
        texts += [str(caught.value), repr(caught.value)]
    file_system.delete_file(found.files[-1].path.removeprefix("s3a://"))
    with pytest.raises(DataError, match=rf"^{re.escape(found.files[-1].path)} cannot be read as Parquet") as gone:
        inspect_file(found, found.files[-1], columns)
    texts.append(str(gone.value))
    assert not [text for text in texts if any(secret in text for secret in SECRETS)]


@pytest.mark.parametrize("kind", ["silent", "closed"])
def test_a_store_that_cannot_be_reached_is_one_sentence_within_the_timeout(kind: str) -> None:
    with silent_port() if kind == "silent" else closed_port() as port:
        options = {
            "access_key": SECRETS[0],
            "secret_key": SECRETS[1],
            "region": "eu-west-1",
            "endpoint_override": f"http://127.0.0.1:{port}",
            "request_timeout": 1,
            "retry_strategy": AwsStandardS3RetryStrategy(max_attempts=1),
        }
        started = time.monotonic()
        with (
            nothing_left(),
            pytest.raises(
                ConfigError,
                match=r"^s3a://bucket/table cannot be listed: .*NETWORK_CONNECTION.*Check the address and",
            ) as caught,
        ):
            list_files(ParquetDataset("s3a://bucket/table", storage_options=options))
        assert time.monotonic() - started < 5
        assert "\n" not in str(caught.value)
        assert not [secret for secret in SECRETS if secret in str(caught.value)]


def test_what_was_read_becomes_tensors(tmp_path: Path) -> None:
    write(tmp_path / "day=3" / "a.parquet", numbers(0, 5))
    found = discovered(tmp_path, assemble={"v": ["x", "day"]})
    columns = Columns((Column("v", "input_0", "assembled", "float32", parts=("x", "day")),), (ID,))
    staged = inspect_locally(found, columns)
    context = in_place(found, columns)
    (group,) = staged.train
    table = pq.ParquetFile(group.path).read_row_group(0, columns=list(physical_columns(context)))
    values = convert(select_rows(table, Piece(group, 1, 4), context=context), columns)
    x, day = values["input_0"]
    assert (x.tolist(), day.tolist(), values["label_0"].tolist()) == ([0.5, 1.0, 1.5], [3, 3, 3], [1, 2, 3])  # type: ignore[union-attr]


# ---- data sets in Petastorm's own format -----------------------------------------------------------------------------
def petastorm_dataset(folder: Path, codecs: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    """What materialize_dataset writes, less the Spark session: cells by the codecs, and the pickled Unischema."""
    from petastorm.codecs import ScalarCodec
    from petastorm.etl.dataset_metadata import UNISCHEMA_KEY
    from petastorm.unischema import Unischema, UnischemaField
    from petastorm.utils import add_to_dataset_metadata

    from sparkdl.io.legacy_pyarrow import ParquetDataset as LegacyDataset

    fields = [UnischemaField("id", np.int64, (), ScalarCodec(T.LongType()), False)]
    fields += [UnischemaField(name, *described) for name, described in codecs.items()]
    unischema = Unischema("Described", fields)
    encoded = {
        one.name: [None if row[one.name] is None else one.codec.encode(one, row[one.name]) for row in rows]
        for one in fields
    }
    write(folder / "part.parquet", {name: _cells(column) for name, column in encoded.items()}, rows_per_group=4)
    add_to_dataset_metadata(LegacyDataset(str(folder)), UNISCHEMA_KEY, pickle.dumps(unischema))
    return unischema


def _cells(column: Sequence[Any]) -> list[Any]:
    return [bytes(cell) if isinstance(cell, bytearray) else cell for cell in column]


def pictures(count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from petastorm.codecs import CompressedImageCodec, CompressedNdarrayCodec, NdarrayCodec

    codecs = {
        "picture": (np.uint8, (4, 5, 3), CompressedImageCodec("png"), False),
        "gray": (np.uint8, (4, 5), CompressedImageCodec("png"), False),
        "matrix": (np.float32, (2, 3), NdarrayCodec(), False),
        "packed": (np.int64, (3,), CompressedNdarrayCodec(), False),
        "flags": (np.bool_, (2,), NdarrayCodec(), False),
        "cloud": (np.float64, (None, 2), NdarrayCodec(), True),
    }
    random = np.random.default_rng(7)
    rows = [
        {
            "id": number,
            "picture": random.integers(0, 256, (4, 5, 3)).astype(np.uint8),
            "gray": random.integers(0, 256, (4, 5)).astype(np.uint8),
            "matrix": random.normal(size=(2, 3)).astype(np.float32),
            "packed": random.integers(0, 1 << 60, 3),
            "flags": np.array([number % 2 == 0, True]),
            "cloud": random.normal(size=(number + 1, 2)) if number % 2 else None,
        }
        for number in range(count)
    ]
    return codecs, rows


@pytest.mark.parametrize("stored", [True, False])
def test_petastorms_arrays_and_images_become_tensors(tmp_path: Path, stored: bool) -> None:
    codecs, rows = pictures(10)
    unischema = petastorm_dataset(tmp_path, codecs, rows)
    found = discovered(tmp_path, unischema="stored" if stored else unischema)
    assert {one.name: one.dataType.simpleString() for one in found.schema} == {
        "id": "bigint",
        "picture": "array<float>",
        "gray": "array<float>",
        "matrix": "array<float>",
        "packed": "array<bigint>",
        "flags": "array<int>",
        "cloud": "binary",
    }
    rules = ColumnRules(shapes=found.shapes)
    names = ["picture", "gray", "matrix", "packed", "flags"]
    inputs = tuple(
        resolve_column(
            found, name, field=f"input_{number}", param="inputCols", floating="float32", role="input", rules=rules
        )
        for number, name in enumerate(names)
    )
    columns = Columns(inputs, (ID,))
    staged = inspect_locally(found, columns)
    assert staged.facts.widths == {"input_0": 60, "input_1": 20, "input_2": 6, "input_3": 3, "input_4": 2, "label_0": 1}
    context = pickle.loads(pickle.dumps(in_place(found, columns)))
    for group in staged.train:
        table = pq.ParquetFile(group.path).read_row_group(group.index, columns=list(physical_columns(context)))
        values = convert(select_rows(table, Piece(group, 0, group.rows), context=context), columns)
        for row, number in enumerate(values["label_0"].tolist()):  # type: ignore[union-attr]
            for place, name in enumerate(names):
                np.testing.assert_array_equal(values[f"input_{place}"][row], rows[number][name])


def test_arrays_of_unknown_shape_are_decoded_one_by_one(tmp_path: Path) -> None:
    codecs, rows = pictures(4)
    unischema = petastorm_dataset(tmp_path, codecs, rows)
    decoded = decode_unischema(pq.read_table(tmp_path / "part.parquet"), coded_fields(unischema, ["cloud"]), ["cloud"])
    for value, row in zip(decoded["cloud"], rows, strict=True):
        np.testing.assert_array_equal(value, row["cloud"])


def test_without_opencv_pillow_decodes_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from petastorm import codecs as petastorm_codecs

    codecs, rows = pictures(4)
    unischema = petastorm_dataset(tmp_path, codecs, rows)
    monkeypatch.setattr(petastorm_codecs, "OPENCV_AVAILABLE", False)
    table, fields = pq.read_table(tmp_path / "part.parquet"), coded_fields(unischema, ["picture", "gray"])
    for name, values in decode_unischema(table, fields, fields).items():
        np.testing.assert_array_equal(values, [row[name] for row in rows])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ConfigError, match=r"^Images need opencv-python-headless or pillow on all executors\. Install one"
    ):
        decode_unischema(table, fields, fields)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, r"^'matrix' is null in row 1 of a row group, and no number can stand for an array.*is_valid\(\)"),
        (b"nonsense", r"^'matrix' cannot be decoded by NdarrayCodec\(\) in row 1 of a row group: .*Check the file"),
        ((3, 2), r"^'matrix' holds a value of shape \(3, 2\) and type float32 in row 1 .*says \(2, 3\) and float32"),
    ],
)
def test_a_cell_that_is_not_what_the_unischema_says_is_named(tmp_path: Path, cell: Any, message: str) -> None:
    codecs, rows = pictures(3)
    fields = coded_fields(petastorm_dataset(tmp_path, codecs, rows), ["matrix"])
    cells = pq.read_table(tmp_path / "part.parquet").column("matrix").to_pylist()
    if isinstance(cell, tuple):
        cell = _npy(np.zeros(cell, np.float32))
    cells[1] = cell
    with pytest.raises(DataError, match=message):
        decode_unischema(pa.table({"matrix": pa.array(cells, pa.binary())}), fields, ["matrix"])


def _npy(values: Any) -> bytes:
    import io

    sink = io.BytesIO()
    np.save(sink, values)
    return sink.getvalue()


def test_a_unischema_must_be_one_and_be_there(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", numbers(0, 3))
    with pytest.raises(ConfigError, match=r"^unischema=7 is neither a petastorm\.unischema\.Unischema nor 'stored'\.$"):
        discovered(tmp_path, unischema=7)
    with pytest.raises(ConfigError, match=r"^unischema='stored', but \S+ has no Unischema in a _common_metadata file"):
        discovered(tmp_path, unischema="stored")
    stored = {UNISCHEMA_KEY: pickle.dumps(Path("a class that is not let pass"))}
    pq.write_metadata(pa.schema([pa.field("id", pa.int64())], stored), tmp_path / "_common_metadata")
    assert discovered(tmp_path).columns == ["id", "x"]  # not unpickled unless asked for
    with pytest.raises(DataError, match=r"^The Unischema in the metadata of \S+ cannot be unpickled: .*forbidden"):
        discovered(tmp_path, unischema="stored")
