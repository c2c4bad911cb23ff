"""PySpark's daemon, with torch loaded before it forks its Python workers.

Importing torch and what training needs takes some seconds of CPU in every Python worker, and a restart begins with new
ones. With this setting a host pays once, for all of its workers, and their memory holds one copy of the code::

    spark.python.daemon.module=sparkdl.daemon

Nothing of it runs where the setting is not made. Executors need sparkdl installed; files sent with the job come too
late.
"""

import importlib

from pyspark import daemon

__all__ = ["main"]

# What starts no thread and touches no device when it is loaded: a fork would not carry that over.
_PRELOADED = ("torch.distributed.nn.functional", "pyarrow.parquet", "sparkdl.task", "sparkdl.predict")


def main() -> None:
    """Load, then serve as `pyspark.daemon` does."""
    for name in _PRELOADED:
        importlib.import_module(name)
    daemon.manager()


if __name__ == "__main__":
    main()
