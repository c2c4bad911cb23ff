"""Optimizers by name or by the caller's own function."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sparkdl.config import Interval
from sparkdl.errors import ConfigError
from sparkdl.schedule import Schedule

__all__ = ["OptimizerRecipe", "optimizer_names"]

DEFAULT_OPTIMIZER = "adamw"
DEFAULT_LEARNING_RATE = 1e-3
Factory = Callable[[Iterable[nn.Parameter]], Optimizer]

# LBFGS calls a closure several times per step, SparseAdam takes sparse gradients only, Muon matrices only.
_UNFIT = ("lbfgs", "sparseadam", "muon", "optimizer")
# One kernel for all parameters instead of a dozen per parameter; torch chooses it by itself only on some devices.
_FUSED = (torch.optim.Adam, torch.optim.AdamW)
_NAMED: dict[str, type[Optimizer]] = {
    name.lower(): found
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, Optimizer) and name.lower() not in _UNFIT
}


def optimizer_names() -> list[str]:
    """Names that `OptimizerRecipe` knows: the classes of `torch.optim`, in lower case."""
    return sorted(_NAMED)


@dataclass(frozen=True, slots=True)
class OptimizerRecipe:
    """How to make the optimizers once the module is there.

    Attributes:
        optimizer: A name of `torch.optim`, or a function from parameters to an optimizer.
        learning_rate: For a name; 1e-3 if None.
        params: Further arguments, for a name.
        weight_decay: For a name, the weight decay of parameters with two and more dimensions; the others have none.
        parameter_groups: For a name, options of some parameters: regular expressions, searched for in the parameters'
            names, to options. The first that is found counts. Options go before ``weight_decay``, whatever the number
            of dimensions.
        configure: Instead of all others, a function from the module to an optimizer, a sequence of them, or a pair
            (optimizers, schedulers) of schedulers of `torch.optim.lr_scheduler` or of `sparkdl.schedule.Schedule`.

    Raises:
        ConfigError: An unknown name or argument; a function together with settings that only a name takes; or
            ``configure`` together with any other.
    """

    optimizer: str | Factory = DEFAULT_OPTIMIZER
    learning_rate: float | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float | None = None
    parameter_groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    configure: Callable[[nn.Module], Any] | None = None

    def __post_init__(self) -> None:
        settings = {
            "learningRate": self.learning_rate,
            "optimizerParams": self.params,
            "weightDecay": self.weight_decay,
            "parameterGroups": self.parameter_groups,
        }
        given = [name for name, value in settings.items() if value is not None and value != {}]
        if self.configure is not None:
            if not callable(self.configure):
                raise ConfigError(f"configure={self.configure!r} is not a function. Give one from the module.")
            given = [*(["optimizer"] if self.optimizer != DEFAULT_OPTIMIZER else []), *given]
            if given:
                raise ConfigError(
                    f"{' and '.join(given)} cannot reach the optimizers of configure. Set them inside of it, or leave "
                    "configure out."
                )
        elif isinstance(self.optimizer, str):
            self._check_named(self.optimizer)
        elif not callable(self.optimizer):
            raise ConfigError(f"optimizer={self.optimizer!r} is neither a name nor a function of the parameters.")
        elif given:
            raise ConfigError(
                f"{' and '.join(given)} cannot reach an optimizer that is a function. Set them inside the "
                "function: optimizer=lambda params: torch.optim.SGD(params, lr=0.1)."
            )

    def build(
        self, module: nn.Module, *, rate_scale: float = 1.0, interval: Interval = "epoch"
    ) -> tuple[list[Optimizer], list[Schedule] | None]:
        """The optimizers of the module's parameters that require a gradient.

        Args:
            module: The module; a parameter that is in it twice is optimized once.
            rate_scale: What learning rates are multiplied by, those of groups included.
            interval: When schedulers of ``configure`` step that do not say it.

        Returns:
            The optimizers, and the schedules that ``configure`` made; None where it is not set.

        Raises:
            ConfigError: Nothing is to be trained, an entry of ``parameter_groups`` has no effect, the learning rate of
                a function is to be scaled, or a function returned something else.
        """
        trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
        if not trainable:
            raise ConfigError(
                f"The module {type(module).__name__} has nothing to train: none of its parameters requires a gradient. "
                "Leave some out of frozenParameters."
            )
        if isinstance(self.optimizer, str) and self.configure is None:
            kind = _NAMED[self.optimizer.lower()]
            arguments = self._arguments(rate_scale)
            if self.weight_decay is None and not self.parameter_groups:
                return [kind(trainable.values(), **arguments)], None
            return [kind(self._groups(trainable, rate_scale), **arguments)], None
        if rate_scale != 1.0:
            source = "configure" if self.configure is not None else "an optimizer that is a function"
            raise ConfigError(
                f"learningRateScaling would multiply the learning rate by {rate_scale:g}, but cannot reach {source}. "
                "Multiply inside of it, and use learningRateScaling='none'."
            )
        if self.configure is not None:
            return self._configured(module, interval)
        assert not isinstance(self.optimizer, str)
        made = _called(self.optimizer, trainable.values(), "The function given as optimizer")
        if not isinstance(made, Optimizer):
            raise ConfigError(f"The function given as optimizer returned {made!r}, not a torch.optim.Optimizer.")
        _check_takes_steps(made)
        return [made], None

    def _configured(self, module: nn.Module, interval: Interval) -> tuple[list[Optimizer], list[Schedule]]:
        assert self.configure is not None
        made = _called(self.configure, module, "configure")
        pair = isinstance(made, list | tuple) and len(made) == 2 and not isinstance(made[1], Optimizer)
        optimizers, schedulers = map(_listed, made if pair else (made, []))
        known = all(isinstance(one, Optimizer) for one in optimizers)
        if not optimizers or not known or not all(isinstance(one, LRScheduler | Schedule) for one in schedulers):
            raise ConfigError(
                f"configure returned {_shown(made)}. Return an optimizer, a list of them, or a pair of lists, "
                "(optimizers, schedulers), with schedulers of torch.optim.lr_scheduler or sparkdl.schedule.Schedule."
            )
        own = {id(value) for value in module.parameters()}
        for optimizer in optimizers:
            _check_takes_steps(optimizer)
            if own.isdisjoint(id(value) for group in optimizer.param_groups for value in group["params"]):
                raise ConfigError(
                    f"configure returned an optimizer ({type(optimizer).__name__}) of none of the parameters that are "
                    "trained. Ranks train a copy: take the parameters of the module that configure is given."
                )
        return optimizers, [one if isinstance(one, Schedule) else Schedule(one, interval) for one in schedulers]

    # ---- by name -----------------------------------------------------------------------------------------------------
    def _check_named(self, optimizer: str) -> None:
        """What can be known without the module.

        Raises:
            ConfigError: An unknown name, or values that the optimizer does not take.
        """
        kind = _NAMED.get(optimizer.lower())
        if kind is None:
            raise ConfigError(
                f"optimizer={optimizer!r} is unknown. Use one of {', '.join(optimizer_names())}, or a function "
                "of the parameters."
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learningRate={self.learning_rate} does not learn. Use a number above 0.")
        for name, value, key in (
            ("learningRate", self.learning_rate, "lr"),
            ("weightDecay", self.weight_decay, "weight_decay"),
        ):
            if value is not None and key in self.params:
                raise ConfigError(
                    f"{name}={value} and optimizerParams={dict(self.params)!r}, with {key!r}, are both set. Set one."
                )
        for pattern, group in self.parameter_groups.items():
            if not isinstance(group, Mapping):
                raise ConfigError(
                    f"parameterGroups has {pattern!r}: {group!r}, which is no dict. Give one, as in {{'lr': 0.01}}."
                )
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"parameterGroups has {pattern!r}, which is no regular expression: {error}."
                ) from error
        weights = [nn.Parameter(torch.zeros(1))]
        arguments = self._arguments(1.0)
        try:
            options = kind(weights, **arguments).defaults
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"optimizerParams={dict(self.params)!r} do not suit optimizer={optimizer!r}: {error}"
            ) from error
        if self.weight_decay is not None:
            if "weight_decay" not in options:
                raise ConfigError(f"optimizer={optimizer!r} knows no weight decay. Leave weightDecay out.")
            if not 0 <= self.weight_decay < math.inf:
                raise ConfigError(f"weightDecay={self.weight_decay} is no weight decay. Use a number, 0 or above.")
        for pattern, group in self.parameter_groups.items():
            if not group.keys() <= options.keys():
                raise ConfigError(
                    f"parameterGroups has {pattern!r}: {dict(group)!r}, but the options of optimizer={optimizer!r} are "
                    f"{', '.join(sorted(options))}."
                )
            try:
                kind(weights, **{**arguments, **group})
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"parameterGroups has {pattern!r}: {dict(group)!r}, which does not suit optimizer={optimizer!r}: "
                    f"{error}"
                ) from error

    def _arguments(self, rate_scale: float) -> dict[str, Any]:
        assert isinstance(self.optimizer, str)
        rate = DEFAULT_LEARNING_RATE if self.learning_rate is None else self.learning_rate
        arguments = _scaled({"lr": rate, **self.params}, rate_scale)
        chosen = arguments.keys() | {name for options in self.parameter_groups.values() for name in options}
        if _NAMED[self.optimizer.lower()] in _FUSED and not chosen & {
            "foreach",
            "fused",
            "differentiable",
            "capturable",
        }:
            arguments["fused"] = True
        return arguments

    def _groups(self, trainable: Mapping[str, nn.Parameter], rate_scale: float) -> list[dict[str, Any]]:
        """The parameters by their options, in the order of ``parameter_groups``; those without come last."""
        patterns = list(self.parameter_groups)
        options = [*self.parameter_groups.values(), {}]
        members: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, value in trainable.items():
            places = (place for place, pattern in enumerate(patterns) if re.search(pattern, name))
            place = next(places, len(patterns))
            spared = self.weight_decay is not None and value.ndim < 2 and "weight_decay" not in options[place]
            members.setdefault((place, spared), []).append(value)
        for place, pattern in enumerate(patterns):
            if not members.keys() & {(place, False), (place, True)}:
                taken = any(re.search(pattern, name) for name in trainable)
                reason = "patterns before it take all names that it is found in" if taken else "it is found in no name"
                raise ConfigError(
                    f"parameterGroups has {pattern!r}, which applies to no trained parameter: {reason}. The names are "
                    f"{', '.join(list(trainable)[:10])}{', ...' if len(trainable) > 10 else ''}."
                )
        groups = []
        for (place, spared), values in sorted(members.items(), key=lambda member: member[0]):
            decay = {} if self.weight_decay is None else {"weight_decay": 0.0 if spared else self.weight_decay}
            groups.append({"params": values, **decay, **_scaled(options[place], rate_scale)})
        return groups


def _called(function: Callable[[Any], Any], argument: Any, who: str) -> Any:
    """What a function of the user's returns.

    Raises:
        ConfigError: It raised something else than that.
    """
    try:
        return function(argument)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{who} failed: {type(error).__name__}: {error}") from error


def _scaled(options: Mapping[str, Any], rate_scale: float) -> dict[str, Any]:
    return {name: value * rate_scale if name == "lr" else value for name, value in options.items()}


def _check_takes_steps(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS computes the loss several times in one step, but here every step has one batch and one gradient. "
            f"Use one of {', '.join(optimizer_names())}."
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _shown(value: Any) -> str:
    """The types in what a function returned."""
    if isinstance(value, list | tuple):
        inside = ", ".join(_shown(entry) for entry in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return "None" if value is None else type(value).__name__
