"""Columns that Petastorm's codecs wrote: images and NumPy arrays in binary cells, described by a Unischema."""

import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sparkdl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from petastorm.unischema import Unischema, UnischemaField
    from pyspark.sql.types import DataType

__all__ = ["UNISCHEMA_KEY", "as_lists", "coded_fields", "decode_unischema", "field_type", "load_unischema"]

UNISCHEMA_KEY = b"dataset-toolkit.unischema.v1"  # where Petastorm keeps it in _common_metadata
Array = npt.NDArray[Any]


def load_unischema(asked: Any, stored: bytes | None, where: str) -> "Unischema":
    """The Unischema that a user gave, or the one in a data set's metadata.

    Args:
        asked: A Unischema, or ``"stored"``.
        stored: The data set's pickled Unischema, if it has one.
        where: The data set, for messages.

    Raises:
        ConfigError: ``asked`` is neither, or there is none in the data set.
        DataError: The stored one cannot be unpickled.
    """
    if asked != "stored":
        if not isinstance(getattr(asked, "fields", None), Mapping):
            raise ConfigError(f"unischema={asked!r} is neither a petastorm.unischema.Unischema nor 'stored'.")
        return asked
    if stored is None:
        raise ConfigError(
            f"unischema='stored', but {where} has no Unischema in a _common_metadata file. Give the Unischema object "
            "by which it was written."
        )
    from petastorm.etl.legacy import depickle_legacy_package_name_compatible

    try:
        return depickle_legacy_package_name_compatible(stored)
    except Exception as error:  # a pickle can fail with anything
        raise DataError(
            f"The Unischema in the metadata of {where} cannot be unpickled: {error}. Give the Unischema object by "
            "which the data set was written."
        ) from error


def coded_fields(unischema: "Unischema", names: Iterable[str]) -> dict[str, "UnischemaField"]:
    """The fields among some columns whose cells a codec has to decode; scalars are stored as they are."""
    from petastorm.codecs import ScalarCodec

    found = {}
    for name in names:
        described = unischema.fields.get(name)
        if described is not None and described.codec is not None and not isinstance(described.codec, ScalarCodec):
            found[name] = described
    return found


def field_type(described: "UnischemaField") -> "DataType":
    """What Spark would call the decoded values of one row.

    An array of numbers where the shape is stated, of floats for images, because that is what modules compute with;
    else binary: such cells are left as they are, for a transform to decode.
    """
    from petastorm.codecs import CompressedImageCodec
    from pyspark.sql import types as T

    dtype = np.dtype(described.numpy_dtype)
    if None in described.shape or dtype.kind not in "biuf":
        return T.BinaryType()
    if isinstance(described.codec, CompressedImageCodec) or (dtype.kind == "f" and dtype.itemsize <= 4):
        return T.ArrayType(T.FloatType(), containsNull=False)
    if dtype.kind == "f":
        return T.ArrayType(T.DoubleType(), containsNull=False)
    return T.ArrayType(T.IntegerType() if dtype.itemsize <= 2 else T.LongType(), containsNull=False)


def decode_unischema(
    table: pa.Table, fields: Mapping[str, "UnischemaField"], names: Iterable[str]
) -> dict[str, Array | list[Array | None]]:
    """Decode the cells of some columns.

    Args:
        table: Rows as read from Parquet.
        fields: As `coded_fields` returns them.
        names: The columns to decode.

    Returns:
        For each column one array of shape (rows, *shape) where the Unischema states the shape, else one array per row.

    Raises:
        DataError: A cell that cannot be decoded, or that has another shape or type than the Unischema says.
    """
    decoded: dict[str, Array | list[Array | None]] = {}
    for name in names:
        described = fields[name]
        decode = _decoder(described)
        cells = table.column(name).to_pylist()
        if None in described.shape:
            decoded[name] = [
                None if cell is None else _cell(described, decode, cell, row) for row, cell in enumerate(cells)
            ]
            continue
        values = np.empty((len(cells), *described.shape), np.dtype(described.numpy_dtype))
        for row, cell in enumerate(cells):
            value = _cell(described, decode, cell, row)
            if value.shape != values.shape[1:] or value.dtype != values.dtype:
                raise DataError(
                    f"{name!r} holds a value of shape {value.shape} and type {value.dtype} in row {row} of a row "
                    f"group, but its Unischema says {values.shape[1:]} and {values.dtype}. Correct the Unischema."
                )
            values[row] = value
        decoded[name] = values
    return decoded


def as_lists(table: pa.Table, decoded: Mapping[str, Array | list[Array | None]]) -> pa.Table:
    """The table with decoded values of stated shape in place of their cells, a flat list per row, without a copy."""
    for name, values in decoded.items():
        if isinstance(values, np.ndarray):
            flat = values.view(np.int8) if values.dtype == np.bool_ else values
            lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), math.prod(values.shape[1:]))
            table = table.set_column(table.schema.get_field_index(name), name, lists)
    return table


def _cell(described: "UnischemaField", decode: Callable[[bytes], Any], cell: bytes | None, row: int) -> Array:
    if cell is None:
        raise DataError(
            f"{described.name!r} is null in row {row} of a row group, and no number can stand for an array or image. "
            f"Use filters=pyarrow.compute.field({described.name!r}).is_valid() to leave such rows out."
        )
    try:
        return np.asarray(decode(cell))
    except Exception as error:  # codecs fail with whatever their libraries raise
        raise DataError(
            f"{described.name!r} cannot be decoded by {described.codec} in row {row} of a row group: {error}. Check "
            "the file and the Unischema."
        ) from error


def _decoder(described: "UnischemaField") -> Callable[[bytes], Any]:
    """How one cell is decoded.

    Raises:
        ConfigError: An image, and neither OpenCV nor Pillow.
    """
    from petastorm import codecs

    if not isinstance(described.codec, codecs.CompressedImageCodec) or codecs.OPENCV_AVAILABLE:
        return functools.partial(described.codec.decode, described)
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("Images need opencv-python-headless or pillow on all executors. Install one.") from error

    def decode(cell: bytes) -> Array:
        with Image.open(io.BytesIO(cell)) as image:  # (height, width), or (height, width, 3) in RGB order
            return np.asarray(image)

    return decode
