"""Columns on their way to tensors: what is taken, what it becomes, and how the rest is refused."""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import types as T

from sparkdl.config import Column, Columns, Nulls, Padding
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.schema import (
    ColumnRules,
    Role,
    check_rules,
    convert,
    decode,
    drop_null_rows,
    encode,
    keep_mask,
    resolve_column,
    to_array,
)

BEYOND_DOUBLES = 2**53 + 1

Sparse = tuple[int, Mapping[int, float]]  # size, and the values that are not zero


def vectors(rows: Sequence[Sequence[float] | Sparse | None]) -> pa.StructArray:
    """ML vectors as Spark hands them over: dense rows are sequences, sparse ones (size, {index: value})."""
    entries: list[dict[str, Any] | None] = []
    for row in rows:
        if row is None:
            entries.append(None)
        elif isinstance(row, tuple) and isinstance(row[1], Mapping):
            indices = sorted(row[1])
            values = [row[1][index] for index in indices]
            entries.append({"type": 0, "size": row[0], "indices": indices, "values": values})
        else:
            entries.append({"type": 1, "size": None, "indices": None, "values": list(row)})
    kind = pa.struct(
        [
            ("type", pa.int8()),
            ("size", pa.int32()),
            ("indices", pa.list_(pa.int32())),
            ("values", pa.list_(pa.float64())),
        ]
    )
    return pa.array(entries, kind)


def column(kind: str, dtype: str = "float32", *, field: str = "input_0", **settings: Any) -> Column:
    """A column whose name in messages is ``price``."""
    return Column("price", field, kind, dtype, **settings)  # type: ignore[arg-type]


VECTOR, ARRAY = column("vector"), column("array")
NUMBER, LABEL = column("scalar"), column("scalar", "int64", field="label_0", flat=True, validity="class")
WEIGHT = column("scalar", field="weight", flat=True, validity="weight")


def batch_of(values: pa.Array, field: str = "input_0", **others: pa.Array) -> pa.RecordBatch:
    """A batch as Spark delivers it."""
    return pa.RecordBatch.from_pydict({field: values, **others})


def round_trip(values: pa.Array, given_column: Column) -> torch.Tensor:
    """The tensor that a column becomes after it was staged."""
    columns = Columns((given_column,), ())
    table, _ = encode(batch_of(values, given_column.field), columns)
    return decode(table, columns)[given_column.field]


# ---- values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
        [(3, {0: 1.0, 1: 2.0, 2: 3.0}), (3, {0: 4.0, 1: 5.0, 2: 6.0})],
        [[1.0, 2.0, 3.0], (3, {0: 4.0, 1: 5.0, 2: 6.0})],
        [(3, {2: 3.0, 0: 1.0, 1: 2.0}), [4.0, 5.0, 6.0]],
    ],
    ids=["dense", "sparse", "dense then sparse", "sparse then dense"],
)
def test_a_vector_is_the_same_tensor_in_every_form(rows: list[Any], dtype: str) -> None:
    tensor = round_trip(vectors(rows), column("vector", dtype))
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("rows", [[(4, {})], [(4, {}), [0.0] * 4], [(4, {3: 7.0}), (4, {}), (4, {0: 5.0})]])
def test_what_a_sparse_vector_does_not_name_is_zero(rows: list[Any]) -> None:
    expected = [list(row) if isinstance(row, list) else [row[1].get(i, 0.0) for i in range(row[0])] for row in rows]
    assert round_trip(vectors(rows), VECTOR).tolist() == expected


@st.composite
def vector_rows(draw: st.DrawFn) -> tuple[list[Any], list[list[float]]]:
    """Rows of vectors in any mixture of forms, and what they mean."""
    width = draw(st.integers(1, 6))
    number = st.floats(-1000, 1000, width=32)
    meant = draw(st.lists(st.lists(number, min_size=width, max_size=width), min_size=1, max_size=8))
    rows: list[Any] = []
    for values in meant:
        if draw(st.booleans()):
            rows.append(values)
        else:
            rows.append((width, {index: value for index, value in enumerate(values) if value or draw(st.booleans())}))
    return rows, meant


@given(found=vector_rows(), start=st.integers(0, 7), length=st.integers(1, 8))
@settings(deadline=None)
def test_any_slice_of_any_mixture_of_vectors_is_what_it_means(
    found: tuple[list[Any], list[list[float]]], start: int, length: int
) -> None:
    rows, meant = found
    sliced = meant[start : start + length]
    if sliced:
        assert round_trip(vectors(rows).slice(start, length), VECTOR).tolist() == sliced


@pytest.mark.parametrize(
    ("values", "kind", "dtype"),
    [
        ([[1.5, 2.5], [3.5, 4.5], [5.5, 6.5]], pa.list_(pa.float32()), "float32"),
        ([[1.5, 2.5], [3.5, 4.5], [5.5, 6.5]], pa.list_(pa.float64()), "float32"),
        ([[1, 2], [3, 4], [5, BEYOND_DOUBLES]], pa.list_(pa.int64()), "int64"),
        ([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int16()), "int64"),
    ],
)
def test_an_array_keeps_its_values_also_when_sliced(values: list[Any], kind: pa.DataType, dtype: str) -> None:
    array = pa.array(values, kind)
    for piece, expected in ((array, values), (array.slice(1), values[1:]), (array.slice(1, 1), values[1:2])):
        tensor = round_trip(piece, column("array", dtype))
        assert tensor.dtype == getattr(torch, dtype)
        assert tensor.tolist() == expected


def test_a_number_is_a_column_of_one_as_input_and_flat_as_label() -> None:
    values = pa.array([1.5, -2.5, 0.0])
    assert round_trip(values, NUMBER).tolist() == [[1.5], [-2.5], [0.0]]
    assert round_trip(values, column("scalar", flat=True)).tolist() == [1.5, -2.5, 0.0]
    assert round_trip(values.slice(1), NUMBER).tolist() == [[-2.5], [0.0]]


def test_integers_above_two_to_the_53rd_survive() -> None:
    identities = [BEYOND_DOUBLES, -BEYOND_DOUBLES, 2**63 - 1, -(2**63)]
    found = round_trip(pa.array(identities, pa.int64()), column("scalar", "int64", flat=True))
    assert found.dtype == torch.int64
    assert found.tolist() == identities


def test_class_numbers_travel_as_doubles_and_arrive_as_integers() -> None:
    found = round_trip(pa.array([0.0, 2.0, 1.0]), LABEL)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 2, 1]


def test_all_columns_of_a_run_travel_together_and_the_flag_stays_behind() -> None:
    columns = Columns(
        (VECTOR, column("scalar", "int64", field="input_1", flat=True)), (LABEL,), WEIGHT,
        Column("held_out", "validation", "scalar", "bool"),
    )  # fmt: skip
    batch = pa.RecordBatch.from_pydict(
        {
            "input_0": vectors([[1, 2], (2, {1: 4.0})]),
            "input_1": pa.array([7, 8], pa.int64()),
            "label_0": pa.array([1.0, 0.0]),
            "weight": pa.array([0.0, 2.5]),
            "validation": pa.array([True, False]),
        }
    )
    table, widths = encode(batch, columns)
    assert table.column_names == ["input_0", "input_1", "label_0", "weight"]
    assert all(not field.nullable for field in table.schema)
    assert widths == {"input_0": 2, "input_1": 1, "label_0": 1, "weight": 1}
    assert {name: tensor.tolist() for name, tensor in decode(table, columns).items()} == {
        "input_0": [[1, 2], [0, 4]], "input_1": [7, 8], "label_0": [1, 0], "weight": [0, 2.5],
    }  # fmt: skip


def test_decoding_understands_sliced_filtered_and_joined_tables() -> None:
    columns = Columns((VECTOR,), (LABEL,))
    table, _ = encode(
        batch_of(vectors([[row, row + 0.5] for row in range(6)]), label_0=pa.array(np.arange(6.0))), columns
    )
    tables = {
        "sliced": (table.slice(2, 3), [2, 3, 4]),
        "filtered": (table.filter(pa.array([True, False] * 3)), [0, 2, 4]),
        "joined": (pa.concat_tables([table.slice(4), table.slice(0, 1)]), [4, 5, 0]),
        "empty slice": (table.slice(6), []),
    }
    for name, (part, rows) in tables.items():
        tensors = decode(part, columns)
        assert tensors["input_0"].tolist() == [[row, row + 0.5] for row in rows], name
        assert tensors["label_0"].tolist() == rows, name
        assert tensors["input_0"].shape == (len(rows), 2), name


