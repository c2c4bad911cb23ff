"""The training loop without Spark: in this process alone, or in the processes that `torchrun` starts.

The loop is the one that the Estimators run on a cluster. What Spark does there is done by torchrun here: it starts the
processes, and starts them again.
"""

import contextlib
import copy
import gc
import itertools
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from sparkdl.barrier.device import select_device
from sparkdl.barrier.process_group import environment, interface_of
from sparkdl.barrier.world import World, world_of
from sparkdl.best import monitor_mode
from sparkdl.callbacks import Callback, Callbacks, check_callbacks
from sparkdl.checkpoint import CheckpointStore, open_saver
from sparkdl.checks import build_module, check_config, check_strategy
from sparkdl.config import Device, Timeouts, TrainConfig
from sparkdl.errors import ConfigError, SparkdlError
from sparkdl.history import History
from sparkdl.io.exchange import gather_texts
from sparkdl.io.in_memory import TensorRows, open_rows
from sparkdl.metrics import Metrics, check_metrics
from sparkdl.objective import Loss, Objective, Step, TrainingStep, build_loss
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import DEFAULT_OPTIMIZER, OptimizerRecipe
from sparkdl.parallel import Setting, Strategy, build_strategy
from sparkdl.preparation import check_preparation, compile_module, freeze_parameters, prepare_module
from sparkdl.schedule import SchedulerRecipe
from sparkdl.serialization import load_state, state_of
from sparkdl.trainer import Trainer
from sparkdl.trial import leave_no_trace, try_module

__all__ = ["FitResult", "TensorRows", "fit_module", "process_group_from_environment"]

logger = logging.getLogger(__name__)

Event = dict[str, Any]
_GROUPS = itertools.count()  # torchrun's store outlives a group: the next one must not read its keys
_EXAMPLE_ROWS = 2
_ELSEWHERE = {
    "partition_key_col": "Use partitioning='sample' or 'batch'.",
    "reshuffle_interval": "Rows stay in their shards; num_shards=1 per process mixes them best.",
    "cache": "Move the tensors where they shall be.",
    "cache_bytes": "The rows are in memory already.",
    "reader_threads": "The rows are in memory already.",
    "standardization": "Standardise the tensors before.",
    "staging_dir": "The rows are in memory already.",
    "validation_fraction": "Cut the tensors, and give validation=TensorRows(...).",
    "tracking_dir": "Give on_event, which is called with all that happens.",
    "max_restarts": "Start with torchrun --max-restarts, and fit with resume=True.",
    "min_workers": "Start with torchrun --nnodes MIN:MAX, and fit with resume=True.",
}


@dataclass(frozen=True, eq=False)
class FitResult:
    """What came of a fit.

    Attributes:
        module: The trained module, on the CPU and in eval mode; on every process the same.
        history: One record per epoch; see `sparkdl.trainer.Trainer.fit`.
        best_epoch: The epoch with the best value of 'monitor', from 1; 0 where there was none.
        device: Where this process trained.
        seconds: What the time of this process went into, by name.
    """

    module: nn.Module
    history: History
    best_epoch: int
    device: torch.device
    seconds: Mapping[str, float]


