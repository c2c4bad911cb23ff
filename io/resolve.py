"""Columns of a DataFrame or data set by role: which types are taken, and what a user may say of them.

The table of types is in `sparkdl.io.schema`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from sparkdl.config import Column, Nulls, Padding
from sparkdl.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql.types import DataType, StructType

__all__ = ["ColumnRules", "Role", "TypedColumns", "check_rules", "resolve_column"]

Role = Literal["input", "target", "number", "class", "weight", "validation"]

_INTEGRAL = ("tinyint", "smallint", "int", "bigint")
_FLOATING = ("float", "double", "boolean")
_TIMES = ("date", "timestamp", "timestamp_ntz")


class TypedColumns(Protocol):
    """What is asked of a DataFrame here; a Parquet data set that nobody has loaded can answer it as well."""

    @property
    def schema(self) -> "StructType":
        """Spark's types of the columns."""

    @property
    def columns(self) -> Sequence[str]:
        """Their names."""


@dataclass(frozen=True, slots=True)
class ColumnRules:
    """What a user says of columns beyond their types; by the user's names.

    Attributes:
        nulls: ``"error"``, ``"drop"`` or a number, for all columns or by column; see `sparkdl.config.Column`.
        padding: How ragged arrays become equally long.
        shapes: Shape of one row.
        vocabularies: Words of string columns; None: yet to be learnt.
        transform: True where a transform reads the columns, which may then hold text and bytes.
        assemble: Columns that are not in the data, and the columns of numbers that each is put together from.
    """

    nulls: Mapping[str, Nulls] | Nulls = "error"
    padding: Mapping[str, Padding] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    vocabularies: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    transform: bool = False
    assemble: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_NO_RULES = ColumnRules()


def check_rules(rules: ColumnRules, names: Iterable[str]) -> None:
    """Check that every rule is for one of the columns of a fit.

    Args:
        rules: The rules.
        names: The columns that were resolved, under the user's names.

    Raises:
        ConfigError: A rule for another column.
    """
    known = list(names)
    by_column: dict[str, Any] = {
        "nulls": rules.nulls if isinstance(rules.nulls, Mapping) else {},
        "padding": rules.padding,
        "shapes": rules.shapes,
        "vocabularies": rules.vocabularies,
        "assemble": rules.assemble,
    }
    for rule, columns in by_column.items():
        for name in columns:
            if name not in known:
                raise ConfigError(
                    f"{rule} has an entry for {name!r}, but only {', '.join(known)} are read. Remove it, or name the "
                    "column as an input or label."
                )


def resolve_column(
    df: TypedColumns,
    name: str,
    *,
    field: str,
    param: str,
    floating: str,
    role: Role,
    rules: ColumnRules = _NO_RULES,
) -> Column:
    """Check that a column exists and has a type that ``role`` can use. Starts no job.

    Args:
        df: What is to be trained on or transformed; only its ``schema`` and ``columns`` are used.
        name: The column.
        field: Its name in staged data.
        param: The Param that named it, for messages.
        floating: Name of the torch dtype of floating values (the module's).
        role: What the column is for: a "target" keeps integers as they are, a "number" is always floating.
        rules: What the user says of it.

    Raises:
        ConfigError: No such column, a type that cannot be used, or a rule that does not suit the type.
    """
    from pyspark.ml.linalg import VectorUDT

    types = {entry.name: entry.dataType for entry in df.schema.fields}
    if name in rules.assemble and role in ("input", "target", "number"):
        column = _assembled(types, name, field, param, floating, role, rules)
        return _with_rules(column, f"{param}={name!r} is assembled from {len(column.parts)} columns", rules)
    if name not in types:
        raise ConfigError(f"{param}={name!r} is not a column. The DataFrame has {', '.join(df.columns)}.")
    spark_type = types[name]
    shown = "vector" if isinstance(spark_type, VectorUDT) else spark_type.simpleString()
    where = f"{param}={name!r} has type {shown}"
    if role == "validation":
        if shown != "boolean":
            raise ConfigError(f"{where}; it must be boolean, true for the rows held out for validation.")
        return Column(name, field, "scalar", "bool", flat=True)
    if role in ("class", "weight"):
        column = _class_or_weight(spark_type, name, field, floating, role, rules, where)
    else:
        column = _column(spark_type, name, field, floating, role, rules, where)
    return _with_rules(column, where, rules, nested=_element(spark_type)[1] > 1)


