"""Data: from a DataFrame or Parquet files to a plan, to batches.

Importing this package lets Petastorm load on current pyarrow and NumPy; see `sparkdl.io.petastorm_loader`.
"""

from typing import TYPE_CHECKING, Any

from sparkdl.io.petastorm_loader import install

if TYPE_CHECKING:
    from sparkdl.io.dataset import ParquetDataset

__all__ = ["ParquetDataset"]

install()


def __getattr__(name: str) -> Any:
    if name != "ParquetDataset":
        raise AttributeError(f"module 'sparkdl.io' has no attribute {name!r}")
    from sparkdl.io.dataset import ParquetDataset

    return ParquetDataset