@pytest.mark.parametrize("given_column", [VECTOR, ARRAY, NUMBER, LABEL, column("array", "int64")])
def test_tables_without_rows_have_tensors_without_rows(given_column: Column) -> None:
    number = pa.int64() if given_column.dtype == "int64" else pa.float64()
    kinds = {"vector": vectors([]).type, "array": pa.list_(number), "scalar": number}
    tensor = round_trip(pa.array([], kinds[given_column.kind]), given_column)
    assert len(tensor) == 0
    assert tensor.dtype == getattr(torch, given_column.dtype)


def test_a_table_without_rows_keeps_the_width_of_earlier_ones() -> None:
    columns = Columns((VECTOR,), ())
    table, widths = encode(batch_of(vectors([])), columns, {"input_0": 3})
    assert widths == {"input_0": 3}
    assert decode(table, columns)["input_0"].shape == (0, 3)


# ---- values that are refused -----------------------------------------------------------------------------------------
def refusal(values: pa.Array, given_column: Column, *, widths: Mapping[str, int] | None = None) -> str:
    """The message with which a batch is refused; its rows can be told apart by ``name``."""
    names = pa.array([f"row {row}" for row in range(len(values))])
    batch = batch_of(values, given_column.field, name=names)
    with pytest.raises(DataError) as caught:
        encode(batch, Columns((given_column,), ()), widths)
    message = str(caught.value)
    assert "'price'" in message, "the message names the column as the user does"
    return message


@pytest.mark.parametrize(
    ("values", "given_column"),
    [
        (vectors([[1.0], None, [2.0], None]), VECTOR),
        (pa.array([[1.0], None, [2.0], None]), ARRAY),
        (pa.array([1.0, None, 2.0, None]), NUMBER),
        (pa.array([1.0, None, 2.0, None]), LABEL),
        (pa.array([1.0, None, 2.0, None]), WEIGHT),
    ],
    ids=["vector", "array", "number", "label", "weight"],
)
def test_nulls_are_refused_with_their_number_the_first_row_and_what_to_do(
    values: pa.Array, given_column: Column
) -> None:
    message = refusal(values, given_column)
    assert re.search(r"is null in 2 of 4 rows; the first: .*\"name\": \"row 1\".*Drop such rows \(df\.dropna", message)


def test_nulls_inside_an_array_are_refused_with_their_row() -> None:
    message = refusal(pa.array([[1.0, 2.0], [3.0, 4.0], [None, 5.0]]), ARRAY)
    assert re.search(r"has a null inside an array.*row 2.*Fill or drop", message)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("make", "given_column"),
    [
        (lambda bad: vectors([[1, 2], [3, bad], (2, {0: bad})]), VECTOR),
        (lambda bad: vectors([(2, {}), (2, {1: bad}), (2, {0: bad, 1: bad})]), VECTOR),
        (lambda bad: pa.array([[1.0, 2.0], [bad, 4.0], [bad, bad]]), ARRAY),
        (lambda bad: pa.array([1.0, bad, bad]), NUMBER),
        (lambda bad: pa.array([1.0, bad, bad]), WEIGHT),
        (lambda bad: pa.array([1.0, bad, bad]), LABEL),
        (lambda bad: pa.array([1.0, bad, bad]), column("scalar", flat=True, field="label_0")),
    ],
    ids=["mixed vectors", "sparse vectors", "array", "number", "weight", "class", "target"],
)
def test_nan_and_infinity_are_refused_with_their_number_and_row(make: Any, given_column: Column, bad: float) -> None:
    message = refusal(make(bad), given_column)
    assert re.search(r"is NaN or infinite in 2 of 3 rows; the first: .*row 1.*Drop or impute", message)


@pytest.mark.parametrize(
    ("values", "given_column"),
    [
        (pa.array([[1.0], [1e300]]), ARRAY),
        (pa.array([1.0, -1e300]), NUMBER),
        (vectors([[1.0], [1e300]]), VECTOR),
        (vectors([(2, {}), (2, {1: 1e300})]), VECTOR),
    ],
    ids=["array", "number", "dense vector", "sparse vector"],
)
def test_a_double_that_no_float_can_hold_is_refused_as_infinite(values: pa.Array, given_column: Column) -> None:
    assert re.search(r"is NaN or infinite in 1 of 2 rows; the first: .*row 1", refusal(values, given_column))


def test_doubles_that_a_float64_module_can_hold_pass() -> None:
    assert round_trip(pa.array([[1e300]]), column("array", "float64")).tolist() == [[1e300]]


def test_a_class_number_beyond_all_classes_is_refused() -> None:
    assert re.search(r"must hold class numbers .*but is 1e\+300 .*row 1", refusal(pa.array([1.0, 1e300]), LABEL))


@pytest.mark.parametrize(
    ("values", "given_column"),
    [
        (pa.array([[1.0, 2.0], [3.0, 4.0], [5.0]]), ARRAY),
        (pa.array([[1.0, 2.0], [3.0, 4.0], []]), ARRAY),
        (vectors([[1.0, 2.0], [3.0, 4.0], [5.0]]), VECTOR),
        (vectors([[1.0, 2.0], (2, {}), (1, {0: 1.0})]), VECTOR),
        (vectors([(2, {0: 1.0}), (2, {0: 1.0}), (1, {0: 1.0})]), VECTOR),
    ],
    ids=["array", "empty array", "dense", "mixed", "sparse"],
)
def test_ragged_rows_are_refused_with_both_lengths_and_the_row(values: pa.Array, given_column: Column) -> None:
    message = refusal(values, given_column)
    assert re.search(r"has 2 values in earlier rows, but [01] in this one: .*row 2.*pad or cut", message)


@pytest.mark.parametrize(("values", "given_column"), [(pa.array([[1.0]]), ARRAY), (vectors([(1, {})]), VECTOR)])
def test_rows_that_differ_from_earlier_batches_are_refused(values: pa.Array, given_column: Column) -> None:
    message = refusal(values, given_column, widths={"input_0": 3})
    assert re.search(r"has 3 values in earlier rows, but 1 in this one: .*row 0", message)


@pytest.mark.parametrize("bad", [-1.0, 0.5, 1e-9, -0.25])
def test_labels_that_are_no_class_numbers_are_refused_with_the_value_and_the_row(bad: float) -> None:
    message = refusal(pa.array([1.0, 0.0, bad]), LABEL)
    assert re.search(
        rf"must hold class numbers 0, 1, \.\.\., but is {re.escape(f'{bad:g}')} in a row: .*row 2.*StringIndexer",
        message,
    )


def test_negative_weights_are_refused_with_the_row() -> None:
    assert re.search(r"is negative in a row: .*row 1.*Weights are >= 0", refusal(pa.array([0.0, -0.5]), WEIGHT))


def test_the_row_shown_is_the_right_one_in_a_slice() -> None:
    batch = batch_of(pa.array([0.0, 1.0, np.nan, 3.0]), name=pa.array(["a", "b", "c", "d"])).slice(1)
    with pytest.raises(DataError, match=r'in 1 of 3 rows; the first: .*"name": "c"'):
        encode(batch, Columns((NUMBER,), ()))


def test_a_long_row_is_shown_in_part() -> None:
    wide = pa.array([[1.0] * 2000, [float("nan")] * 2000])
    assert len(refusal(wide, ARRAY)) < 700


def test_without_its_batch_a_bad_row_is_named_by_number() -> None:
    with pytest.raises(DataError, match=r"'price' is null in 1 of 2 rows; the first: row 1"):
        to_array(pa.array([1.0, None]), NUMBER)


def test_models_take_nan_but_no_null() -> None:
    anything = column("scalar", validity="any")
    assert np.isnan(to_array(pa.array([np.nan, 1.0]), anything)).tolist() == [True, False]
    with pytest.raises(DataError, match="'price' is null"):
        to_array(pa.array([None, 1.0]), anything)


