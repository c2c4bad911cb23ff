"""What can be known to be wrong with a fit from its settings and its module alone, before anything runs."""

import copy
from collections.abc import Callable
from typing import get_args

import torch
from torch import nn

from sparkdl.config import (
    Averaging,
    CacheTier,
    Device,
    Interval,
    MonitorMode,
    NonFinite,
    Partitioning,
    Precision,
    RateScaling,
    Shuffle,
    TrainConfig,
)
from sparkdl.errors import ConfigError
from sparkdl.io.plan import ShardPlan
from sparkdl.optimization import Optimization
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import Strategy
from sparkdl.params import camel_case
from sparkdl.preparation import freeze_parameters
from sparkdl.schedule import SchedulerRecipe
from sparkdl.trial import has_lazy_parts

__all__ = ["build_module", "check_config", "check_optimization", "check_strategy", "floating_dtype"]

_CHOICES = {
    "shuffle": get_args(Shuffle),
    "device": get_args(Device),
    "cache": get_args(CacheTier),
    "partitioning": (None, *get_args(Partitioning)),
    "precision": get_args(Precision),
    "scheduler_interval": get_args(Interval),
    "learning_rate_scaling": get_args(RateScaling),
    "averaging": get_args(Averaging),
    "non_finite": get_args(NonFinite),
    "monitor_mode": get_args(MonitorMode),
}


def check_config(config: TrainConfig) -> None:
    """Refuse settings that make no sense, whatever the rows are.

    Raises:
        ConfigError: The first that does not.
    """
    least = {
        "max_epochs": 1,
        "batch_size": 1,
        "num_train_workers": 1,
        "micro_batch_size": 1,
        "num_shards": 1,
        "seed": 0,
        "reshuffle_interval": 1,
        "cache_bytes": 0,
        "reader_threads": 1,
        "checkpoint_interval": 1,
        "keep_checkpoints": 1,
        "max_restarts": 0,
        "min_workers": 1,
        "warmup_steps": 0,
        "base_batch_size": 1,
        "averaging_start": 1,
        "early_stopping_patience": 1,
        "early_stopping_min_delta": 0,
    }
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ConfigError(f"{camel_case(name)}={value} is too small. Use {bound} or more.")
    for name, known in _CHOICES.items():
        if getattr(config, name) not in known:
            names = ", ".join(choice for choice in known if choice is not None)
            raise ConfigError(f"{camel_case(name)}={getattr(config, name)!r} is not known. Use one of {names}.")
    _check_loop(config)
    for name in ("staging_dir", "checkpoint_dir", "tracking_dir"):
        directory = getattr(config, name)
        if directory is not None and not directory.startswith("/") and ":" not in directory:
            raise ConfigError(
                f"{camel_case(name)}={directory!r} is relative, but every executor has a working directory of its own. "
                "Use an absolute path or a URL that all executors reach."
            )
    if config.checkpoint_seconds is not None and not config.checkpoint_seconds > 0:
        raise ConfigError(f"checkpointSeconds={config.checkpoint_seconds:g} is too small. Use a number above 0.")
    for name in ("checkpoint_interval", "checkpoint_seconds"):
        if getattr(config, name) is not None and config.checkpoint_dir is None:
            raise ConfigError(
                f"{camel_case(name)}={getattr(config, name):g} says how often to write checkpoints, but not where to. "
                "Set checkpointDir."
            )
    if config.min_workers is not None and config.min_workers > config.num_train_workers:
        raise ConfigError(
            f"minWorkers={config.min_workers} is more than numTrainWorkers={config.num_train_workers}. Use "
            f"{config.num_train_workers} or less."
        )
    if config.num_shards is not None:
        ShardPlan((0,) * config.num_shards, config.batch_size)
    for needs, reason in (
        (config.shuffle == "full", "shuffle='full' permutes all rows of a shard"),
        (config.reshuffle_interval is not None, f"reshuffleInterval={config.reshuffle_interval} exchanges all rows"),
    ):
        if needs and config.cache == "none":
            raise ConfigError(f"{reason}, which takes a cache that holds them, but cache='none'. Use cache='auto'.")
    if config.reshuffle_interval is not None and config.balance_shards:
        raise ConfigError(
            f"reshuffleInterval={config.reshuffle_interval} and balanceShards=True exclude each other: a shard that "
            "changes its rank is read again from its files, which know nothing of the exchange. Use one of them."
        )
    if config.partition_key_col is not None and config.partitioning != "key":
        raise ConfigError(
            f"partitionKeyCol={config.partition_key_col!r} is set, but partitioning={config.partitioning!r}. Use "
            "partitioning='key'."
        )
    if config.partitioning == "key" and config.partition_key_col is None:
        raise ConfigError("partitioning='key' needs partitionKeyCol, the column whose equal values stay together.")


