"""What Spark calls the columns of Parquet files.

This hides Arrow's types and the JSON that Spark leaves in the footers of its own files. That JSON is read without
importing a class that it names.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sparkdl.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql.types import DataType

__all__ = ["assembled_types", "declared_types", "spark_type"]

_SPARK_SCHEMA = b"org.apache.spark.sql.parquet.row.metadata"
_SIGNED = {
    pa.uint8(): pa.int16(),
    pa.uint16(): pa.int32(),
    pa.uint32(): pa.int64(),
    pa.uint64(): pa.int64(),
    pa.float16(): pa.float32(),
}


def declared_types(footer: pa.Schema) -> dict[str, "DataType"]:
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


def spark_type(kind: pa.DataType) -> "DataType":
    """What Spark would call a column of another program's file; void where it has no word for it."""
    from pyspark.errors import PySparkException
    from pyspark.ml.linalg import VectorUDT
    from pyspark.sql import types as T
    from pyspark.sql.pandas.types import from_arrow_type

    if isinstance(kind, pa.BaseExtensionType):
        return spark_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return spark_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return T.ArrayType(spark_type(kind.value_type), kind.value_field.nullable)
    if pa.types.is_map(kind):
        return T.MapType(spark_type(kind.key_type), spark_type(kind.item_type), kind.item_field.nullable)
    if pa.types.is_struct(kind):
        if [one.name for one in kind] == ["type", "size", "indices", "values"]:
            return VectorUDT()
        return T.StructType([T.StructField(one.name, spark_type(one.type), one.nullable) for one in kind])
    try:
        return from_arrow_type(_SIGNED.get(kind, kind))
    except PySparkException:
        return T.NullType()


def assembled_types(assemble: Mapping[str, Sequence[str]], kinds: Mapping[str, "DataType"]) -> dict[str, "DataType"]:
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
