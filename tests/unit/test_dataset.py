"""Parquet read in place: which files there are, what their columns are, and errors that name the file."""

import datetime
import json
import pickle
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import AwsStandardS3RetryStrategy
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import types as T

from sparkdl.errors import ConfigError, DataError
from sparkdl.io.dataset import ParquetDataset, dataset_schema, list_files
from sparkdl.io.resolve import ColumnRules, resolve_column
from sparkdl.storage import open_file_system
from tests.unit.parquet_files import SPARK_SCHEMA, discovered, nothing_left, numbers, write
from tests.unit.test_storage import SECRETS, closed_port, silent_port

pytestmark = pytest.mark.timeout(60)


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


# ---- stores ----------------------------------------------------------------------------------------------------------
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
        open_file_system("s3a://bucket", options)  # the SDK starts with the first
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
