"""Rows drawn for validation: a fraction of them, by a hash.

Rows of a DataFrame are drawn by their values: rows of equal values are on one side, whatever the partitions, the ranks
and the number of the attempt. Rows of Parquet read in place are drawn by where they lie, so that they are counted
before the fit without a look at any value. This hides how a hash becomes a decision.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pyspark.sql import Column as SparkColumn

__all__ = ["Draw"]

_BITS = 64


@dataclass(frozen=True, slots=True)
class Draw:
    """A part of the rows, drawn at random.

    Attributes:
        fraction: How large a part, between 0 and 1.
        seed: Of the draw.
    """

    fraction: float
    seed: int

    def by_place(self, file: str, row_group: int, rows: int) -> npt.NDArray[np.bool_]:
        """Which rows of a row group are drawn: a function of the arguments, the seed and the fraction alone.

        Args:
            file: Name of its file, from the data set's root on.
            row_group: Its position in the file.
            rows: Rows in it.

        Returns:
            Array of shape (rows,).
        """
        key = hashlib.blake2b(repr((self.seed, file, row_group)).encode(), digest_size=16).digest()
        # Raw bits: what numpy makes of them may change from version to version, they do not.
        bits = np.random.SFC64(np.random.SeedSequence(int.from_bytes(key))).random_raw(rows)
        drawn: npt.NDArray[np.bool_] = bits < np.uint64(self._threshold)
        return drawn

    def by_values(self, *values: "SparkColumn") -> "SparkColumn":
        """True for the rows that are drawn.

        Args:
            values: What a row is told by; of any type that Spark hashes, so no maps. Numbers are told apart by their
                value, a sparse vector from a dense one.
        """
        from pyspark.sql import functions as F

        digest = F.xxhash64(F.lit(f"validation {self.seed}"), *values)  # -2**63 .. 2**63 - 1
        return digest < F.lit(self._threshold - (1 << (_BITS - 1)))

    @property
    def _threshold(self) -> int:
        return int(self.fraction * 2.0**_BITS)
