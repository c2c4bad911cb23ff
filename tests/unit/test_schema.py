"""Columns on their way to tensors: what is taken, what it becomes, and how the rest is refused."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import types as T

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.schema import decode, encode, resolve_column, row_bytes, to_array

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


def test_an_array_of_booleans_becomes_floats() -> None:
    assert round_trip(pa.array([[True, False], [False, True]]), ARRAY).tolist() == [[1, 0], [0, 1]]


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
    assert row_bytes(columns, widths) == 2 * 4 + 8 + 8 + 4


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
    kinds = {"vector": vectors([]).type, "array": pa.list_(pa.float64()), "scalar": pa.float64()}
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


def resolve(spark_type: T.DataType, role: str, *, floating: str = "float32") -> Column:
    """The column ``price`` of a DataFrame in which it has this type."""
    df: Any = Named(id=T.LongType(), price=spark_type)
    return resolve_column(df, "price", field="input_0", param="featuresCol", floating=floating, role=role)  # type: ignore[arg-type]


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
        (T.StringType(), "string", "StringIndexer"),
        (T.StructType([T.StructField("a", T.DoubleType())]), "struct<a:double>", "fields as columns of their own"),
        (T.TimestampType(), "timestamp", "hour, day of week"),
        (T.TimestampNTZType(), "timestamp_ntz", "hour, day of week"),
        (T.DateType(), "date", "hour, day of week"),
        (T.BinaryType(), "binary", "an ML Vector, an array of numbers, or a number"),
        (T.NullType(), "void", "an ML Vector, an array of numbers, or a number"),
        (T.MapType(T.StringType(), T.DoubleType()), "map<string,double>", "an ML Vector, an array of numbers"),
        (T.DayTimeIntervalType(), "interval day to second", "an ML Vector, an array of numbers"),
        (T.ArrayType(T.StringType()), "array<string>", "an array of numbers"),
        (T.ArrayType(T.ArrayType(T.DoubleType())), "array<array<double>>", "an array of numbers"),
        (T.ArrayType(T.DecimalType(10, 2)), "array<decimal(10,2)>", "an array of numbers"),
    ],
    ids=lambda value: value.simpleString() if isinstance(value, T.DataType) else "",
)
@pytest.mark.parametrize("role", ["input", "target"])
def test_other_types_are_refused_with_the_way_out(kind: T.DataType, found: str, advice: str, role: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"featuresCol='price' has type {re.escape(found)}; use .*{re.escape(advice)}"
    ):
        resolve(kind, role)


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
    df: Any = Named(id=T.LongType(), price=T.DoubleType())
    with pytest.raises(ConfigError, match=r"labelCol='cost' is not a column\. The DataFrame has id, price\."):
        resolve_column(df, "cost", field="label_0", param="labelCol", floating="float32", role="class")
