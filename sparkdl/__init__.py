"""Train any PyTorch module on a Spark DataFrame, inside Spark.

Names are loaded on first use, so that `import sparkdl` is cheap in every Python worker.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparkdl.barrier.launch import launch
    from sparkdl.callbacks import Callback, RunView
    from sparkdl.errors import SparkdlError, TrainingFailedError
    from sparkdl.estimator import TorchClassifier, TorchEstimator, TorchRegressor
    from sparkdl.model import TorchClassificationModel, TorchModel, TorchRegressionModel
    from sparkdl.serialization import allow_modules

__all__ = [
    "Callback",
    "RunView",
    "SparkdlError",
    "TorchClassificationModel",
    "TorchClassifier",
    "TorchEstimator",
    "TorchModel",
    "TorchRegressionModel",
    "TorchRegressor",
    "TrainingFailedError",
    "allow_modules",
    "launch",
]

_HOMES = {
    "Callback": "sparkdl.callbacks",
    "RunView": "sparkdl.callbacks",
    "SparkdlError": "sparkdl.errors",
    "TorchClassificationModel": "sparkdl.model",
    "TorchClassifier": "sparkdl.estimator",
    "TorchEstimator": "sparkdl.estimator",
    "TorchModel": "sparkdl.model",
    "TorchRegressionModel": "sparkdl.model",
    "TorchRegressor": "sparkdl.estimator",
    "TrainingFailedError": "sparkdl.errors",
    "allow_modules": "sparkdl.serialization",
    "launch": "sparkdl.barrier.launch",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sparkdl-torch")
    if name not in _HOMES:
        raise AttributeError(f"module 'sparkdl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
