"""Row filters: which columns a filter looks at, and which rows pass it.

This hides that an Arrow expression can be evaluated but not taken apart.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.compute as pc

from sparkdl.errors import ConfigError
from sparkdl.storage import reason

__all__ = ["filter_columns", "filter_rows"]


def filter_columns(filters: pc.Expression | None, schema: pa.Schema) -> tuple[str, ...]:
    """The columns that a filter looks at: those without which it cannot be evaluated.

    Raises:
        ConfigError: It cannot be evaluated with all of them, or takes columns by position.
    """
    if filters is None:
        return ()

    def works(candidate: pa.Schema) -> bool:
        try:
            filter_rows(candidate.empty_table(), filters)
        except (pa.ArrowException, KeyError, IndexError):
            return False
        return True

    def needed(suspects: Sequence[str]) -> list[str]:
        if works(pa.schema([one for one in schema if one.name not in suspects])):
            return []
        if len(suspects) == 1:
            return list(suspects)
        half = len(suspects) // 2
        return needed(suspects[:half]) + needed(suspects[half:])

    try:
        filter_rows(schema.empty_table(), filters)
    except (pa.ArrowException, KeyError, IndexError) as error:
        raise ConfigError(
            f"filters={filters} cannot be evaluated: {reason(error)}. The columns are {', '.join(schema.names)}."
        ) from error
    if works(pa.schema([one.with_name(f"renamed {one.name}") for one in schema])) and not works(pa.schema([])):
        raise ConfigError(
            f"filters={filters} takes columns by position. Name them, as in pyarrow.compute.field('day')."
        )
    return tuple(needed(schema.names))


def filter_rows(table: pa.Table, condition: pc.Expression | None) -> pa.Table:
    """The rows for which a condition is true, in their order; all where it is None."""
    if condition is None:
        return table
    steps = [
        acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
        acero.Declaration("filter", acero.FilterNodeOptions(condition)),
    ]
    return acero.Declaration.from_sequence(steps).to_table(use_threads=False)  # threads would change the order
