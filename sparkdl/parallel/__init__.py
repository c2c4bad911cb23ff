"""Ways for ranks to train one module together; each is a `Strategy`, and has a name."""

import copy
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from sparkdl.errors import ConfigError
from sparkdl.parallel.replicas import Place, Replicas
from sparkdl.parallel.strategy import Setting, StepResult, Strategy

if TYPE_CHECKING:
    from sparkdl.parallel.auto import Auto
    from sparkdl.parallel.compression import Compression, Half, Int8, PowerSGD, TopK
    from sparkdl.parallel.ddp import DataParallel
    from sparkdl.parallel.fsdp import FullyShardedDataParallel, HybridShardedDataParallel
    from sparkdl.parallel.hybrid import Hybrid
    from sparkdl.parallel.local_sgd import LocalSGD
    from sparkdl.parallel.parameter_server import ParameterServer
    from sparkdl.parallel.pipeline import Pipeline
    from sparkdl.parallel.recommendation import Recommendation, recommend
    from sparkdl.parallel.tensor import TensorParallel

__all__ = [
    "Auto",
    "Compression",
    "DataParallel",
    "FullyShardedDataParallel",
    "Half",
    "Hybrid",
    "HybridShardedDataParallel",
    "Int8",
    "LocalSGD",
    "ParameterServer",
    "Pipeline",
    "Place",
    "PowerSGD",
    "Recommendation",
    "Replicas",
    "Setting",
    "StepResult",
    "Strategy",
    "TensorParallel",
    "TopK",
    "build_strategy",
    "recommend",
    "strategy_names",
]

# The name of each, its class and where that is. Loaded on first use: some parts of torch take a second.
_NAMED = {
    "ddp": ("DataParallel", "ddp"),
    "fsdp": ("FullyShardedDataParallel", "fsdp"),
    "hsdp": ("HybridShardedDataParallel", "fsdp"),
    "tensor_parallel": ("TensorParallel", "tensor"),
    "parameter_server": ("ParameterServer", "parameter_server"),
    "local_sgd": ("LocalSGD", "local_sgd"),
    "auto": ("Auto", "auto"),
    "pipeline": ("Pipeline", "pipeline"),
    "hybrid": ("Hybrid", "hybrid"),
}
# Further classes that are loaded on first use.
_OPTIONS: dict[str, str] = {
    "Compression": "compression",
    "Half": "compression",
    "Int8": "compression",
    "PowerSGD": "compression",
    "TopK": "compression",
    "Recommendation": "recommendation",
    "recommend": "recommendation",
}


def strategy_names() -> list[str]:
    """Names that `build_strategy` knows."""
    return list(_NAMED)


def build_strategy(strategy: Any) -> Strategy:
    """A strategy by name with its defaults, or a copy of the caller's.

    Raises:
        ConfigError: An unknown name, or an object that is no strategy.
    """
    known = f"Use one of {', '.join(_NAMED)}, or an object of sparkdl.parallel."
    if isinstance(strategy, str):
        if strategy not in _NAMED:
            raise ConfigError(f"strategy={strategy!r} is not known. {known}")
        return cast(Strategy, __getattr__(_NAMED[strategy][0])())
    if isinstance(strategy, type) or not all(hasattr(strategy, name) for name in ("replicas", "prepare", "train_step")):
        raise ConfigError(f"strategy={strategy!r} is no strategy. {known}")
    return cast(Strategy, copy.deepcopy(strategy))


def __getattr__(name: str) -> Any:
    module = {**dict(_NAMED.values()), **_OPTIONS}.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sparkdl.parallel.{module}"), name)
