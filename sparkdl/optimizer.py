"""Optimizers by name or by the caller's own function."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparkdl.errors import ConfigError

__all__ = ["OptimizerRecipe", "optimizer_names"]

DEFAULT_LEARNING_RATE = 1e-3
Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# LBFGS calls a closure several times per step, SparseAdam takes sparse gradients only, Muon matrices only.
_UNFIT = ("lbfgs", "sparseadam", "muon", "optimizer")
# One kernel for all parameters instead of a dozen per parameter; torch chooses it by itself only on some devices.
_FUSED = (torch.optim.Adam, torch.optim.AdamW)
_NAMED: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): found
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and name.lower() not in _UNFIT
}


def optimizer_names() -> list[str]:
    """Names that `OptimizerRecipe` knows: the classes of `torch.optim`, in lower case."""
    return sorted(_NAMED)


@dataclass(frozen=True, slots=True)
class OptimizerRecipe:
    """How to make the optimizer once the parameters are there.

    Attributes:
        optimizer: A name of `torch.optim`, or a function from parameters to an optimizer.
        learning_rate: For a name; 1e-3 if None.
        params: Further arguments, for a name.

    Raises:
        ConfigError: An unknown name or argument; or a function together with the two that only a name takes.
    """

    optimizer: str | Factory
    learning_rate: float | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, str):
            if not callable(self.optimizer):
                raise ConfigError(f"optimizer={self.optimizer!r} is neither a name nor a function of the parameters.")
            extra = [
                name
                for name, value in (("learningRate", self.learning_rate), ("optimizerParams", self.params))
                if value is not None and value != {}
            ]
            if extra:
                raise ConfigError(
                    f"{' and '.join(extra)} cannot reach an optimizer that is a function. Set them inside the "
                    "function: optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
                )
            return
        if self.optimizer.lower() not in _NAMED:
            raise ConfigError(
                f"optimizer={self.optimizer!r} is unknown. Use one of {', '.join(optimizer_names())}, or a function "
                "of the parameters."
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learningRate={self.learning_rate} does not learn. Use a number above 0.")
        if self.learning_rate is not None and "lr" in self.params:
            raise ConfigError(
                f"learningRate={self.learning_rate} and optimizerParams={dict(self.params)!r}, with 'lr', are both "
                "set. Set one."
            )
        try:
            self.build([nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"optimizerParams={dict(self.params)!r} do not suit optimizer={self.optimizer!r}: {error}"
            ) from error

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters.

        Raises:
            ConfigError: The caller's function returned something else.
        """
        if isinstance(self.optimizer, str):
            rate = DEFAULT_LEARNING_RATE if self.learning_rate is None else self.learning_rate
            kind = _NAMED[self.optimizer.lower()]
            arguments = {"lr": rate, **self.params}
            if kind in _FUSED and not arguments.keys() & {"foreach", "fused", "differentiable", "capturable"}:
                arguments["fused"] = True
            return kind(parameters, **arguments)
        made = self.optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(f"The function given as optimizer returned {made!r}, not a torch.optim.Optimizer.")
        return made