# ---- types -----------------------------------------------------------------------------------------------------------
class Named:
    """All that `resolve_column` asks of a DataFrame: its schema and the names in it."""

    def __init__(self, **types: T.DataType) -> None:
        self.schema = T.StructType([T.StructField(name, kind) for name, kind in types.items()])
        self.columns = self.schema.names


def resolve(
    spark_type: T.DataType,
    role: Role,
    rules: ColumnRules | None = None,
    *,
    floating: str = "float32",
    **others: T.DataType,
) -> Column:
    """The column ``price`` of a DataFrame in which it has this type."""
    df = Named(id=T.LongType(), price=spark_type, **others)
    return resolve_column(
        df, "price", field="input_0", param="featuresCol", floating=floating, role=role, rules=rules or ColumnRules()
    )


INTEGERS = [T.ByteType(), T.ShortType(), T.IntegerType(), T.LongType()]
FRACTIONS = [T.FloatType(), T.DoubleType(), T.BooleanType(), T.DecimalType(10, 2)]


@pytest.mark.parametrize("floating", ["float32", "float64"])
def test_floating_inputs_take_the_dtype_of_the_module(floating: str) -> None:
    assert resolve(VectorUDT(), "input", floating=floating) == Column("price", "input_0", "vector", floating)
    for kind in FRACTIONS:
        assert resolve(kind, "input", floating=floating) == Column("price", "input_0", "scalar", floating)
    for kind in (T.FloatType(), T.DoubleType()):
        assert resolve(T.ArrayType(kind), "input", floating=floating) == Column("price", "input_0", "array", floating)


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integers_stay_integers_as_input_and_target(kind: T.DataType) -> None:
    flat = Column("price", "input_0", "scalar", "int64", flat=True)
    assert resolve(kind, "input") == flat
    assert resolve(kind, "target") == flat
    assert resolve(T.ArrayType(kind), "input") == Column("price", "input_0", "array", "int64")


@pytest.mark.parametrize("kind", [*INTEGERS, *FRACTIONS], ids=str)
def test_every_number_can_be_a_class_a_weight_or_a_target(kind: T.DataType) -> None:
    assert resolve(kind, "class") == Column("price", "input_0", "scalar", "int64", flat=True, validity="class")
    assert resolve(kind, "weight") == Column("price", "input_0", "scalar", "float32", flat=True, validity="weight")
    assert resolve(kind, "target").flat
    assert resolve(kind, "number") == Column("price", "input_0", "scalar", "float32", flat=True)


def test_vectors_and_arrays_can_be_targets() -> None:
    assert resolve(VectorUDT(), "target") == Column("price", "input_0", "vector", "float32")
    assert resolve(T.ArrayType(T.DoubleType()), "target") == Column("price", "input_0", "array", "float32")


def test_a_regressors_integers_become_numbers_in_arrays_too() -> None:
    for kind in (*INTEGERS, T.FloatType(), T.DoubleType()):
        assert resolve(T.ArrayType(kind), "number") == Column("price", "input_0", "array", "float32")


@pytest.mark.parametrize(
    ("kind", "found", "advice"),
    [
        (T.StringType(), "string", "StringIndexer .*vocabularies={'price': ...}, or a transform"),
        (T.StructType([T.StructField("a", T.DoubleType())]), "struct<a:double>", "its fields as columns of their own"),
        (T.BinaryType(), "binary", "an ML Vector, an array of numbers, or a number, or give a transform"),
        (T.NullType(), "void", "an ML Vector, an array of numbers, or a number"),
        (T.MapType(T.StringType(), T.DoubleType()), "map<string,double>", "an ML Vector, .*, or give a transform"),
        (T.DayTimeIntervalType(), "interval day to second", "numbers derived from it"),
        (T.ArrayType(T.StringType()), "array<string>", "an ML Vector, .*, or give a transform"),
        (T.ArrayType(T.StructType([])), "array<struct<>>", "an ML Vector, an array of numbers"),
    ],
    ids=lambda value: value.simpleString() if isinstance(value, T.DataType) else "",
)
@pytest.mark.parametrize("role", ["input", "target"])
def test_other_types_are_refused_with_the_way_out(kind: T.DataType, found: str, advice: str, role: Role) -> None:
    with pytest.raises(ConfigError, match=rf"featuresCol='price' has type {re.escape(found)}; use .*{advice}"):
        resolve(kind, role)


@pytest.mark.parametrize("kind", [T.TimestampType(), T.TimestampNTZType(), T.DateType()], ids=str)
def test_a_regressor_is_not_trained_on_times(kind: T.DataType) -> None:
    with pytest.raises(ConfigError, match=r"; use numbers derived from it \(hour, day of week, unix_timestamp\)"):
        resolve(kind, "number")


def test_nested_arrays_need_a_shape_of_as_many_axes() -> None:
    nested = T.ArrayType(T.ArrayType(T.DoubleType()))
    with pytest.raises(ConfigError, match=r"array<array<double>>; declare the shape .*shapes={'price': \(28, 28\)}"):
        resolve(nested, "input")
    with pytest.raises(
        ConfigError, match=r"shapes={'price': \(4,\)} gives it 1 axes, but its arrays are nested 2 deep"
    ):
        resolve(nested, "input", ColumnRules(shapes={"price": (4,)}))


@pytest.mark.parametrize("kind", [VectorUDT(), T.ArrayType(T.DoubleType()), T.StringType(), T.DateType()], ids=str)
def test_classes_and_weights_must_be_numbers(kind: T.DataType) -> None:
    shown = "vector" if isinstance(kind, VectorUDT) else kind.simpleString()
    with pytest.raises(ConfigError, match=rf"has type {shown}; it must hold class numbers 0, 1, \.\.\."):
        resolve(kind, "class")
    with pytest.raises(ConfigError, match=rf"has type {shown}; it must hold numbers"):
        resolve(kind, "weight")


def test_string_labels_are_sent_to_the_string_indexer() -> None:
    with pytest.raises(ConfigError, match=r"has type string; .*Index strings with pyspark\.ml\.feature\.StringIndexer"):
        resolve(T.StringType(), "class")


def test_the_validation_flag_must_be_boolean() -> None:
    assert resolve(T.BooleanType(), "validation").dtype == "bool"
    for kind in (T.IntegerType(), T.StringType(), VectorUDT()):
        with pytest.raises(ConfigError, match="it must be boolean, true for the rows held out for validation"):
            resolve(kind, "validation")


def test_a_missing_column_is_named_with_the_columns_that_are_there() -> None:
    df = Named(id=T.LongType(), price=T.DoubleType())
    with pytest.raises(ConfigError, match=r"labelCol='cost' is not a column\. The DataFrame has id, price\."):
        resolve_column(df, "cost", field="label_0", param="labelCol", floating="float32", role="class")


# ---- the table of types, cell by cell --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cell:
    """A type, its values in Arrow as Spark delivers them and as Parquet may hold them, and what they become."""

    spark: T.DataType
    arrays: tuple[pa.Array, ...]
    values: list[Any]
    dtype: torch.dtype = torch.float32
    rules: ColumnRules = field(default_factory=ColumnRules)


DAY, BEFORE = datetime.date(2024, 2, 29), datetime.date(1969, 12, 31)
UTC = datetime.UTC
MOMENT = datetime.datetime(2024, 7, 1, 12, 30, 15, 123456, UTC)
MICROSECONDS = 1719837015123456
LONG_AGO = datetime.datetime(1600, 1, 1, tzinfo=UTC)
WORDS = ("north", "south", "east")
SQUARES = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
SQUARE = ColumnRules(shapes={"price": (2, 2)})


def integers(low: int, high: int, spark: T.DataType, *kinds: pa.DataType) -> Cell:
    return Cell(spark, tuple(pa.array([low, 0, high], kind) for kind in kinds), [low, 0, high], torch.int64)


def times(values: list[datetime.datetime], spark: T.DataType, microseconds: list[int], *kinds: pa.DataType) -> Cell:
    return Cell(spark, tuple(pa.array(values, kind) for kind in kinds), microseconds, torch.int64)


