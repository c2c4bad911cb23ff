"""Columns in the names of folders: ``year=2024/place=a%2Fb`` as Spark reads it.

This hides Spark's rules for what a folder's text means: how it is escaped, what stands for null, and which type the
texts of all files have in common. No storage is touched.
"""

import datetime
import decimal
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from pyspark.sql.types import DataType

__all__ = ["folder_texts", "folder_value", "infer_types"]

_NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"


def folder_texts(folders: Sequence[str]) -> dict[str, Any]:
    """The text of each ``key=value`` folder; None for a null."""
    pairs = (tuple(map(unquote, folder.split("=", 1))) for folder in folders if "=" in folder)
    return {key: None if text == _NULL_FOLDER else text for key, text in pairs}


def infer_types(files: Sequence[Mapping[str, str | None]]) -> dict[str, "DataType"]:
    """Types of the folders' columns as Spark's PartitioningUtils infers them, over the values of all files.

    Args:
        files: For each file what `folder_texts` returned; the same keys for all.
    """
    found = {}
    for name in files[0]:
        texts = {text for folders in files if (text := folders[name]) is not None}
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
        folder_value(text, moment, "UTC")
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


def folder_value(text: str | None, kind: "DataType", time_zone: str) -> Any:
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