def _class_or_weight(
    spark_type: "DataType", name: str, field: str, floating: str, role: Role, rules: ColumnRules, where: str
) -> Column:
    if _is_number(spark_type):
        dtype = "int64" if role == "class" else floating
        return Column(name, field, "scalar", dtype, flat=True, validity="class" if role == "class" else "weight")
    if role == "class" and _is_string(spark_type):
        text = _text_column(spark_type, name, field, rules)
        if text is not None:
            return text
    hint = ""
    if _is_string(spark_type):
        hint = " Index strings with pyspark.ml.feature.StringIndexer"
        hint += f", or give vocabularies={{{name!r}: ...}} or a transform." if role == "class" else "."
    wanted = "class numbers 0, 1, ..." if role == "class" else "numbers"
    raise ConfigError(f"{where}; it must hold {wanted}.{hint}")


def _column(
    spark_type: "DataType", name: str, field: str, floating: str, role: Role, rules: ColumnRules, where: str
) -> Column:
    """The column of an input or a target, without rules that concern its values."""
    from pyspark.ml.linalg import VectorUDT

    if isinstance(spark_type, VectorUDT):
        return Column(name, field, "vector", floating)
    dtype = _dtype(spark_type, role, floating)
    if dtype is not None:
        return Column(name, field, "scalar", dtype, flat=dtype == "int64" or role != "input")
    element, levels = _element(spark_type)
    dtype = _dtype(element, role, floating) if levels else None
    shape = rules.shapes.get(name)
    if dtype is not None and (levels == 1 or shape):
        if levels > 1 and shape and len(shape) != levels:
            raise ConfigError(
                f"{where}; shapes={{{name!r}: {tuple(shape)}}} gives it {len(shape)} axes, but its arrays are nested "
                f"{levels} deep. Give one length per level."
            )
        return Column(name, field, "array", dtype)
    text = _text_column(spark_type, name, field, rules)
    if text is not None:
        return text
    if dtype is not None:
        example = (28,) * levels
        raise ConfigError(f"{where}; declare the shape of a row, such as shapes={{{name!r}: {example}}}.")
    raise ConfigError(f"{where}; use {_advice(spark_type, name)}.")


def _text_column(spark_type: "DataType", name: str, field: str, rules: ColumnRules) -> Column | None:
    """A column of words or of what only a transform can read; None where the rules allow for neither."""
    if _is_string(spark_type) and name in rules.vocabularies:
        words: Any = rules.vocabularies[name]
        if words is not None:
            strange = [word for word in words if not isinstance(word, str)]
            if not words or strange or len(set(words)) < len(words):
                found = "is empty" if not words else f"holds {strange[0]!r}" if strange else "holds a word twice"
                raise ConfigError(f"vocabularies[{name!r}] {found}. Give every string of the column once, or None.")
            words = tuple(words)
        return Column(name, field, "text", "int64", flat=True, vocabulary=words)
    if rules.transform and _is_raw(spark_type):
        return Column(name, field, "raw", "", validity="any")
    return None


def _assembled(
    types: Mapping[str, "DataType"], name: str, field: str, param: str, floating: str, role: Role, rules: ColumnRules
) -> Column:
    parts = tuple(rules.assemble[name])
    where = f"{param}={name!r} is assembled from"
    if not parts or len(set(parts)) < len(parts):
        raise ConfigError(f"{where} {', '.join(parts) or 'no columns'}. Name at least one column, and each once.")
    for part in parts:
        if part not in types:
            raise ConfigError(f"{where} {part!r}, which is not a column. There are {', '.join(types)}.")
        if not _is_number(types[part]):
            raise ConfigError(f"{where} {part!r} of type {types[part].simpleString()}. Assemble numbers and booleans.")
    integral = role != "number" and all(types[part].simpleString() in _INTEGRAL for part in parts)
    return Column(name, field, "assembled", "int64" if integral else floating, parts=parts)