def lists(values: list[Any], kind: pa.DataType) -> tuple[pa.Array, ...]:
    """Equal lists of two, in every form of Arrow."""
    return tuple(pa.array(values, form) for form in (pa.list_(kind), pa.large_list(kind), pa.list_(kind, 2)))


TABLE = {
    "byte": integers(-128, 127, T.ByteType(), pa.int8()),
    "short": integers(-(2**15), 2**15 - 1, T.ShortType(), pa.int16()),
    "int": integers(-(2**31), 2**31 - 1, T.IntegerType(), pa.int32()),
    "long": integers(-(2**63), 2**63 - 1, T.LongType(), pa.int64()),
    "ids": integers(BEYOND_DOUBLES, -BEYOND_DOUBLES, T.LongType(), pa.int64(), pa.dictionary(pa.int32(), pa.int64())),
    "unsigned": integers(1, 255, T.LongType(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    "uint64": integers(1, 2**63 - 1, T.LongType(), pa.uint64()),
    "boolean": Cell(T.BooleanType(), (pa.array([True, False]),), [[1], [0]]),
    "float": Cell(T.FloatType(), (pa.array([0.1, -2.5], pa.float32()),), np.float32([[0.1], [-2.5]]).tolist()),
    "float16": Cell(T.FloatType(), (pa.array(np.float16([0.5, -2.5])),), [[0.5], [-2.5]]),
    "double": Cell(T.DoubleType(), (pa.array([0.1, -2.5]),), np.float32([[0.1], [-2.5]]).tolist()),
    "decimal": Cell(
        T.DecimalType(10, 2),
        (
            pa.array([Decimal("12.25"), Decimal("-0.50")], pa.decimal128(10, 2)),
            pa.array([Decimal("12.25"), Decimal("-0.50")], pa.decimal64(10, 2)),
            pa.array([Decimal("12.25"), Decimal("-0.50")], pa.decimal256(40, 2)),
        ),
        [[12.25], [-0.5]],
    ),
    "date": Cell(
        T.DateType(), tuple(pa.array([DAY, BEFORE], kind) for kind in (pa.date32(), pa.date64())), [19782, -1],
        torch.int64,
    ),
    "timestamp": times(
        [MOMENT, LONG_AGO], T.TimestampType(), [MICROSECONDS, -11676096000 * 10**6],
        pa.timestamp("us", "UTC"), pa.timestamp("us", "America/New_York"),
    ),
    "timestamp of other units": times(
        [MOMENT.replace(microsecond=0)], T.TimestampType(), [MICROSECONDS - 123456],
        pa.timestamp("s"), pa.timestamp("ms", "Asia/Tokyo"), pa.timestamp("us"), pa.timestamp("ns"),
    ),
    "timestamp_ntz": times([MOMENT.replace(tzinfo=None)], T.TimestampNTZType(), [MICROSECONDS], pa.timestamp("us")),
    "string": Cell(
        T.StringType(),
        (
            pa.array(["south", "north", "south"]),
            pa.array(["south", "north", "south"], pa.large_string()),
            pa.array(["south", "north", "south"]).dictionary_encode(),
            pa.array(["never", "south", "north", "south"]).dictionary_encode().slice(1),
            pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int8()), pa.array(["north", "south", None])),
        ),
        [1, 0, 1],
        torch.int64,
        ColumnRules(vocabularies={"price": WORDS}),
    ),
    "array of floats": Cell(T.ArrayType(T.FloatType()), lists([[0.5, 1], [2, 3]], pa.float32()), [[0.5, 1], [2, 3]]),
    "array of doubles": Cell(T.ArrayType(T.DoubleType()), lists([[0.5, 1], [2, 3]], pa.float64()), [[0.5, 1], [2, 3]]),
    "array of halves": Cell(T.ArrayType(T.FloatType()), lists([[0.5, 1], [2, 3]], pa.float16()), [[0.5, 1], [2, 3]]),
    "array of decimals": Cell(
        T.ArrayType(T.DecimalType(4, 1)), lists([[Decimal("0.5"), Decimal(1)]], pa.decimal128(4, 1)), [[0.5, 1]]
    ),
    "array of booleans": Cell(T.ArrayType(T.BooleanType()), lists([[True, False]], pa.bool_()), [[1, 0]]),
    "array of ints": Cell(T.ArrayType(T.IntegerType()), lists([[1, 2]], pa.int32()), [[1, 2]], torch.int64),
    "array of ids": Cell(
        T.ArrayType(T.LongType()), lists([[BEYOND_DOUBLES, 2]], pa.int64()), [[BEYOND_DOUBLES, 2]], torch.int64
    ),
    "array of dates": Cell(T.ArrayType(T.DateType()), lists([[DAY, BEFORE]], pa.date32()), [[19782, -1]], torch.int64),
    "array of timestamps": Cell(
        T.ArrayType(T.TimestampType()), lists([[MOMENT, MOMENT]], pa.timestamp("us", "UTC")), [[MICROSECONDS] * 2],
        torch.int64,
    ),
    "array with a shape": Cell(
        T.ArrayType(T.DoubleType()), (pa.array([[1.0, 2, 3, 4], [5, 6, 7, 8]]),), SQUARES, rules=SQUARE
    ),
    "tensors": Cell(
        T.ArrayType(T.DoubleType()),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(1.0, 9).reshape(2, 2, 2)),),
        SQUARES,
        rules=SQUARE,
    ),
    "nested arrays": Cell(
        T.ArrayType(T.ArrayType(T.IntegerType())),
        tuple(pa.array(SQUARES, kind) for kind in (
            pa.list_(pa.list_(pa.int32())), pa.large_list(pa.list_(pa.int64(), 2)), pa.list_(pa.list_(pa.int8(), 2), 2),
        )),
        SQUARES,
        torch.int64,
        SQUARE,
    ),
    "deeply nested arrays": Cell(
        T.ArrayType(T.ArrayType(T.ArrayType(T.FloatType()))),
        (pa.array([SQUARES, SQUARES], pa.list_(pa.list_(pa.list_(pa.float32())))),),
        [SQUARES, SQUARES],
        rules=ColumnRules(shapes={"price": (2, 2, 2)}),
    ),
    "ragged arrays": Cell(
        T.ArrayType(T.LongType()),
        (pa.array([[1], [], [1, 2, 3], [1, 2, 3, 4, 5]]),),
        [[1, -1, -1], [-1, -1, -1], [1, 2, 3], [1, 2, 3]],
        torch.int64,
        ColumnRules(padding={"price": Padding(3, -1, truncate=True)}),
    ),
    "vector": Cell(
        VectorUDT(),
        (vectors([[1, 2], (2, {1: 4.0})]), vectors([(2, {0: 1.0, 1: 2.0}), (2, {1: 4.0})]), vectors([[1, 2], [0, 4]])),
        [[1, 2], [0, 4]],
    ),
    "vector with a shape": Cell(
        VectorUDT(), (vectors([[1, 2, 3, 4], (4, {0: 5.0})]),), [[[1, 2], [3, 4]], [[5, 0], [0, 0]]], rules=SQUARE
    ),
}  # fmt: skip


@pytest.mark.parametrize("staged", [True, False], ids=["staged", "in place"])
@pytest.mark.parametrize("cell", TABLE.values(), ids=TABLE)
def test_every_type_becomes_what_the_table_says(cell: Cell, staged: bool) -> None:
    found = resolve(cell.spark, "input", cell.rules)
    columns = Columns((found,), ())
    for array in cell.arrays:
        for start in (0, 1):  # a slice, too: Arrow's offsets are easily forgotten
            part, expected = array.slice(start), cell.values[start:]
            tensor = round_trip(part, found) if staged else convert(pa.table({"price": part}), columns)["input_0"]
            assert isinstance(tensor, torch.Tensor)
            assert tensor.dtype == cell.dtype, array.type
            assert tensor.tolist() == expected, array.type


