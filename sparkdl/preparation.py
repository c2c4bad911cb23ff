"""What is done to a rank's own copy of the module before it is trained; names and state stay as they were."""

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.parallel.batch_norm import SyncBatchNorm

__all__ = ["check_preparation", "compile_module", "freeze_parameters", "prepare_module"]

logger = logging.getLogger(__name__)


def check_preparation(module: nn.Module, config: TrainConfig) -> None:
    """Refuse patterns that match nothing, and whatever leaves nothing to train.

    Raises:
        ConfigError: As said.
    """
    frozen = _frozen(module, config.frozen_parameters)
    if not any(value.requires_grad for name, value in module.named_parameters() if name not in frozen):
        raise ConfigError(
            f"frozenParameters={list(config.frozen_parameters)!r} leave no parameter of {type(module).__name__} to "
            "train. Use narrower patterns."
        )
    _checkpointed(module, config.activation_checkpointing)
    norms = any(isinstance(part, _BatchNorm) for part in module.modules())
    if config.sync_batch_norm and not norms:
        raise ConfigError(
            f"syncBatchNorm=True, but {type(module).__name__} has no BatchNorm layer. Leave it out, or check the "
            "module."
        )


def freeze_parameters(module: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Let the parameters whose names a pattern is found in get no gradient; those that had one until now."""
    names = _frozen(module, patterns)
    frozen = [value for name, value in module.named_parameters() if name in names and value.requires_grad]
    for value in frozen:
        value.requires_grad_(False)
    return frozen


def prepare_module(module: nn.Module, config: TrainConfig) -> nn.Module:
    """Have activations computed again, and BatchNorm synchronised, where that was asked for.

    Args:
        module: The rank's own module, on its device.
        config: How to train.

    Returns:
        The module, or what stands in its place.
    """
    for part in _checkpointed(module, config.activation_checkpointing):
        part.forward = _Recomputed(part.forward)
    return SyncBatchNorm.convert(module) if config.sync_batch_norm else module


def compile_module(module: nn.Module, try_on: Callable[[], Any]) -> bool:
    """Compile a module in place with `torch.compile`, unless that fails.

    Args:
        module: The rank's own module.
        try_on: One forward and backward of it.

    Returns:
        False where the module is left as it was; a warning says why.
    """
    module.compile()
    try:
        try_on()
    except Exception as error:
        module._compiled_call_impl = None
        torch._dynamo.reset()
        logger.warning(
            "torchCompile=True, but torch.compile failed on this module: %s: %s. The rank goes on without it.",
            type(error).__name__,
            str(error).strip().partition("\n")[0],
        )
        return False
    return True


class _Recomputed:
    """A forward that keeps no activations; see `torch.utils.checkpoint`."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = functools.partial(checkpoint, forward, use_reentrant=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def _frozen(module: nn.Module, patterns: Sequence[str]) -> set[str]:
    names = [name for name, _ in module.named_parameters()]
    return _matched("frozenParameters", patterns, names, re.search, "parameter")


def _checkpointed(module: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    parts = {name: part for name, part in module.named_modules() if name}
    found = _matched("activationCheckpointing", patterns, list(parts), re.fullmatch, "submodule")
    return [part for name, part in parts.items() if name in found]


def _matched(
    param: str, patterns: Sequence[str], names: Sequence[str], match: Callable[[str, str], Any], what: str
) -> set[str]:
    """The names that some pattern matches; every pattern has to match one."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            own = {name for name in names if match(pattern, name)}
        except re.error as error:
            raise ConfigError(f"{param}: {pattern!r} is no regular expression: {error}.") from error
        if not own:
            raise ConfigError(
                f"{param}: {pattern!r} matches no {what}. There are {', '.join(names[:10]) or 'none'}"
                f"{', ...' if len(names) > 10 else ''}."
            )
        found |= own
    return found