def _with_rules(column: Column, where: str, rules: ColumnRules, *, nested: bool = False) -> Column:
    """The column with the rules that concern its values, after a check that they suit it."""
    name = column.name
    shape: tuple[Any, ...] = tuple(rules.shapes.get(name, ()))
    padding = rules.padding.get(name)
    if name in rules.shapes:
        if column.kind not in ("vector", "array", "assembled"):
            raise ConfigError(f"{where}, whose rows have no shape. Remove {name!r} from shapes.")
        if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
            raise ConfigError(f"shapes[{name!r}] is {shape}. Give the lengths of its axes, each at least 1.")
        if column.kind == "assembled" and math.prod(shape) != len(column.parts):
            raise ConfigError(f"{where}, which shapes[{name!r}]={shape} cannot hold.")
    if padding is not None:
        if column.kind != "array" or nested:
            raise ConfigError(
                f"{where}; padding is for arrays of numbers that are not nested. Remove {name!r} from it."
            )
        if padding.length < 1 or (shape and math.prod(shape) != padding.length):
            wanted = f"the length {math.prod(shape)} of its shape" if shape else "a length of at least 1"
            raise ConfigError(f"padding[{name!r}] is {padding}. Give it {wanted}.")
        _check_number(padding.value, column, f"padding[{name!r}] fills up with {padding.value!r}")
    if name in rules.vocabularies and column.kind != "text":
        raise ConfigError(f"{where}; a vocabulary is for strings. Remove {name!r} from vocabularies.")
    nulls = rules.nulls.get(name, "error") if isinstance(rules.nulls, Mapping) else rules.nulls
    if isinstance(nulls, str):
        if nulls not in ("error", "drop"):
            raise ConfigError(f"nulls[{name!r}] is {nulls!r}. It is 'error', 'drop' or a number to replace nulls.")
    else:
        if column.kind == "raw":
            raise ConfigError(f"{where}; nulls[{name!r}]={nulls!r} cannot replace its nulls. Use 'error' or 'drop'.")
        _check_number(nulls, column, f"nulls[{name!r}]={nulls!r} replaces nulls")
    return replace(column, shape=shape, padding=padding, nulls=nulls)


def _check_number(number: Any, column: Column, what: str) -> None:
    """Check that a number can stand among the values of a column."""
    least = 0 if column.validity in ("class", "weight") or column.kind == "text" else -math.inf
    known = isinstance(number, int | float | np.integer | np.floating) and not isinstance(number, bool)
    with np.errstate(over="ignore"):
        if column.dtype == "int64":
            fits = known and float(number).is_integer() and max(least, -(2**63)) <= number < 2**63
        else:
            fits = known and bool(np.isfinite(np.dtype(column.dtype).type(number))) and number >= least
    if not fits:
        bound = "" if least else " not below 0"
        raise ConfigError(f"{what}, but {column.name!r} becomes {column.dtype}. Give a number{bound} of this type.")


def _dtype(spark_type: "DataType", role: Role, floating: str) -> str | None:
    """Name of the dtype of a number or time; None for other types."""
    text = spark_type.simpleString()
    if text in _INTEGRAL:
        return floating if role == "number" else "int64"
    if _is_number(spark_type):
        return floating
    return "int64" if text in _TIMES and role != "number" else None


def _is_number(spark_type: "DataType") -> bool:
    text = spark_type.simpleString()
    return text in _INTEGRAL + _FLOATING or text.startswith("decimal")


def _is_string(spark_type: "DataType") -> bool:
    from pyspark.sql import types as T

    return isinstance(spark_type, T.StringType | T.CharType | T.VarcharType)


def _is_raw(spark_type: "DataType") -> bool:
    """True for types that have a form in Arrow and Parquet which a transform can read."""
    from pyspark.sql import types as T

    if isinstance(spark_type, T.ArrayType):
        return _is_raw(spark_type.elementType)
    if isinstance(spark_type, T.MapType):
        return _is_raw(spark_type.keyType) and _is_raw(spark_type.valueType)
    simple = _is_string(spark_type) or isinstance(spark_type, T.BinaryType)
    return simple or _is_number(spark_type) or spark_type.simpleString() in _TIMES


def _element(spark_type: "DataType") -> tuple["DataType", int]:
    """What nested arrays hold, and how deep they are nested."""
    from pyspark.sql import types as T

    levels = 0
    while isinstance(spark_type, T.ArrayType):
        spark_type, levels = spark_type.elementType, levels + 1
    return spark_type, levels


def _advice(spark_type: "DataType", name: str) -> str:
    text = spark_type.simpleString()
    numbers = "an ML Vector, an array of numbers, or a number"
    if _is_string(spark_type):
        return (
            "pyspark.ml.feature.StringIndexer to turn strings into numbers, or give "
            f"vocabularies={{{name!r}: ...}}, or a transform that reads them"
        )
    if text.startswith("struct"):
        return "its fields as columns of their own"
    if text in _TIMES or text.startswith(("time", "interval")):
        return "numbers derived from it (hour, day of week, unix_timestamp)"
    return f"{numbers}, or give a transform that reads it" if _is_raw(spark_type) else numbers