@pytest.mark.parametrize("name", [name for name, cell in TABLE.items() if not cell.rules.padding])
def test_inference_sees_the_same_values(name: str) -> None:
    cell = TABLE[name]
    found = replace(resolve(cell.spark, "input", cell.rules), validity="any")
    for array in cell.arrays:
        values = to_array(array, found)
        assert (values[:, None] if values.ndim == 1 and not found.flat else values).tolist() == cell.values


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (pa.array([1, 2**63, 2**64 - 1], pa.uint64()), "int64 cannot hold: .*9223372036854775808.*row 1"),
        (pa.array([1000, 1500, 1], pa.timestamp("ns")), r"timestamp\[us\] cannot hold: .*row 1"),
        (pa.array([0, 2**62, 1], pa.timestamp("s")), r"timestamp\[us\] cannot hold: row 1\."),
    ],
    ids=["uint64", "nanoseconds", "far future"],
)
def test_what_int64_cannot_hold_is_refused_with_the_row(array: pa.Array, wanted: str) -> None:
    message = refusal(array, column("scalar", "int64", flat=True))
    assert re.search(rf"is of Arrow type {re.escape(str(array.type))} and has a value that {wanted}.*Cast", message)


@pytest.mark.parametrize(
    ("array", "given_column", "wanted"),
    [
        (pa.array(["1"]), column("scalar", "int64", flat=True), "string in these rows, but integers"),
        (pa.array([0.5]), column("scalar", "int64", flat=True), "double in these rows, but integers"),
        (pa.array(["1"]), NUMBER, "string in these rows, but numbers"),
        (pa.array([1.0]), ARRAY, "double in these rows, but arrays"),
        (pa.array([[1.0]]), VECTOR, "list<.*> in these rows, but ML vectors"),
        (pa.array([{"a": 1}]), VECTOR, "struct<.*> in these rows, but ML vectors"),
        (pa.array([1.0]), column("text", "int64", vocabulary=WORDS), "double in these rows, but strings"),
    ],
)
def test_rows_of_another_type_than_resolved_are_refused(array: pa.Array, given_column: Column, wanted: str) -> None:
    with pytest.raises(DataError, match=rf"'price' is of Arrow type {wanted} were expected of it.*one schema"):
        convert(pa.table({"price": array}), Columns((given_column,), ()))


def test_a_sparse_vector_with_an_index_beyond_its_size_is_refused() -> None:
    message = refusal(vectors([(2, {1: 1.0}), (2, {2: 1.0}), (2, {})]), VECTOR)
    assert re.search(r"a sparse vector with an index that is not below its size: .*row 1", message)


# ---- in place --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("array", "given_column"),
    [
        (pa.array([1.0, 2.0], pa.float32()), NUMBER),
        (pa.array([1.0, 2.0]), column("scalar", "float64")),
        (pa.array([1, 2]), column("scalar", "int64", flat=True)),
        (pa.array([[1.0, 2.0]], pa.list_(pa.float32())).flatten(), NUMBER),
    ],
)
def test_numbers_are_views_of_arrows_memory(array: pa.Array, given_column: Column) -> None:
    table = pa.table({"price": array})
    tensor = convert(table, Columns((given_column,), ()))["input_0"]
    assert isinstance(tensor, torch.Tensor)
    assert tensor.data_ptr() == array.buffers()[1].address


def test_arrays_and_dense_vectors_are_views_where_the_type_is_the_modules() -> None:
    array = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32()))
    tensor = convert(pa.table({"price": array}), Columns((ARRAY,), ()))["input_0"]
    assert tensor.data_ptr() == array.flatten().buffers()[1].address
    found = vectors([[1.0, 2.0], [3.0, 4.0]])
    tensor = convert(pa.table({"price": found}), Columns((column("vector", "float64"),), ()))["input_0"]
    assert tensor.data_ptr() == found.field("values").flatten().buffers()[1].address


def test_all_columns_are_converted_by_name_also_in_several_chunks_or_without_rows() -> None:
    columns = Columns((VECTOR, Column("id", "input_1", "scalar", "int64", flat=True)), (replace(LABEL, name="class"),))
    first = pa.table({"class": pa.array([1], pa.int32()), "price": vectors([[1, 2]]), "id": [7], "other": ["x"]})
    second = pa.table(
        {"class": pa.array([0], pa.int32()), "price": vectors([(2, {1: 4.0})]), "id": [8], "other": ["y"]}
    )
    both = pa.concat_tables([first, second])
    assert both.column("id").num_chunks == 2
    assert {name: value.tolist() for name, value in convert(both, columns).items()} == {
        "input_0": [[1, 2], [0, 4]], "input_1": [7, 8], "label_0": [1, 0],
    }  # fmt: skip
    empty = convert(both.schema.empty_table(), columns, {"input_0": 2})
    assert {name: tuple(value.shape) for name, value in empty.items()} == {
        "input_0": (0, 2), "input_1": (0,), "label_0": (0,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("array", "given_column", "message"),
    [
        (pa.array([1.0, None]), NUMBER, "is null in 1 of 2 rows; the first: .*row 1.*Drop such rows"),
        (pa.array([1.0, np.nan]), NUMBER, "is NaN or infinite in 1 of 2 rows; the first: .*row 1"),
        (pa.array([1.0, np.inf], pa.float32()), NUMBER, "is NaN or infinite in 1 of 2 rows; the first: .*row 1"),
        (pa.array([1.0, 1e300]), NUMBER, "is NaN or infinite in 1 of 2 rows; the first: .*row 1"),
        (pa.array([1.0, 0.5]), LABEL, r"must hold class numbers .*, but is 0\.5 in a row: .*row 1"),
        (pa.array([Decimal("1.0"), Decimal("0.5")]), LABEL, r"must hold class numbers .*, but is 0\.5 .*row 1"),
        (pa.array([1, -1], pa.int8()), LABEL, "must hold class numbers .*, but is -1 in a row: .*row 1"),
        (pa.array([1, 2**31]), LABEL, r"must hold class numbers .*, but is 2\.14748e\+09 in a row: .*row 1"),
        (pa.array([1.0, -1.0]), WEIGHT, "is negative in a row: .*row 1"),
        (pa.array([[1.0, 2.0], [1.0]]), ARRAY, "has 2 values in earlier rows, but 1 in this one: .*row 1.*set padding"),
        (vectors([[1.0, 2.0], [1.0]]), VECTOR, "has 2 values in earlier rows, but 1 in this one: .*row 1"),
        (pa.array([[1.0], [None]]), ARRAY, "has a null inside an array; the first row: .*row 1"),
    ],
)
def test_values_read_in_place_are_refused_in_the_same_words(
    array: pa.Array, given_column: Column, message: str
) -> None:
    table = pa.table({"price": array, "name": ["row 0", "row 1"]})
    with pytest.raises(DataError, match=f"'price' {message}"):
        convert(table, Columns((given_column,), ()))


def test_finite_values_whose_sum_is_not_pass() -> None:
    values = pa.array([3e38] * 4, pa.float32())
    assert round_trip(values, NUMBER).tolist() == np.float32([[3e38]] * 4).tolist()


# ---- nulls -----------------------------------------------------------------------------------------------------------
def filled(array: pa.Array, given_column: Column, widths: Mapping[str, int] | None = None) -> list[Any]:
    """What a column becomes, in both ways of reading, as lists."""
    columns = Columns((given_column,), ())
    converted = convert(pa.table({"price": array}), columns, widths)["input_0"]
    table, _ = encode(batch_of(array), columns, widths)
    decoded = decode(table, columns)["input_0"]
    assert isinstance(converted, torch.Tensor)
    assert converted.dtype == decoded.dtype == getattr(torch, given_column.dtype)
    assert converted.tolist() == decoded.tolist()
    result: list[Any] = converted.tolist()
    return result


@pytest.mark.parametrize(
    ("array", "given_column", "expected"),
    [
        (pa.array([BEYOND_DOUBLES, None]), column("scalar", "int64", flat=True, nulls=-1), [BEYOND_DOUBLES, -1]),
        (pa.array([7, None], pa.int8()), column("scalar", "int64", flat=True, nulls=2**60), [7, 2**60]),
        (pa.array([7, None], pa.uint64()), column("scalar", "int64", flat=True, nulls=-1), [7, -1]),
        (pa.array([DAY, None]), column("scalar", "int64", flat=True, nulls=0.0), [19782, 0]),
        (pa.array([MOMENT, None]), column("scalar", "int64", flat=True, nulls=5), [MICROSECONDS, 5]),
        (pa.array([True, None]), column("scalar", nulls=0.5), [[1], [0.5]]),
        (pa.array([7, None], pa.int8()), column("scalar", nulls=1000.5), [[7], [1000.5]]),
        (pa.array([1.5, None], pa.float32()), column("scalar", "float64", nulls=0.1), [[1.5], [0.1]]),
        (pa.array([Decimal("1.5"), None]), column("scalar", nulls=-1), [[1.5], [-1]]),
        (pa.array([1.0, None]), replace(LABEL, field="input_0", nulls=3), [1, 3]),
        (pa.array(["south", None, "south"]), column("text", "int64", flat=True, vocabulary=WORDS, nulls=3), [1, 3, 1]),
        (pa.array([None, None], pa.string()), column("text", "int64", flat=True, vocabulary=WORDS, nulls=0), [0, 0]),
        (
            pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array(["south", None])),
            column("text", "int64", flat=True, vocabulary=WORDS, nulls=9),
            [1, 9, 9],
        ),
        (
            pa.DictionaryArray.from_arrays(pa.array([1, None, 1]), pa.array(["a word that no row holds", "south"])),
            column("text", "int64", flat=True, vocabulary=WORDS, nulls=0),
            [1, 0, 1],
        ),
        (pa.array([None, [1, None], [None, BEYOND_DOUBLES]]), column("array", "int64", nulls=-1),
         [[-1, -1], [1, -1], [-1, BEYOND_DOUBLES]]),
        (pa.array([None, [1], [None, 2, 3]]), column("array", nulls=9, padding=Padding(2, 0.5, truncate=True)),
         [[9, 9], [1, 0.5], [9, 2]]),
        (pa.array([[[1.0, None]], None, [None]]), column("array", nulls=7, shape=(1, 2)),
         [[[1, 7]], [[7, 7]], [[7, 7]]]),
        (vectors([None, [1, 2], (2, {1: 4.0})]), column("vector", nulls=-1), [[-1, -1], [1, 2], [0, 4]]),
    ],
)  # fmt: skip
def test_a_number_replaces_nulls(array: pa.Array, given_column: Column, expected: list[Any]) -> None:
    assert filled(array, given_column) == expected