def _check_loop(config: TrainConfig) -> None:
    """The settings of the training loop."""
    for name in ("gradient_clip_norm", "gradient_clip_value"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{camel_case(name)}={value:g} leaves no gradient. Use a number above 0.")
    if not 0 <= config.averaging_decay < 1:
        raise ConfigError(
            f"averagingDecay={config.averaging_decay:g} is not the part of an average that is kept. Use a number from "
            "0 on and below 1, such as 0.999."
        )
    if config.averaging == "none" and config.averaging_start != 1:
        raise ConfigError(
            f"averagingStart={config.averaging_start} is set, but nothing is averaged. Set averaging='ema' or 'swa'."
        )
    if config.averaging != "none" and config.averaging_start > config.max_epochs:
        raise ConfigError(
            f"averagingStart={config.averaging_start} is after the last epoch (maxEpochs={config.max_epochs}): nothing "
            "would be averaged. Start earlier."
        )


def check_strategy(strategy: Strategy, module: nn.Module, config: TrainConfig) -> None:
    """Refuse a way to train in parallel that the ranks, the module or other settings do not allow.

    Raises:
        ConfigError: As said.
    """
    replicas = strategy.replicas(config.num_train_workers)
    shards = config.num_shards or replicas.dp_size
    if shards < replicas.dp_size:
        asked = f"numTrainWorkers={config.num_train_workers}"
        if not replicas.are_ranks(config.num_train_workers):
            asked += f" with {replicas.dp_size} replicas"
        raise ConfigError(
            f"{asked} is more than numShards={shards}: some ranks would have nothing to read. Use numShards >= "
            f"{replicas.dp_size}, best a multiple of it."
        )
    ShardPlan((0,) * shards, config.batch_size)
    moving = "balanceShards=True" if config.balance_shards else f"reshuffleInterval={config.reshuffle_interval}"
    moves = config.balance_shards or config.reshuffle_interval is not None
    if moves and not replicas.are_ranks(config.num_train_workers):
        raise ConfigError(
            f"{moving} moves rows between ranks that each hold the whole module, but strategy={strategy.name!r} has "
            f"{replicas.dp_size} replicas on {config.num_train_workers} ranks. Leave it out."
        )
    strategy.check(module, config)


def check_optimization(
    module: nn.Module, optimizer: OptimizerRecipe, scheduler: SchedulerRecipe | None, config: TrainConfig
) -> None:
    """Make the optimizers and schedules once, and throw them away.

    Raises:
        ConfigError: They do not suit the module, or each other.
    """
    if has_lazy_parts(module):
        return
    if config.precision != "32" and floating_dtype(module) == "float64":
        raise ConfigError(
            f"precision={config.precision!r} has no effect on {type(module).__name__}, which computes in float64: "
            "torch.autocast leaves that alone. Use precision='32', or a module of float32."
        )
    frozen = freeze_parameters(module, config.frozen_parameters)
    try:
        Optimization(module, optimizer, scheduler, config, steps_per_epoch=1)
    finally:
        for value in frozen:
            value.requires_grad_(True)


def build_module(module: nn.Module | Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module of our own: a copy of the caller's, or what the caller's function makes under the seed.

    Raises:
        ConfigError: There is no module to be had, or nothing in it to train.
    """
    if isinstance(module, nn.Module):
        try:
            made = copy.deepcopy(module)
        except Exception as error:
            raise ConfigError(
                f"The module {type(module).__name__} cannot be copied: {error}. It must be picklable to travel to the "
                "executors; keep locks, sockets and open files out of it."
            ) from error
    else:
        if not callable(module):
            raise ConfigError(f"module={module!r} is neither an nn.Module nor a function that returns one.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = module()
        if not isinstance(made, nn.Module):
            raise ConfigError(f"The function given as module returned {made!r}, not an nn.Module.")
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise ConfigError(f"The module {type(made).__name__} has no parameter that could be trained.")
    return made.train()


def floating_dtype(module: nn.Module) -> str:
    """Name of the dtype that the module computes in."""
    for parameter in module.parameters():
        if parameter.dtype in (torch.float32, torch.float64):
            return str(parameter.dtype).removeprefix("torch.")
    return "float32"
