"""What one barrier task does: open its data, meet the others, train, report."""

import contextlib
import json
import pickle
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import nn

from sparkdl.barrier.context import RankContext
from sparkdl.barrier.device import available_cores, select_device, thread_count
from sparkdl.barrier.launch import chunks
from sparkdl.barrier.rendezvous import Entry, error_of
from sparkdl.batch import Batch
from sparkdl.callbacks import Callback, Callbacks
from sparkdl.checkpoint import CheckpointStore, open_saver
from sparkdl.config import Columns, RunSpec
from sparkdl.errors import ConfigError, DataError, Failure
from sparkdl.history import History
from sparkdl.io.batches import RankData
from sparkdl.io.decode import Layout, Transform, layout_of
from sparkdl.io.in_place import InPlace
from sparkdl.io.stage import Facts, StagedDataset
from sparkdl.io.validation import DATASET, NoValidationRows, needs_validation
from sparkdl.learning_rate import LearningRateSearch
from sparkdl.objective import Objective
from sparkdl.optimization import optimization_builder
from sparkdl.optimizer import OptimizerRecipe
from sparkdl.parallel import Setting, Strategy
from sparkdl.preparation import compile_module, freeze_parameters, prepare_module
from sparkdl.schedule import SchedulerRecipe
from sparkdl.serialization import dump_weights
from sparkdl.source import Source, open_source
from sparkdl.trainer import Trainer
from sparkdl.trial import Trial, leave_no_trace, materialise, try_module

if TYPE_CHECKING:
    from sparkdl.metrics import Kind, Metrics