@pytest.mark.parametrize(
    ("array", "kind"), [(pa.array([None], pa.list_(pa.float32())), "array"), (vectors([None]), "vector")]
)
def test_rows_that_are_all_null_take_the_width_that_is_known(array: pa.Array, kind: str) -> None:
    assert filled(array, column(kind, nulls=2), {"input_0": 3}) == [[2, 2, 2]]
    assert filled(array, column(kind, nulls=2, shape=(1, 2))) == [[[2, 2]]]
    with pytest.raises(DataError, match=r"'price' is null in all of 1 rows, .*with 2. Declare shapes={'price': ...}"):
        filled(array, column(kind, nulls=2))


def test_messages_name_the_right_row_behind_nulls() -> None:
    values = pa.array([None, [1.0, 2.0], None, [3.0, np.nan], [1.0, 1.0]])
    assert re.search(
        r"is NaN or infinite in 1 of 5 rows; the first: .*row 3", refusal(values, column("array", nulls=0))
    )
    ragged = pa.array([None, [1.0, 2.0], None, [3.0]])
    assert re.search(r"has 2 values in .* but 1 in this one: .*row 3", refusal(ragged, column("array", nulls=0)))
    words = pa.array([None, "north", "west"])
    text = column("text", "int64", vocabulary=WORDS, nulls=0)
    assert re.search(
        r"holds the word 'west', which is not among the 3 of its vocabulary: .*row 2", refusal(words, text)
    )


DROPPED = Columns(
    (
        column("scalar", nulls="drop"),
        column("array", field="input_1", nulls="drop"),
        column("vector", field="input_2", nulls="drop"),
        column("assembled", field="input_3", nulls="drop", parts=("a", "b")),
        column("text", "int64", field="input_4", nulls="drop"),
        column("scalar", field="input_5"),
    ),
    (),
)


def test_rows_with_nulls_are_dropped_before_anything_else() -> None:
    rows = 8
    batch = pa.RecordBatch.from_pydict(
        {
            "input_0": pa.array([None, *range(1, rows)], pa.int8()),
            "input_1": pa.array([[1.0], None, [None], *[[2.0]] * 5]),
            "input_2": vectors([*[[1.0]] * 3, None, *[(1, {})] * 4]),
            "input_3": pa.array([{"a": 1, "b": None if row == 4 else 2} for row in range(rows)]),
            "input_4": pa.array(["x" if row != 5 else None for row in range(rows)]).dictionary_encode(),
            "input_5": pa.array([None] * rows, pa.float32()),
            "shard": pa.array(range(rows)),
        }
    )
    assert drop_null_rows(batch, DROPPED).column("shard").to_pylist() == [6, 7]
    full = batch.slice(6)
    assert drop_null_rows(full, DROPPED) is full
    table = pa.table(
        {
            "n": batch.column("input_0"), "list": batch.column("input_1"), "vector": batch.column("input_2"),
            "a": pa.array([1] * rows), "b": batch.column("input_3").field("b"), "word": batch.column("input_4"),
            "other": batch.column("input_5"),
        }
    )  # fmt: skip
    names = ("n", "list", "vector", "assembled", "word", "other")
    native = Columns(tuple(replace(one, name=name) for one, name in zip(DROPPED.inputs, names, strict=True)), ())
    mask = keep_mask(table, native)
    assert mask is not None
    assert mask.tolist() == [False] * 6 + [True] * 2
    assert keep_mask(table.slice(6), native) is None


def test_null_elements_drop_rows_of_nested_arrays_too() -> None:
    nested = Columns((column("array", nulls="drop", shape=(1, 2)),), ())
    rows = pa.array([[[1, 2]], None, [[1, None]], [None], [[3, 4]]])
    assert drop_null_rows(batch_of(rows), nested).column("input_0").to_pylist() == [[[1, 2]], [[3, 4]]]


# ---- shapes and padding ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "given_column", "found"),
    [
        (pa.array([[1.0] * 4, [1.0] * 3]), column("array", shape=(2, 2)), "4 values are expected .*, but there are 3"),
        (vectors([[1.0] * 4, [1.0] * 3]), column("vector", shape=(4,)), "4 values are expected in a row, .* are 3"),
        (pa.array([[[1.0, 2]], [[1.0], [2.0]]]), column("array", shape=(1, 2)), "1 values .* at one of .* are 2"),
        (pa.array([[[1.0, 2]], [[1.0]]]), column("array", shape=(1, 2)), "2 values .* at one of its levels, .* are 1"),
    ],
)  # fmt: skip
def test_rows_of_another_shape_are_refused(values: pa.Array, given_column: Column, found: str) -> None:
    message = refusal(values, given_column)
    assert re.search(
        rf"is declared with shape \(.*\), so that {found} in this one: .*row 1.*Declare the shape", message
    )


def test_rows_longer_than_their_padding_are_refused() -> None:
    message = refusal(pa.array([[1.0], [1.0, 2.0, 3.0]]), column("array", padding=Padding(2)))
    assert re.search(r"has 3 values in a row, more than the 2 of its padding: .*row 1.*truncate=True", message)


def test_shapes_travel_through_staged_data() -> None:
    square = column("array", shape=(2, 2))
    table, widths = encode(batch_of(pa.array([[1.0, 2, 3, 4]])), Columns((square,), ()))
    assert widths == {"input_0": 4}
    assert decode(table.slice(1), Columns((square,), ()))["input_0"].shape == (0, 2, 2)


# ---- words, raw and assembled columns --------------------------------------------------------------------------------
TEXT = column("text", "int64", flat=True)


