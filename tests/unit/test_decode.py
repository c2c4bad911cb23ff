"""The user's function on columns: what it is given, what must come back, and where its random numbers come from."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sparkdl.config import Column, Columns
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.convert import SparseRows, convert
from sparkdl.io.decode import Decoder, apply_transform, draws_random_numbers, layout_of, stacked
from sparkdl.io.feed import RowMemory, WindowPool
from sparkdl.io.plan import Piece, RowGroup

COLUMNS = Columns(
    inputs=(
        Column("picture", "input_0", "raw", ""),
        Column("sizes", "input_1", "assembled", "float32", parts=("width", "height")),
    ),
    labels=(Column("kind", "label_0", "scalar", "int64", flat=True, validity="class"),),
)
TABLE = pa.table(
    {
        "picture": pa.array([b"ab", b"cd", b"ef"]),
        "width": pa.array([1.0, 2.0, 3.0], pa.float32()),
        "height": pa.array([4.0, 5.0, 6.0], pa.float32()),
        "kind": pa.array([0, 1, 1]),
    }
)


def letters(columns: dict[str, Any]) -> dict[str, Any]:
    """Bytes to numbers; leaves the rest as it was."""
    assert isinstance(columns["picture"], pa.Array)
    return {"picture": torch.tensor([list(cell) for cell in columns["picture"].to_pylist()])}


def noise(columns: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {"picture": torch.rand(len(columns["picture"]), 2, generator=generator)}


def piece(path: str = "a/part-0.parquet", index: int = 0, start: int = 0) -> Piece:
    return Piece(RowGroup(path, index, 10), start, start + 3)


def test_a_transform_gets_tensors_and_arrow_arrays_by_the_users_names() -> None:
    values = Decoder(COLUMNS, letters, native=True)(TABLE)
    assert values["input_0"].tolist() == [[97, 98], [99, 100], [101, 102]]
    assert values["input_1"].tolist() == [[1, 4], [2, 5], [3, 6]]
    assert values["label_0"].tolist() == [0, 1, 1]
    assert layout_of(values, COLUMNS) == {
        "input_0": ("int64", (2,)),
        "input_1": ("float32", (2,)),
        "label_0": ("int64", ()),
    }


def test_without_a_transform_the_parts_of_an_assembled_column_stay_apart() -> None:
    columns = Columns(inputs=COLUMNS.inputs[1:], labels=COLUMNS.labels)
    values = Decoder(columns, native=True)(TABLE)
    assert [part.tolist() for part in values["input_1"]] == [[1, 2, 3], [4, 5, 6]]
    assert layout_of(values, columns) == {"input_1": ("float32", (2,)), "label_0": ("int64", ())}


def vectors(values: list[list[float]]) -> pa.Table:
    """Sparse vectors of size 8 that store their values from index 2 on; the last one is dense."""
    rows: list[dict[str, Any]] = [
        {"type": 0, "size": 8, "indices": [2 + place for place in range(len(row))], "values": row} for row in values
    ]
    rows.append({"type": 1, "size": None, "indices": None, "values": [float(place) for place in range(8)]})
    numbers, kind = (
        pa.list_(pa.float64()),
        [("type", pa.int8()), ("size", pa.int32()), ("indices", pa.list_(pa.int32()))],
    )
    return pa.table({"vector": pa.array(rows, pa.struct([*kind, ("values", numbers)]))})


@pytest.mark.parametrize("shape", [(), (2, 4)])
def test_sparse_vectors_are_spread_out_where_they_are_to_lie(shape: tuple[int, ...]) -> None:
    columns = Columns((Column("vector", "input_0", "vector", "float32", shape=shape),), ())
    table = vectors([[1.5], [], [2.0, -3.0], [], []]).slice(1)
    values = Decoder(columns, native=True)(table)
    layout = layout_of(values, columns)
    expected = convert(table, columns)["input_0"]
    assert isinstance(values["input_0"], SparseRows)
    assert layout == {"input_0": ("float32", shape or (8,))}
    memory = RowMemory(7, layout, WindowPool(layout, 7).allocate, {"input_0": "vector"})
    memory.prepare()["input_0"].fill_(9)
    memory.write(1, values)
    assert memory.tensors["input_0"][1:6].equal(expected)
    assert memory.tensors["input_0"][[0, 6]].eq(9).all()
    assert stacked(values, columns)["input_0"].equal(expected)
    doubled = Decoder(columns, lambda given: {"vector": given["vector"] * 2}, native=True)(table)
    assert doubled["input_0"].equal(expected * 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_a_sparse_vector_that_is_not_finite_is_refused(bad: float) -> None:
    columns = Columns((Column("vector", "input_0", "vector", "float32"),), ())
    with pytest.raises(DataError, match=r"'vector' is NaN or infinite in 2 of 6 rows; the first: .*\[2, 3\]"):
        Decoder(columns, native=True)(vectors([[], [1.0, bad], [], [bad], []]))


def test_random_transforms_draw_from_seed_epoch_and_rows() -> None:
    def drawn(seed: int = 0, epoch: int = 0, where: Piece | None = None) -> list[Any]:
        values = Decoder(COLUMNS, noise, native=True, seed=seed)(TABLE, where or piece(), epoch)
        found = values["input_0"]
        assert isinstance(found, torch.Tensor)
        return found.flatten().tolist()

    assert drawn() == drawn()
    # The directory may have another name in the next run; the file in it has not.
    assert drawn(where=piece("b/part-0.parquet")) == drawn()
    others = [drawn(seed=1), drawn(epoch=1), drawn(where=piece(index=1)), drawn(where=piece(start=3))]
    assert all(other != drawn() for other in others)


@pytest.mark.parametrize(
    ("function", "random"),
    [
        (letters, False),
        (noise, True),
        (lambda columns, generator=None: columns, False),
        (lambda *columns: columns, False),
        (dict, False),
    ],
)
def test_a_second_argument_asks_for_random_numbers(function: Any, random: bool) -> None:
    assert draws_random_numbers(function) == random
    assert Decoder(COLUMNS, function).is_random == random


GIVEN = {"x": torch.zeros(3, 2), "text": pa.array(["a", "b", "c"])}


def test_numpy_arrays_are_taken_too() -> None:
    made = apply_transform(lambda columns: {"text": np.ones((3, 4), np.float32)}, GIVEN, 3)
    assert made["text"].shape == (3, 4)
    assert made["x"] is GIVEN["x"]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, r"returned a NoneType\. Return a dict"),
        ({}, r"left 'text' as a \w*Array, but a module needs a tensor\. Return \{'text': tensor of 3 rows\}"),
        ({"text": torch.zeros(2)}, r"given 3 rows and returned 'text' of shape \(2,\).*as many rows"),
        ({"text": torch.tensor(1.0)}, r"returned 'text' of shape \(\)"),
    ],
)
def test_what_comes_back_must_fit(result: Mapping[str, Any] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_transform(lambda columns: result, GIVEN, 3)


def test_an_error_of_the_function_is_told_with_its_columns() -> None:
    with pytest.raises(DataError, match=r"transform failed on 3 rows of x, text: KeyError: 'colour'"):
        apply_transform(lambda columns: {"x": columns["colour"]}, GIVEN, 3)