@contextlib.contextmanager
def process_group_from_environment(
    device: Device = "auto", *, timeouts: Timeouts | None = None
) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for the time of the block; a process of its own is a group of one.

    Reads what torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). On one host,
    gloo is bound to the loopback interface; on several, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME say which. What
    processes tell each other is neither encrypted nor authenticated.

    Args:
        device: Where to train; decides between NCCL and gloo.
        timeouts: ``rendezvous`` and ``collective`` count; None: the defaults of `Timeouts`.

    Yields:
        The device of this process.

    Raises:
        ConfigError: A group is up already, or only some of the variables are set.
        LaunchError: ``"cuda"`` was asked, and there is no GPU for this process.
    """
    if dist.is_initialized():
        raise ConfigError("A process group is up already. Leave it first, or call fit_module inside of it.")
    limits = timeouts or Timeouts()
    rank, world_size, local_rank, local_world_size = _place()
    chosen = select_device(device, gpu_addresses=(), local_rank=local_rank, local_world_size=local_world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    loopback = interface_of("127.0.0.1") if local_world_size == world_size else None
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    with environment({name: loopback for name in names if loopback and name not in os.environ}):
        store: Any
        if world_size == 1:
            store = dist.HashStore()  # type: ignore[attr-defined]
        else:
            store, _, _ = next(rendezvous("env://", timeout=limits.rendezvous))
        dist.init_process_group(
            backend="nccl" if chosen.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"sparkdl/{next(_GROUPS)}", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=limits.collective,
        )
        try:
            yield chosen
        except BaseException:
            if world_size == 1:  # others would have to be waited for; torchrun ends them
                dist.destroy_process_group()
            raise
        gc.collect()  # a DDP in a cycle must not outlive the group, see DataParallel.close
        dist.barrier()
        dist.destroy_process_group()


def fit_module(
    module: nn.Module | Callable[[], nn.Module],
    rows: TensorRows,
    *,
    validation: TensorRows | None = None,
    loss: Loss | None = None,
    training_step: Step | None = None,
    prediction_step: Step | None = None,
    optimizer: str | Callable[..., Any] | OptimizerRecipe = DEFAULT_OPTIMIZER,
    learning_rate: float | None = None,
    scheduler: str | Callable[..., Any] | SchedulerRecipe | None = None,
    strategy: str | Strategy = "ddp",
    config: TrainConfig | None = None,
    metrics: Any = None,
    callbacks: Sequence[Callback] = (),
    on_event: Callable[[Event], None] | None = None,
    resume: bool = False,
) -> FitResult:
    """Train a module on rows in memory.

    All processes call it, with the same arguments and the same rows; each trains on its part of them. Without a process
    group it opens one as `process_group_from_environment` does. Random number generators are left as they were.

    Args:
        module: The module, which is copied, or a function that returns one.
        rows: The training rows, all of them on every process.
        validation: The validation rows, likewise.
        loss: A name, a torch loss, or a function of (output, label).
        training_step: Instead of ``loss``, a function from (module, dict of tensors by name) to the loss, or to a dict
            of ``"loss"`` and further numbers.
        prediction_step: A function from (module, dict of inputs) to the output that metrics see.
        optimizer: A name, a function from parameters to an optimizer, or a recipe.
        learning_rate: For a name.
        scheduler: A name, a function from an optimizer to a scheduler, or a recipe.
        strategy: How the processes train together: a name, or an object of `sparkdl.parallel`.
        config: How to train; None: the defaults. ``checkpoint_dir`` is the directory of this run alone.
        metrics: Of the validation rows: a list of names and torchmetrics objects, or a dict of them.
        callbacks: Called in every process; the objects themselves, not copies.
        on_event: Called in one process with what the driver's trackers get on a cluster: "plan", "step" and "epoch".
        resume: Go on from the newest checkpoint of ``checkpoint_dir``; begin anew where there is none.

    Raises:
        ConfigError: The first setting that makes no sense.
        DataError: No rows, or processes that hold different ones.
        FloatingPointError: The loss is no longer a number.
        CallbackError: A callback raised.
    """
    config = _checked(config or TrainConfig(), resume=resume)
    recipe = _optimizer(optimizer, learning_rate)
    schedule = _scheduler(scheduler, config)
    chosen = build_strategy(strategy)
    check_metrics(metrics)
    own = build_module(module, config.seed)
    check_preparation(own, config)
    objective = _objective(rows, loss, training_step, prediction_step)
    with contextlib.ExitStack() as stack:
        if not dist.is_initialized():
            stack.enter_context(process_group_from_environment(config.device, timeouts=config.timeouts))
        world = world_of(dist.get_rank(), gather_texts(platform.node(), dist.group.WORLD))
        replicas = chosen.replicas(world.world_size)
        config = _for_world(config, world, replicas.dp_size)
        check_strategy(chosen, own, config)
        place = replicas.place_of(world.rank)
        device = select_device(
            config.device, gpu_addresses=(), local_rank=world.local_rank, local_world_size=world.local_world_size
        )
        data = open_rows(
            rows,
            config,
            rank=world.rank,
            world_size=world.world_size,
            dealt=place.shards(config.num_shards or 1),
            validation=validation,
            pin=device.type == "cuda" and rows.batch.inputs[0].device.type == "cpu",
        )
        _check_same(f"rows and settings {data.fingerprint}, validation {validation and validation.digest()}")
        store, name, written_by = _open_store(config, world, resume=resume)

        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(config.seed)  # of the weights of lazy modules
        trainable = {name for name, value in own.named_parameters() if value.requires_grad}
        freeze_parameters(own, config.frozen_parameters)
        example = rows.batch.part(0, _EXAMPLE_ROWS)
        columns = rows.columns
        sample = dict(zip([column.name for column in columns], _tensors(example.to(torch.device("cpu"))), strict=True))
        trial = try_module(own, objective, sample, columns, validates=validation is not None and len(validation) > 0)
        result = copy.deepcopy(own)  # what is done to a module for its training stays out of what the caller gets
        for parameter_name, value in result.named_parameters():
            value.requires_grad_(parameter_name in trainable)
        trained = prepare_module(own.to(device), config)
        objective.to(device)
        example = example.to(device)
        if config.torch_compile:
            compile_module(trained, lambda: leave_no_trace(trained, objective, example))
        chosen.prepare(
            trained,
            objective,
            optimization_builder(recipe, schedule, config, steps_per_epoch=data.plan.num_steps),
            config,
            Setting(example, find_unused_parameters=trial.unused, hosts=world.hosts, resumes=written_by),
        )
        if world.world_size == 1:  # nobody waits for it: it lets go of its group whatever happens
            stack.callback(chosen.close)
        with open_saver(store, config, data.plan.num_steps) as saver:
            trainer = Trainer(
                chosen,
                objective,
                config,
                device=device,
                has_validation=validation is not None and len(validation) > 0,
                metrics=Metrics(metrics, kind="any", device=device) if metrics else None,
                logged=trial.logged,
                validated=trial.validated,
                callbacks=Callbacks(check_callbacks(callbacks)),
                report=_reporter(config, on_event),
                saver=saver,
            )
            if store is not None and name is not None:
                trainer.load_state_dict(data, store.load(name))
            if on_event is not None and place.leads and not place.dp_rank:
                on_event(_plan_event(config, data.plan.num_rows, data.plan.num_steps, data.position, device))
            history = trainer.fit(data)
        weights = {key: value.detach().cpu() for key, value in state_of(trainer.gather()).items()}
        if world.world_size > 1:
            chosen.close()
        load_state(result, weights)
        return FitResult(result.eval(), History(history), trainer.best_epoch, device, dict(trainer.seconds))


# ---- before the processes meet ---------------------------------------------------------------------------------------
def _place() -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size, as torchrun says."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found.keys() & {"RANK", "WORLD_SIZE"}:
        return 0, 1, 0, 1
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(
            f"The environment has {' and '.join(found)}, but not {' and '.join(missing)}. Start with torchrun, which "
            "sets all of them, or unset them to train in this process alone."
        )
    rank, world_size, local_rank, local_world_size = (int(found[name]) for name in names)
    return rank, world_size, local_rank, local_world_size


def _checked(config: TrainConfig, *, resume: bool) -> TrainConfig:
    """The settings, if they make sense for rows in memory.

    Raises:
        ConfigError: The first that does not.
    """
    defaults = {one.name: one.default for one in fields(TrainConfig) if one.default is not MISSING}
    for name, advice in _ELSEWHERE.items():
        value = getattr(config, name)
        if value != defaults[name]:
            raise ConfigError(f"{name}={value!r} has no effect on rows in memory. {advice}")
    if resume and config.checkpoint_dir is None:
        raise ConfigError("resume=True needs checkpoint_dir, the directory that the run wrote its checkpoints to.")
    directory = config.checkpoint_dir
    if directory is not None and ":" not in directory:
        config = replace(config, checkpoint_dir=os.path.abspath(directory))
    check_config(replace(config, num_shards=config.num_shards or config.num_train_workers))
    return config


def _optimizer(optimizer: str | Callable[..., Any] | OptimizerRecipe, learning_rate: float | None) -> OptimizerRecipe:
    if not isinstance(optimizer, OptimizerRecipe):
        return OptimizerRecipe(optimizer, learning_rate)
    if learning_rate is not None:
        raise ConfigError(f"learning_rate={learning_rate:g} is set beside a recipe. Set it in the OptimizerRecipe.")
    return optimizer


def _scheduler(
    scheduler: str | Callable[..., Any] | SchedulerRecipe | None, config: TrainConfig
) -> SchedulerRecipe | None:
    if scheduler is None or isinstance(scheduler, SchedulerRecipe):
        return scheduler
    mode = monitor_mode(config.monitor or "loss", config.monitor_mode)
    return SchedulerRecipe(scheduler, interval=config.scheduler_interval, mode=mode)


def _objective(
    rows: TensorRows, loss: Loss | None, training_step: Step | None, prediction_step: Step | None
) -> Objective:
    if (loss is None) == (training_step is None):
        raise ConfigError("Give either a loss or a training_step: one of them says what is minimised.")
    if training_step is not None:
        return TrainingStep(training_step, rows.columns, prediction_step=prediction_step)
    assert loss is not None
    names = [column.name for column in rows.columns.inputs]
    return Objective(build_loss(loss), prediction_step=prediction_step, input_names=names)


# ---- once they have met ----------------------------------------------------------------------------------------------
def _for_world(config: TrainConfig, world: World, dp_size: int) -> TrainConfig:
    asked = config.num_train_workers
    if asked not in (1, world.world_size):
        raise ConfigError(
            f"num_train_workers={asked}, but there are {world.world_size} processes. Leave it out, or start with "
            f"torchrun --nproc-per-node {asked}."
        )
    config = replace(config, num_train_workers=world.world_size, num_shards=config.num_shards or dp_size)
    check_config(config)
    return config


def _check_same(facts: str) -> None:
    """Raise on all processes alike where they hold different rows.

    Raises:
        ConfigError: They do.
    """
    everyone = gather_texts(facts, dist.group.WORLD)
    other = next((rank for rank, text in enumerate(everyone) if text != everyone[0]), None)
    if other is not None:
        raise ConfigError(
            f"Process {other} has other rows or settings than process 0: {everyone[other]} and {everyone[0]}. Every "
            "process needs all rows: load the same files, or make them under the same seed."
        )


def _open_store(
    config: TrainConfig, world: World, *, resume: bool
) -> tuple[CheckpointStore | None, str | None, str | None]:
    """The run's checkpoints, the name of the one to go on from, and what strategy wrote it.

    On every process the same, or the same error.
    """
    if config.checkpoint_dir is None:
        return None, None, None
    store = CheckpointStore(config.checkpoint_dir, keep=config.keep_checkpoints)
    found, strategy, error = "", "", ""
    if world.rank == 0:
        try:
            newest = store.newest()
            if newest is not None:
                found, strategy = newest.name, newest.facts["strategy"]
        except SparkdlError as failed:
            error = str(failed)
    found, strategy, error = json.loads(gather_texts(json.dumps([found, strategy, error]), dist.group.WORLD)[0])
    if error:
        raise ConfigError(error)
    if found and not resume:
        raise ConfigError(
            f"checkpoint_dir={config.checkpoint_dir!r} holds checkpoints of an earlier run, up to {found}. Go on from "
            "there with resume=True, or use another directory."
        )
    return store, found or None, strategy or None


# ---- what is told ----------------------------------------------------------------------------------------------------
def _reporter(config: TrainConfig, on_event: Callable[[Event], None] | None) -> Callable[[Event], None]:
    def report(event: Event) -> None:
        if event["event"] == "epoch" and config.verbose:
            logger.info("%s", _line(event, config.max_epochs))
        if on_event is not None:
            on_event(event)

    return report


def _line(record: Mapping[str, Any], num_epochs: int) -> str:
    """An epoch in one line."""
    told = [name for name in record if name == "loss" or name.startswith("validation_")]
    values = [f"{name} {record[name]:.4g}" for name in told if name != "validation_seconds"]
    return (
        f"epoch {record['epoch']} of {num_epochs}: {', '.join(values)}; {record['seconds']:.2f} s, "
        f"{record['rows_per_second']:,.0f} rows/s, data wait {record['data_wait']:.0%}, synchronisation "
        f"{record['synchronisation']:.0%}"
    )


def _plan_event(config: TrainConfig, rows: int, steps: int, position: tuple[int, int], device: torch.device) -> Event:
    return {
        "event": "plan",
        "epochs": config.max_epochs,
        "steps": steps,
        "rows": rows,
        "shards": config.num_shards,
        "cache": "tensors in memory",
        "batch_size": config.batch_size,
        "world_size": config.num_train_workers,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "resumed": position[0] * steps + position[1],
    }


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [*batch.inputs, *batch.labels, *([] if batch.weight is None else [batch.weight])]