def test_words_are_staged_as_they_are_until_they_have_numbers() -> None:
    table, widths = encode(batch_of(pa.array(["south", "east"])), Columns((TEXT,), ()))
    assert table.column("input_0").to_pylist() == ["south", "east"]
    assert widths == {}
    known = Columns((replace(TEXT, vocabulary=WORDS),), ())
    assert decode(table, known)["input_0"].tolist() == [1, 2]
    with pytest.raises(DataError, match=r"'price' holds the word 'south', which is not among the 1 .*: row 0.*Add it"):
        decode(table, Columns((replace(TEXT, vocabulary=("east",)),), ()))
    with_nulls = Columns((replace(TEXT, nulls=7),), ())
    table, _ = encode(batch_of(pa.array(["south", None])), with_nulls)
    assert table.schema.field("input_0").nullable
    assert decode(table, Columns((replace(TEXT, nulls=7, vocabulary=WORDS),), ()))["input_0"].tolist() == [1, 7]


@pytest.mark.parametrize("array", [pa.array(["north", None]), pa.array(["north", None]).dictionary_encode()])
def test_null_words_are_refused(array: pa.Array) -> None:
    for given_column in (TEXT, replace(TEXT, vocabulary=WORDS)):
        assert re.search(r"is null in 1 of 2 rows; the first: .*row 1", refusal(array, given_column))


RAW = column("raw", "", validity="any")


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        (T.StringType(), pa.array(["a", "None"])),
        (T.BinaryType(), pa.array([b"\x00", b""])),
        (T.ArrayType(T.StringType()), pa.array([["a", None], []])),
        (T.MapType(T.StringType(), T.DoubleType()), pa.array([[("a", 1.0)], []], pa.map_(pa.string(), pa.float64()))),
        (T.ArrayType(T.ArrayType(T.FloatType())), pa.array([[[1.0]], [[1.0], []]])),
    ],
)
def test_what_only_a_transform_can_read_stays_in_arrow(kind: T.DataType, array: pa.Array) -> None:
    rules = ColumnRules(transform=True)
    for role in ("input", "target"):
        assert resolve(kind, role, rules) == RAW
    columns = Columns((RAW,), ())
    assert convert(pa.table({"price": array}), columns)["input_0"].equals(array)
    table, widths = encode(batch_of(array), columns)
    assert decode(table, columns)["input_0"].equals(array)
    assert widths == {}
    missing = pa.array([array[0].as_py(), None], array.type)
    assert re.search(r"is null in 1 of 2 rows; the first: .*row 1", refusal(missing, RAW))
    with pytest.raises(DataError, match="'price' is null in 1 of 2 rows"):
        convert(pa.table({"price": missing}), columns)


def test_with_a_transform_numbers_are_tensors_and_structs_still_refused() -> None:
    rules = ColumnRules(transform=True)
    assert resolve(T.DoubleType(), "input", rules) == resolve(T.DoubleType(), "input")
    assert resolve(T.StringType(), "class", rules) == RAW
    for kind in (T.StructType([]), T.MapType(T.StringType(), T.StructType([]))):
        with pytest.raises(ConfigError, match=r"has type .*struct<>.*; use"):
            resolve(kind, "input", rules)


PARTS = {"a": T.IntegerType(), "b": T.DoubleType(), "c": T.BooleanType(), "d": T.DecimalType(4, 1)}


def test_assembled_columns_are_their_parts() -> None:
    rules = ColumnRules(assemble={"price": ("a", "b", "c", "d")})
    found = resolve_column(
        Named(**PARTS), "price", field="input_0", param="featuresCol", floating="float32", role="input", rules=rules
    )
    assert found == column("assembled", parts=("a", "b", "c", "d"))
    values = {
        "a": pa.array([1, 2], pa.int32()), "b": pa.array([0.5, 1.5]), "c": pa.array([True, False]),
        "d": pa.array([Decimal("2.5"), Decimal("3.5")]),
    }  # fmt: skip
    columns = Columns((found,), ())
    parts = convert(pa.table(values), columns)["input_0"]
    assert isinstance(parts, tuple)
    assert all(part.shape == (2,) for part in parts)
    assert [part.dtype for part in parts] == [torch.float32, torch.float64, torch.float32, torch.float64]
    assert parts[1].data_ptr() == values["b"].buffers()[1].address
    window = torch.empty(2, 4)
    assert torch.stack(parts, 1, out=window).tolist() == [[1, 0.5, 1, 2.5], [2, 1.5, 0, 3.5]]
    struct = pa.StructArray.from_arrays(list(values.values()), list(values))
    assert round_trip(struct, found).tolist() == window.tolist()
    assert to_array(struct.slice(1), found).tolist() == window.tolist()[1:]
    shaped = replace(found, shape=(2, 2))
    assert convert(pa.table(values), Columns((shaped,), ()))["input_0"].tolist() == window.reshape(2, 2, 2).tolist()
    assert round_trip(struct, shaped).tolist() == window.reshape(2, 2, 2).tolist()


@pytest.mark.parametrize(("role", "dtype"), [("input", "int64"), ("target", "int64"), ("number", "float32")])
def test_assembled_integers_stay_integers(role: Role, dtype: str) -> None:
    rules = ColumnRules(assemble={"price": ("a", "id")})
    found = resolve(T.StringType(), role, rules, a=T.ByteType())  # whatever else is called price
    assert found == column("assembled", dtype, parts=("a", "id"))
    parts = convert(pa.table({"a": pa.array([1], pa.int8()), "id": [BEYOND_DOUBLES]}), Columns((found,), ()))["input_0"]
    assert isinstance(parts, tuple)
    assert [part.dtype for part in parts] == [getattr(torch, dtype)] * 2
    if dtype == "int64":
        assert [part.item() for part in parts] == [1, BEYOND_DOUBLES]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (pa.array([1.0, None]), r"'b' is null in 1 of 2 rows; the first: .*row 1.*nulls={'price': 'drop'}"),
        (pa.array([1.0, np.nan]), r"'b' is NaN or infinite in 1 of 2 rows; the first: .*row 1"),
        (pa.array([1.0, -1e300]), r"'b' is NaN or infinite in 1 of 2 rows; the first: .*row 1"),
        (pa.array([1.0, np.inf], pa.float32()), r"'b' is NaN or infinite in 1 of 2 rows; the first: .*row 1"),
        (pa.array(["x", "y"]), r"'b' is of Arrow type string"),
    ],
)
def test_a_bad_part_is_named(bad: pa.Array, message: str) -> None:
    given_column = column("assembled", parts=("a", "b"))
    table = pa.table({"a": [1.0, 2.0], "b": bad, "name": ["row 0", "row 1"]})
    with pytest.raises(DataError, match=message):
        convert(table, Columns((given_column,), ()))
    struct = pa.StructArray.from_arrays([pa.array([1.0, 2.0]), bad], ["a", "b"])
    with pytest.raises(DataError, match=message):
        encode(batch_of(struct, name=pa.array(["row 0", "row 1"])), Columns((given_column,), ()))


def test_nulls_of_parts_are_filled() -> None:
    given_column = column("assembled", parts=("a", "b"), nulls=0.25)
    table = pa.table({"a": pa.array([None, 2], pa.int64()), "b": pa.array([1.0, None])})
    parts = convert(table, Columns((given_column,), ()))["input_0"]
    assert isinstance(parts, tuple)
    assert [part.tolist() for part in parts] == [[0.25, 2], [1, 0.25]]


# ---- rules that do not suit ------------------------------------------------------------------------------------------
def test_rules_become_the_columns() -> None:
    array = T.ArrayType(T.IntegerType())
    padding = Padding(4, -1)
    rules = ColumnRules(nulls={"price": 0, "other": 7}, padding={"price": padding}, shapes={"price": (2, 2)})
    assert resolve(array, "input", rules) == column("array", "int64", nulls=0, padding=padding, shape=(2, 2))
    assert resolve(T.LongType(), "input", ColumnRules(nulls={"other": 0.5})).nulls == "error"
    assert resolve(T.LongType(), "class", ColumnRules(nulls="drop")).nulls == "drop"
    assert resolve(T.StringType(), "class", ColumnRules(vocabularies={"price": None})) == TEXT