__all__ = ["RankResult", "Recipe", "run_rank"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user gave to be trained with, pickled once on the driver.

    Attributes:
        module: The module, untrained.
        objective: The loss, and how the module is called.
        strategy: How the ranks train it together.
        optimizer: How to make the optimizers.
        scheduler: How to make their schedules, if any.
        transform: The user's function on columns.
        metrics: As `sparkdl.metrics.Metrics` takes them.
        kind: What the labels are to metrics.
        callbacks: The user's code.
    """

    module: nn.Module
    objective: Objective
    strategy: Strategy
    optimizer: OptimizerRecipe
    scheduler: SchedulerRecipe | None
    transform: Transform | None
    metrics: Any
    kind: "Kind"
    callbacks: tuple[Callback, ...]


@dataclass(frozen=True, slots=True)
class RankResult:
    """What comes back to the driver.

    Attributes:
        history: One record per epoch.
        weights: Rank 0's weights as safetensors; empty from other ranks.
        device: Where the rank trained.
        threads: Torch threads of the rank.
        rows: Training rows that the rank counted in its last epoch: 0 where another one of its replica does.
        shards: The shards that it read then.
        inputs: Name of the dtype and shape of one row of each input.
        outputs: Values per row of the module's output; 2 where it is the one logit of a classifier.
        dropped: Rows of all ranks that were left out for their nulls.
        cache: Where decoded rows were kept, in words.
        vocabularies: Words that were learnt, by column.
        moments: Mean and scale of the inputs that were standardised, by field.
        seconds: What the rank's time went into.
        memory: Most bytes that the rank used: of the GPU that it trained on, else of its process.
        micro_batch_size: Rows of one forward at most, in the end.
        best_epoch: The epoch with the best value of 'monitor', from 1; 0 where there was none.
        strategy: What trained it; what was chosen, where it was chosen on the ranks.
        rate_search: What was found where learning rates were searched; None where the rank trained.
    """

    history: History
    weights: bytes
    device: str
    threads: int
    rows: int
    shards: list[int]
    inputs: list[tuple[str, list[int]]]
    outputs: int
    dropped: int
    cache: str
    vocabularies: dict[str, list[str]]
    moments: dict[str, list[list[float]]]
    seconds: dict[str, float]
    memory: int
    micro_batch_size: int | None
    best_epoch: int
    strategy: str
    rate_search: LearningRateSearch | None

    def to_chunks(self) -> Iterator[bytes]:
        """The result in pieces that a Spark row carries easily."""
        facts = asdict(self)
        del facts["weights"]
        yield json.dumps(facts).encode()
        yield from chunks(self.weights)

    @classmethod
    def of_chunks(cls, parts: list[bytes]) -> "RankResult":
        """The inverse of `to_chunks`."""
        facts = json.loads(parts[0])
        searched = facts["rate_search"]
        if searched is not None:
            rates = {name: tuple(searched[name]) for name in ("learning_rates", "losses", "smoothed")}
            facts["rate_search"] = LearningRateSearch(**rates, lag=searched["lag"], stopped=searched["stopped"])
        return cls(**facts, weights=b"".join(parts[1:]))


def run_rank(
    spec: RunSpec,
    staged: StagedDataset | None,
    in_place: InPlace | None,
    rank: RankContext,
    batches: Iterator[pa.RecordBatch],
) -> Iterator[bytes]:
    """Train as one rank, from the first row to the result.

    Args:
        spec: What to train and how.
        staged: The rows that all ranks reach; None to spool ``batches``.
        in_place: Set where these are the user's own Parquet files.
        rank: Who this is.
        batches: This rank's partition of the DataFrame.

    Yields:
        The chunks of a `RankResult`.

    Raises:
        SparkdlError: What any rank found wrong before joining; the same on every rank.
    """
    config = spec.config
    store = None if spec.checkpoint_url is None else CheckpointStore(spec.checkpoint_url, keep=config.keep_checkpoints)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(config.seed)  # of the weights of lazy modules

        def prepare() -> tuple[str, dict[str, Any], _Ready]:
            """Everything that may fail alone: read, build, and try one forward."""
            recipe: Recipe = pickle.loads(spec.payload)
            module, objective = recipe.module, recipe.objective
            freeze_parameters(module, config.frozen_parameters)
            place = recipe.strategy.replicas(rank.world.world_size).place_of(rank.world.rank)
            rows = open_source(spec, staged, in_place, rank.world, place, batches, recipe.transform)
            source = stack.enter_context(rows)
            device = select_device(
                config.device,
                gpu_addresses=rank.gpu_addresses,
                local_rank=rank.world.local_rank,
                local_world_size=rank.world.local_world_size,
            )
            trial, error = Trial(False, 0, (), ()), None
            sample, own = source.sample(), source.facts()
            if sample is not None:
                try:
                    trial = try_module(module, objective, sample, spec.columns, validates=bool(own["validation"]))
                except ConfigError as found:
                    # Told to the others beside the layouts: rows of different shapes explain it better.
                    error = asdict(rank.failure(found))
            newest = store.newest() if store is not None and rank.world.rank == 0 and spec.attempt > 1 else None
            facts = {
                **own,
                "checkpoint": newest and newest.name,
                "strategy": newest and newest.facts["strategy"],
                "layout": layout_of(sample, spec.columns) if sample is not None else None,
                "unused": trial.unused,
                "outputs": trial.outputs,
                "logged": trial.logged,
                "validated": trial.validated,
                "error": error,
            }
            fingerprint = json.dumps([spec.run_id, device.type, source.fingerprint])
            return fingerprint, facts, _Ready(source, recipe, device, sample)

        entries, ready = rank.agree(prepare)
        with rank.unanimously():
            found = _agreed(entries, spec.columns)
            _check_classes(spec, found.outputs, found.facts)
            if spec.columns.validation is not None and not found.has_validation:
                needed_by = needs_validation(config, metrics=bool(ready.recipe.metrics))
                NoValidationRows(spec.columns, config, needed_by).check()
        recipe, device = ready.recipe, ready.device
        module, objective = recipe.module, recipe.objective
        inputs = [found.layout[column.field] for column in spec.columns.inputs]
        if not entries[rank.world.rank].facts["layout"]:  # a rank without rows still needs a module of the right shape
            materialise(module, objective, inputs)

        threads = thread_count(
            cores=available_cores(), local_world_size=rank.world.local_world_size, task_cpus=rank.task_cpus
        )
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            stack.callback(torch.cuda.empty_cache)  # more of a CUDA context lives as long as the process
            torch.cuda.reset_peak_memory_stats(device)
        module = prepare_module(module.to(device), config)
        objective.to(device)
        with rank.process_group(
            device,
            rendezvous_timeout=config.timeouts.rendezvous,
            collective_timeout=config.timeouts.collective,
        ):
            data, learnt = ready.source.open_data(found.shard_rows, found.layout, device, threads)
            clock = rank.clock
            strategy = recipe.strategy
            example = _example(ready.sample, found.layout, spec.columns, device)
            if config.torch_compile and example.rows:
                compile_module(module, lambda: leave_no_trace(module, objective, example))
            strategy.prepare(
                module,
                objective,
                optimization_builder(recipe.optimizer, recipe.scheduler, config, steps_per_epoch=data.plan.num_steps),
                config,
                Setting(
                    example,
                    find_unused_parameters=found.unused,
                    hosts=rank.world.hosts,
                    on_computed=lambda: clock.at("reduce", clock.place.step),
                    resumes=entries[0].facts["strategy"],
                ),
            )
            with open_saver(store, spec.config, data.plan.num_steps) as saver:
                trainer = Trainer(
                    strategy,
                    objective,
                    config,
                    device=device,
                    has_validation=found.has_validation,
                    metrics=_build_metrics(recipe, device),
                    logged=found.logged,
                    validated=found.validated,
                    callbacks=Callbacks(recipe.callbacks),
                    report=_reporter(rank),
                    clock=clock,
                    saver=saver,
                )
                name = entries[0].facts["checkpoint"]
                if store is not None and name is not None:
                    clock.at("checkpoint", 0)
                    trainer.load_state_dict(data, store.load(name))
                if rank.world.rank == 0:
                    _announce(spec, rank, device, threads, data)
                searched = trainer.search_learning_rate(data, *spec.rate_search) if spec.rate_search else None
                history = trainer.fit(data) if searched is None else History()
            trained = trainer.gather()
            strategy.close()
        result = RankResult(
            history=history,
            weights=dump_weights(trained) if rank.world.rank == 0 else b"",
            device=str(device),
            threads=threads,
            rows=data.rows if ready.source.place.leads else 0,
            shards=list(data.dealt),
            inputs=[(dtype, list(shape)) for dtype, shape in inputs],
            outputs=found.outputs,
            dropped=found.facts.dropped,
            cache=data.cache.plan.reason,
            vocabularies=learnt.vocabularies,
            moments=learnt.moments,
            seconds=trainer.seconds,
            memory=_peak_memory(device),
            micro_batch_size=strategy.micro_batch_size,
            best_epoch=trainer.best_epoch,
            strategy=str(strategy),
            rate_search=searched,
        )
        yield from result.to_chunks()


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a rank has in hand when it meets the others."""

    source: Source
    recipe: Recipe
    device: torch.device
    sample: Mapping[str, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What is true of all ranks together.

    Attributes:
        facts: Of their rows.
        shard_rows: Rows of every shard.
        layout: Of decoded rows.
        has_validation: True where any rank has validation rows.
        unused: True where some parameters have no part in the output.
        outputs: Values per row of the output.
        logged: Names of what a training step returns besides the loss.
        validated: Names of what it returns of validation rows.
    """

    facts: Facts
    shard_rows: tuple[int, ...]
    layout: Layout
    has_validation: bool
    unused: bool
    outputs: int
    logged: tuple[str, ...]
    validated: tuple[str, ...]


def _agreed(entries: tuple[Entry, ...], columns: Columns) -> _Agreed:
    """What is true of all ranks' rows together; the same, or the same error, on every rank."""
    facts = Facts()
    for entry in entries:
        facts = facts.merge(Facts.of_json(entry.facts["rows"]), columns)
    rows = {int(shard): count for entry in entries for shard, count in entry.facts["shards"].items()}
    has_validation = any(entry.facts["validation"] for entry in entries)
    if not sum(rows.values()):
        marked = has_validation and columns.validation is not None and columns.validation.name != DATASET
        hint = " All rows are marked for validation." if marked else ""
        raise DataError(f"The DataFrame has no rows to train on.{hint} Check the filters and joins before fit.")
    errors = {entry.rank: Failure(**entry.facts["error"]) for entry in entries if entry.facts["error"]}
    if errors:
        raise error_of(errors)
    layouts = [entry.facts["layout"] for entry in entries if entry.facts["layout"]]
    layout = {field: (dtype, tuple(shape)) for field, (dtype, shape) in layouts[0].items()}
    for column in columns:
        seen = {json.dumps(other[column.field]): other[column.field] for other in layouts}
        if len(seen) > 1:
            shapes = " and ".join(f"{tuple(shape)} of {dtype}" for dtype, shape in seen.values())
            raise DataError(
                f"{column.name!r} has shape {shapes} per row on different ranks. Every row needs the same: check the "
                "transform, or pad or cut the column before fit."
            )
    return _Agreed(
        facts,
        tuple(rows[shard] for shard in range(len(rows))),
        layout,
        has_validation,
        any(entry.facts["unused"] for entry in entries),
        max(entry.facts["outputs"] for entry in entries),
        *(
            tuple(next((entry.facts[key] for entry in entries if entry.facts[key]), ()))
            for key in ("logged", "validated")
        ),
    )


def _build_metrics(recipe: Recipe, device: torch.device) -> "Metrics | None":
    if not recipe.metrics:
        return None
    from sparkdl.metrics import Metrics  # torchmetrics takes most of a second to import

    return Metrics(recipe.metrics, kind=recipe.kind, device=device)


def _peak_memory(device: torch.device) -> int:
    """Most bytes that were in use: of the GPU since the fit began, of a process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _check_classes(spec: RunSpec, classes: int, facts: Facts) -> None:
    """Compare a classifier's classes with the labels of all ranks and with the thresholds; the same on every rank."""
    label = spec.columns.labels[0]
    if label.validity == "class" and facts.labels is not None and classes and facts.labels[1] >= classes:
        raise DataError(
            f"{label.name!r} holds class {facts.labels[1]}, but the module tells {classes} classes apart: labels must "
            f"lie in 0..{classes - 1}. Give the module {facts.labels[1] + 1} outputs, or re-index the labels."
        )
    if spec.thresholds not in (None, classes):
        raise ConfigError(f"thresholds has {spec.thresholds} values for {classes} classes. Give one per class.")


def _example(
    sample: Mapping[str, torch.Tensor] | None, layout: Layout, columns: Columns, device: torch.device
) -> Batch:
    """Rows of this rank to try a step with; a batch of no rows where it has none."""
    rows = sample or {
        field: torch.empty((0, *shape), dtype=getattr(torch, dtype)) for field, (dtype, shape) in layout.items()
    }
    return Batch(
        tuple(rows[column.field] for column in columns.inputs),
        tuple(rows[column.field] for column in columns.labels),
        None if columns.weight is None else rows[columns.weight.field],
    ).to(device)


def _announce(spec: RunSpec, rank: RankContext, device: torch.device, threads: int, data: RankData) -> None:
    """Tell the driver what was chosen."""
    epoch, step = data.position
    rank.channel.send(
        "plan",
        epochs=spec.config.max_epochs,
        steps=data.plan.num_steps,
        rows=data.plan.num_rows,
        shards=spec.num_shards,
        cache=data.cache.plan.reason,
        batch_size=spec.config.batch_size,
        world_size=rank.world.world_size,
        device=str(device),
        threads=threads,
        resumed=epoch * data.plan.num_steps + step,
    )


def _reporter(rank: RankContext) -> Any:
    def report(event: dict[str, Any]) -> None:
        rank.channel.send(event["event"], **{name: value for name, value in event.items() if name != "event"})

    return report
