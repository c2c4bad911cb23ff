"""Validation rows: said by a column, drawn as a fraction, or those of a second data set; one of the three.

Rows of a DataFrame that are drawn become rows with a flag, as if a column of the user's had said so. So do those of a
second DataFrame where ranks spool their rows; where rows are staged or read in place, the second data set is staged or
read in place by itself. What is trained on, and in which order, is the same with a second data set and without.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from sparkdl.config import Column, Columns, TrainConfig
from sparkdl.errors import ConfigError, DataError
from sparkdl.io.dataset import DiscoveredDataset, ParquetDataset
from sparkdl.io.draw import Draw
from sparkdl.io.in_place import InPlace, in_place, source_columns
from sparkdl.io.inspection import inspect_dataset
from sparkdl.io.stage import StagedDataset

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.types import DataType

__all__ = [
    "DATASET",
    "FRACTION",
    "NoValidationRows",
    "check_ways",
    "hold_out",
    "needs_validation",
    "open_in_place",
    "with_validation",
]

DATASET, FRACTION = "validationDataset", "validationFraction"  # also names of the flags, which messages show

Rows: TypeAlias = "DataFrame | DiscoveredDataset"


def check_ways(dataset: Any, *, indicator: str | None, fraction: float | None, second: Any) -> None:
    """Check how rows shall be held out for validation. Starts no job.

    Args:
        dataset: What is trained on: a DataFrame or a `ParquetDataset`.
        indicator: The ``validationIndicatorCol``.
        fraction: The ``validationFraction``.
        second: The ``validationDataset``.

    Raises:
        ConfigError: In more than one way, a fraction outside of 0 to 1, or a second data set of another kind or of
            another session than the first.
    """
    shown = {"validationIndicatorCol": indicator, FRACTION: fraction, DATASET: second}
    asked = [name if name == DATASET else f"{name}={value!r}" for name, value in shown.items() if value is not None]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} are set. Rows are held out in one way: set one of them.")
    if fraction is not None and not 0 < fraction < 1:
        raise ConfigError(f"{FRACTION}={fraction:g} is not between 0 and 1. Use a part of the rows, such as 0.2.")
    if second is None:
        return
    from pyspark.sql import DataFrame

    if not isinstance(second, DataFrame | ParquetDataset):
        raise ConfigError(f"{DATASET} is a {type(second).__name__}. Give a DataFrame or a ParquetDataset.")
    if isinstance(dataset, ParquetDataset) != isinstance(second, ParquetDataset):
        parquet, other = (second, "fit") if isinstance(second, ParquetDataset) else (dataset, DATASET)
        where = DATASET if other == "fit" else "fit"
        raise ConfigError(
            f"{other} was given a DataFrame, but {where} a ParquetDataset. Give both of one kind: the DataFrame of "
            f"these files is spark.read.parquet({', '.join(map(repr, parquet.urls))})."
        )
    if isinstance(second, DataFrame) and _session_of(dataset) != _session_of(second):
        raise ConfigError(
            f"{DATASET} belongs to another Spark session than the DataFrame that is trained on. Make both from one."
        )


def hold_out(
    dataset: "Rows", columns: Columns, config: TrainConfig, second: "Rows | None", *, spooled: bool
) -> tuple["Rows", Columns, "Rows | None"]:
    """Bring about the validation rows that were asked for. Starts no job.

    Args:
        dataset: What is trained on.
        columns: What is read.
        config: How to train.
        second: The ``validationDataset``.
        spooled: True where each rank keeps its part of one DataFrame.

    Returns:
        Rows; columns, of which one may say what is held out; and validation rows that are not among the rows.

    Raises:
        ConfigError: A column that Spark cannot hash, a second data set of other columns, or a column of the flag's
            name.
    """
    if config.validation_fraction is not None:
        return *_draw_rows(dataset, columns, Draw(config.validation_fraction, config.seed)), None
    if second is None:
        return dataset, columns, None
    key = config.partition_key_col
    _check_same_columns(dataset, second, columns, key)
    if isinstance(dataset, DiscoveredDataset) or isinstance(second, DiscoveredDataset) or not spooled:
        return dataset, columns, second
    num_shards = config.num_shards or config.num_train_workers
    return *_union_rows(dataset, second, columns, num_shards, key), None


def _draw_rows(dataset: "Rows", columns: Columns, draw: Draw) -> tuple["Rows", Columns]:
    _check_flag(FRACTION, dataset.columns)
    columns = replace(columns, validation=_flag(FRACTION))
    if isinstance(dataset, DiscoveredDataset):
        return replace(dataset, draw=draw), columns
    from pyspark.sql import functions as F

    types = _types(dataset)
    names = _names(columns)
    for name in names:
        if _holds_map(types[name]):
            raise ConfigError(
                f"{FRACTION} draws rows by a hash of their values, but {name!r} has type "
                f"{types[name].simpleString()}, and Spark hashes no maps. Set validationIndicatorCol, or make the "
                "map an array with pyspark.sql.functions.map_entries."
            )
    return dataset.withColumn(FRACTION, draw.by_values(*(F.col(_quoted(name)) for name in names))), columns


def _check_same_columns(dataset: "Rows", second: "Rows", columns: Columns, key: str | None) -> None:
    """Check that a second data set has the columns that are read of the first, in the same types and shapes."""
    mine, theirs = _types(dataset), _types(second)
    names = [*_names(columns), *([key] if key is not None else [])]
    missing = [name for name in dict.fromkeys(names) if name not in theirs]
    if missing:
        raise ConfigError(
            f"{DATASET} has no column {', '.join(map(repr, missing))}, but the rows that are trained on have. It has "
            f"{', '.join(second.columns)}."
        )
    others = [name for name in dict.fromkeys(names) if mine[name].simpleString() != theirs[name].simpleString()]
    if others:
        found = ", ".join(
            f"{name!r} as {theirs[name].simpleString()}, not {mine[name].simpleString()}" for name in others
        )
        raise ConfigError(f"{DATASET} holds {found} as in the rows that are trained on. Cast to the same types.")
    if isinstance(dataset, DiscoveredDataset) and isinstance(second, DiscoveredDataset):
        for name in names:
            if dataset.shapes.get(name) != second.shapes.get(name):
                raise ConfigError(
                    f"{DATASET} holds {name!r} in shape {second.shapes.get(name)}, but the rows that are trained on in "
                    f"shape {dataset.shapes.get(name)}. Name data sets of the same Unischema."
                )


def _union_rows(
    df: "DataFrame", second: "DataFrame", columns: Columns, num_shards: int, key: str | None
) -> tuple["DataFrame", Columns]:
    """The rows of two DataFrames, those of the second with a flag.

    The rows of the first stay where they are in its partitions, which come first. The second is shuffled once: as long
    as both end in a shuffle, adaptive execution cuts the partitions of either by the size of both.
    """
    from pyspark.sql import functions as F

    names = list(dict.fromkeys([*_names(columns), *([key] if key is not None else [])]))
    _check_flag(DATASET, names)
    chosen = [F.col(_quoted(name)) for name in names]
    numbered = second.select(*chosen, F.monotonically_increasing_id().alias(DATASET))
    place = F.pmod(F.col(DATASET), F.lit(num_shards)).cast("int")
    held = numbered.repartitionById(num_shards, place).select(*chosen, F.lit(True).alias(DATASET))
    rows = df.select(*chosen, F.lit(False).alias(DATASET)).union(held)
    return rows, replace(columns, validation=_flag(DATASET))


def open_in_place(
    spark: "SparkSession", dataset: DiscoveredDataset, columns: Columns, second: DiscoveredDataset | None = None
) -> tuple[StagedDataset, InPlace]:
    """Inspect Parquet that is read in place.

    Args:
        spark: Runs the inspection.
        dataset: What is trained on.
        columns: What is read.
        second: Validation rows, if these are a data set of their own.

    Returns:
        What the plan needs to know, and what a reader does.

    Raises:
        DataError: As `sparkdl.io.inspection.inspect_dataset`.
    """
    staged, context = inspect_dataset(spark, dataset, columns), in_place(dataset, columns)
    if second is None:
        return staged, context
    held = inspect_dataset(spark, second, columns)
    return with_validation(staged, held, columns), replace(context, validation=in_place(second, columns))


def with_validation(staged: StagedDataset, second: StagedDataset, columns: Columns) -> StagedDataset:
    """A data set whose validation rows are the rows of a second one.

    Raises:
        DataError: The two differ in the width of a column.
    """
    return replace(
        staged,
        validation=second.train,
        facts=staged.facts.merge(second.facts, columns),
        files={**staged.files, **second.files},
    )


class NoValidationRows:
    """What becomes of a fit that was to have validation rows, and has none.

    Args:
        columns: What is read.
        config: How to train.
        needed_by: Names of the Params that need such rows; see `needs_validation`.
    """

    def __init__(self, columns: Columns, config: TrainConfig, needed_by: Iterable[str]) -> None:
        flag = columns.validation.name if columns.validation is not None else DATASET
        self._found, self._remedy = {
            FRACTION: (f"{FRACTION}={config.validation_fraction} drew none of the rows", "Use a larger one."),
            DATASET: (f"{DATASET} has no rows", "Check its filters and joins."),
        }.get(flag, (f"validationIndicatorCol={flag!r} is true in no row", "Check how it is made."))
        self._needed_by = tuple(needed_by)

    def check(self) -> None:
        """Refuse to go on where something needs validation rows.

        Raises:
            DataError: As said.
        """
        if self._needed_by:
            needs = "needs" if len(self._needed_by) == 1 else "need"
            raise DataError(
                f"{self._found}, but {' and '.join(self._needed_by)} {needs} validation rows. {self._remedy}"
            )

    def __str__(self) -> str:
        return f"{self._found}: the fit goes without validation. {self._remedy}"


def needs_validation(config: TrainConfig, *, metrics: bool) -> list[str]:
    """Names of the Params that make no sense without validation rows.

    Args:
        config: How to train.
        metrics: True where metrics were asked for.
    """
    monitored = config.monitor is None or config.monitor.startswith("validation_")
    asked = {
        "earlyStoppingPatience": monitored and config.early_stopping_patience is not None,
        "restoreBest": monitored and config.restore_best,
        "metrics": metrics,
        f"monitor={config.monitor!r}": monitored and config.monitor is not None,
    }
    return [name for name, needs in asked.items() if needs]


def _flag(name: str) -> Column:
    return Column(name, "validation", "scalar", "bool", flat=True)


def _check_flag(name: str, taken: Sequence[str]) -> None:
    found = [one for one in taken if one.lower() == name.lower()]
    if found:
        raise ConfigError(f"There is a column {found[0]!r}, but {name} marks rows in one of this name. Rename it.")


def _names(columns: Columns) -> list[str]:
    """Names of the columns that are read, each once."""
    return list(dict.fromkeys(name for column in columns for name in source_columns(column)))


def _types(rows: "Rows") -> dict[str, "DataType"]:
    return {one.name: one.dataType for one in rows.schema.fields}


def _holds_map(kind: "DataType") -> bool:
    from pyspark.sql.types import ArrayType, MapType

    return isinstance(kind, MapType) or (isinstance(kind, ArrayType) and _holds_map(kind.elementType))


def _session_of(df: "DataFrame") -> Any:
    session: Any = df.sparkSession
    classic = getattr(session, "_jsparkSession", None)
    return (
        session.session_id if classic is None else classic
    )  # several Python objects may stand for one classic session


def _quoted(name: str) -> str:
    return f"`{name.replace('`', '``')}`"