@pytest.mark.parametrize(
    ("kind", "rules", "message"),
    [
        (T.LongType(), ColumnRules(nulls=0.5), r"nulls\['price'\]=0.5 replaces nulls, but 'price' becomes int64"),
        (T.LongType(), ColumnRules(nulls=2**63), "becomes int64. Give a number of this type"),
        (T.DoubleType(), ColumnRules(nulls=float("nan")), "replaces nulls, but 'price' becomes float32"),
        (T.DoubleType(), ColumnRules(nulls=1e300), "replaces nulls, but 'price' becomes float32"),
        (T.DoubleType(), ColumnRules(nulls=True), r"nulls\['price'\]=True replaces nulls"),
        (T.DoubleType(), ColumnRules(nulls="mean"), "is 'mean'. It is 'error', 'drop' or a number"),  # type: ignore[arg-type]
        (T.StringType(), ColumnRules(nulls=0, transform=True), "=0 cannot replace its nulls. Use 'error' or 'drop'"),
        (T.StringType(), ColumnRules(nulls=-1, vocabularies={"price": None}), "Give a number not below 0"),
        (T.DoubleType(), ColumnRules(shapes={"price": (2,)}), "whose rows have no shape. Remove 'price' from shapes"),
        (VectorUDT(), ColumnRules(shapes={"price": (2, 0)}), r"shapes\['price'\] is \(2, 0\). Give the lengths"),
        (VectorUDT(), ColumnRules(shapes={"price": ()}), r"shapes\['price'\] is \(\). Give the lengths"),
        (VectorUDT(), ColumnRules(padding={"price": Padding(3)}), "arrays of numbers that are not nested"),
        (T.ArrayType(T.ArrayType(T.LongType())), replace(SQUARE, padding={"price": Padding(4)}), "that are not nested"),
        (T.ArrayType(T.LongType()), ColumnRules(padding={"price": Padding(0)}), "a length of at least 1"),
        (T.ArrayType(T.LongType()), replace(SQUARE, padding={"price": Padding(3)}), "the length 4 of its shape"),
        (T.ArrayType(T.LongType()), ColumnRules(padding={"price": Padding(3, 0.5)}), "fills up with 0.5, but 'price'"),
        (T.LongType(), ColumnRules(vocabularies={"price": None}), "a vocabulary is for strings. Remove 'price'"),
        (T.StringType(), ColumnRules(vocabularies={"price": ()}), r"vocabularies\['price'\] is empty"),
        (T.StringType(), ColumnRules(vocabularies={"price": ("a", "a")}), "holds a word twice"),
        (T.StringType(), ColumnRules(vocabularies={"price": ("a", 1)}), "holds 1. Give every string"),  # type: ignore[dict-item]
        (T.LongType(), ColumnRules(assemble={"price": ()}), "is assembled from no columns. Name at least one"),
        (T.LongType(), ColumnRules(assemble={"price": ("id", "id")}), "is assembled from id, id. Name .* each once"),
        (T.LongType(), ColumnRules(assemble={"price": ("x",)}), "'x', which is not a column. There are id, price"),
        (VectorUDT(), ColumnRules(assemble={"price": ("price",)}), "'price' of type .*Assemble numbers and booleans"),
        (
            T.LongType(),
            ColumnRules(assemble={"price": ("id",)}, shapes={"price": (2,)}),
            r"is assembled from 1 columns, which shapes\['price'\]=\(2,\) cannot hold",
        ),
    ],
)  # fmt: skip
def test_a_rule_that_does_not_suit_the_type_is_refused(kind: T.DataType, rules: ColumnRules, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(kind, "input", rules)


@pytest.mark.parametrize(("role", "bad"), [("class", -1), ("class", 0.5), ("weight", -0.5)])
def test_what_replaces_null_labels_and_weights_must_be_valid(role: Role, bad: Nulls) -> None:
    with pytest.raises(ConfigError, match="Give a number not below 0 of this type"):
        resolve(T.DoubleType(), role, ColumnRules(nulls=bad))


@pytest.mark.parametrize(
    "rules",
    [
        ColumnRules(nulls={"cost": "drop"}),
        ColumnRules(padding={"cost": Padding(3)}),
        ColumnRules(shapes={"cost": (3,)}),
        ColumnRules(vocabularies={"cost": None}),
        ColumnRules(assemble={"cost": ("a",)}),
    ],
)
def test_rules_for_no_column_are_refused(rules: ColumnRules) -> None:
    check_rules(rules, ["price", "cost"])
    check_rules(ColumnRules(nulls="drop"), [])
    with pytest.raises(ConfigError, match=r"has an entry for 'cost', but only price, label are read\. Remove"):
        check_rules(rules, ["price", "label"])


# ---- random arrays against a slow oracle -----------------------------------------------------------------------------
NUMBERS = {
    pa.int8(): st.integers(-128, 127),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): st.floats(-1000, 1000, width=32),
    pa.float64(): st.floats(-1000, 1000, width=32),
    pa.bool_(): st.booleans(),
}


def plain(value: Any, fill: float) -> Any:
    return fill if value is None else value


@given(data=st.data(), kind=st.sampled_from(list(NUMBERS)), fill=st.integers(-(2**40), 2**40))
@settings(deadline=None, max_examples=60)
def test_random_numbers_with_nulls_are_what_a_loop_makes_of_them(
    data: st.DataObject, kind: pa.DataType, fill: int
) -> None:
    rows = data.draw(st.lists(st.none() | NUMBERS[kind], min_size=1, max_size=12))
    dtype = "int64" if pa.types.is_integer(kind) else "float64"
    start = data.draw(st.integers(0, len(rows) - 1))
    found = filled(pa.array(rows, kind).slice(start), column("scalar", dtype, flat=True, nulls=fill))
    assert found == [plain(value, fill) for value in rows[start:]]


@given(data=st.data(), kind=st.sampled_from(list(NUMBERS)), length=st.integers(1, 4), large=st.booleans())
@settings(deadline=None, max_examples=60)
def test_random_ragged_arrays_are_what_a_loop_makes_of_them(
    data: st.DataObject, kind: pa.DataType, length: int, large: bool
) -> None:
    row = st.none() | st.lists(st.none() | NUMBERS[kind], max_size=6)
    rows = data.draw(st.lists(row, min_size=1, max_size=8))
    start = data.draw(st.integers(0, len(rows) - 1))
    given_column = column(
        "array",
        "int64" if pa.types.is_integer(kind) else "float64",
        nulls=5,
        padding=Padding(length, -7, truncate=True),
    )
    array = pa.array(rows, pa.large_list(kind) if large else pa.list_(kind)).slice(start)
    expected = [
        [5] * length if row is None else ([plain(value, 5) for value in row] + [-7] * length)[:length]
        for row in array.to_pylist()
    ]
    assert filled(array, given_column) == expected


@given(data=st.data(), kind=st.sampled_from(list(NUMBERS)), height=st.integers(1, 3), width=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_random_nested_arrays_are_what_a_loop_makes_of_them(
    data: st.DataObject, kind: pa.DataType, height: int, width: int
) -> None:
    line = st.none() | st.lists(st.none() | NUMBERS[kind], min_size=width, max_size=width)
    square = st.none() | st.lists(line, min_size=height, max_size=height)
    rows = data.draw(st.lists(square, min_size=1, max_size=6))
    dtype = "int64" if pa.types.is_integer(kind) else "float64"
    found = filled(pa.array(rows, pa.list_(pa.list_(kind))), column("array", dtype, nulls=5, shape=(height, width)))
    assert found == [
        [[plain(value, 5) for value in plain(line, [5] * width)] for line in plain(row, [[5] * width] * height)]
        for row in rows
    ]
    kept = [row for row in rows if row and all(line and None not in line for line in row)]
    dropping = Columns((column("array", dtype, nulls="drop", shape=(height, width)),), ())
    batch = drop_null_rows(batch_of(pa.array(rows, pa.list_(pa.list_(kind)))), dropping)
    assert batch.column("input_0").to_pylist() == kept


@given(words=st.lists(st.none() | st.sampled_from(WORDS), max_size=12), encoded=st.booleans())
@settings(deadline=None, max_examples=40)
def test_random_words_are_what_a_loop_makes_of_them(words: list[str | None], encoded: bool) -> None:
    array = pa.array(words, pa.string())
    found = filled(array.dictionary_encode() if encoded else array, replace(TEXT, vocabulary=WORDS, nulls=3))
    assert found == [3 if word is None else WORDS.index(word) for word in words]
