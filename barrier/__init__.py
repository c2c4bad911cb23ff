"""Ranks in a Spark barrier stage: launching them, letting them meet, hearing from them; and what they do together.

Imports nothing at the top level, so that the parts that know nothing of Spark load without it: the collective operators
are loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparkdl.barrier.collectives import Pending, all_gather, all_reduce, broadcast, reduce_scatter

__all__ = ["Pending", "all_gather", "all_reduce", "broadcast", "reduce_scatter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sparkdl.barrier' has no attribute {name!r}")
    value = getattr(importlib.import_module("sparkdl.barrier.collectives"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__]
