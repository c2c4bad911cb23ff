"""What the Estimators have in common: checks before the first job, one way to open the rows, one fit, one model."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pyspark.errors import PySparkRuntimeError
from pyspark.ml import Estimator
from pyspark.ml.util import MLReadable, MLWritable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from sparkdl.barrier.findings import Request
from sparkdl.barrier.launch import dumps, launch_stage, new_run_id
from sparkdl.barrier.preflight import preflight
from sparkdl.barrier.resources import find_settings, find_slots, profile_for
from sparkdl.barrier.supervise import Restart, RestartPolicy, supervise
from sparkdl.callbacks import check_callbacks
from sparkdl.checks import build_module, check_config, check_optimization, check_strategy, floating_dtype
from sparkdl.config import Column, Columns, RunSpec, TrainConfig
from sparkdl.errors import ConfigError, DataError
from sparkdl.history import History
from sparkdl.io.dataset import DiscoveredDataset, ParquetDataset, discover
from sparkdl.io.deal import check_partitioning, deal_rows
from sparkdl.io.decode import draws_random_numbers
from sparkdl.io.in_place import InPlace
from sparkdl.io.resolve import TypedColumns
from sparkdl.io.schema import ColumnRules, check_rules, resolve_column
from sparkdl.io.stage import StagedDataset, remove_staged, stage_dataset
from sparkdl.io.validation import (
    NoValidationRows,
    check_ways,
    hold_out,
    needs_validation,
    open_in_place,
    with_validation,
)
from sparkdl.learning_rate import LearningRateSearch, plan_rates
from sparkdl.model import (
    Fitted,
    TorchClassificationModel,
    TorchModel,
    TorchRegressionModel,
    TrainingSummary,
    check_outputs,
    copy_params,
    fitted_copy,
)
from sparkdl.parallel import Replicas, Strategy, build_strategy
from sparkdl.params import (
    column_rules,
    rules_of_targets,
)
from sparkdl.persistence import ModuleReader, ModuleWriter, Saved
from sparkdl.preparation import check_preparation
from sparkdl.progress import Progress
from sparkdl.recipes import RecipeParams, check_goes_without_validation
from sparkdl.serialization import load_weights
from sparkdl.task import RankResult, Recipe, run_rank
from sparkdl.tracking import RunInfo, Tracking, as_of_this_thread, check_trackers, events_url, flat_params
from sparkdl.trial import has_lazy_parts, materialise

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    Rows = DataFrame | DiscoveredDataset

__all__ = ["TorchTrainer"]

logger = logging.getLogger(__name__)

_CALLABLES = ("configure", "scheduler", "trainingStep", "predictionStep", "metrics", "callbacks", "trackers")

M = TypeVar("M", TorchClassificationModel, TorchRegressionModel, TorchModel)


@dataclass(frozen=True, slots=True)
class Job:
    """A fit that was found possible.

    Attributes:
        rows: What to train on.
        columns: What to read of it.
        recipe: What the ranks train, and how.
        assemble: Parts of assembled columns.
        validation: Validation rows that are not among ``rows``, of the same kind.
    """

    rows: "Rows"
    columns: Columns
    recipe: Recipe
    assemble: Mapping[str, tuple[str, ...]]
    validation: Any = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A fit before its first job.

    Attributes:
        spark: The session.
        job: What was found possible.
        spec: What the ranks are told.
        profile: The resource profile of their stage, if any.
    """

    spark: SparkSession
    job: Job
    spec: RunSpec
    profile: Any


class TorchTrainer(Estimator[M], RecipeParams, Saved, MLWritable, MLReadable[Any], Generic[M]):
    """Common to all Estimators: checks before the first job, one fit, one way to be saved."""

    _model_class: ClassVar[type[Any]]
    _input_kwargs: dict[str, Any]  # set by keyword_only

    def fit(self, dataset: "DataFrame | ParquetDataset", params: Any = None) -> Any:
        """Train.

        Args:
            dataset: A DataFrame, or Parquet files that are read in place.
            params: As in `pyspark.ml.Estimator.fit`.

        Returns:
            The fitted model, or a list of them for a list of param maps.

        Raises:
            SparkdlError: What was asked cannot be, the rows cannot be trained on, or a rank failed.
        """
        return super().fit(dataset, params)  # type: ignore[arg-type]

    def findLearningRate(
        self,
        dataset: "DataFrame | ParquetDataset",
        start: float = 1e-7,
        end: float = 10.0,
        numSteps: int = 100,
    ) -> LearningRateSearch:
        """Take some optimizer steps with rising learning rates, to see which ones make the loss fall.

        The steps are those of a fit with these Params, on as many ranks, but for schedules, averages and checkpoints.
        Nothing is kept of them: neither this Estimator nor its module changes.

        Args:
            dataset: As for `fit`.
            start: The first learning rate.
            end: The last one.
            numSteps: Steps between them; fewer are taken where the loss diverges.

        Returns:
            Rates and losses, a suggestion, and a picture.

        Raises:
            SparkdlError: As `fit`; or there are no such rates.
        """
        plan_rates(start, end, numSteps)
        config = dataclasses.replace(
            self._checked_config(), checkpoint_dir=None, checkpoint_interval=None, checkpoint_seconds=None,
            averaging="none", averaging_start=1, warmup_steps=0, verbose=False,
        )  # fmt: skip
        prepared = self._prepared(dataset, config)
        job = dataclasses.replace(prepared.job, recipe=dataclasses.replace(prepared.job.recipe, scheduler=None))
        spec = dataclasses.replace(prepared.spec, payload=_pickled(job.recipe), rate_search=(start, end, numSteps))
        results, _, _ = self._train(dataclasses.replace(prepared, job=job, spec=spec), lambda event: None)
        assert results[0].rate_search is not None
        return results[0].rate_search

    def _fit(self, dataset: "DataFrame | ParquetDataset") -> M:
        started = time.perf_counter()
        prepared = self._prepared(dataset, self._known_mode(self._checked_config()))
        spec = prepared.spec
        run = RunInfo(spec.run_id, flat_params(self._given()), type(self).__name__, self.uid, time.time())
        with Tracking(self._value("trackers") or (), run, events_url(spec)) as tracking:
            results, restarts, staged = self._train(prepared, tracking)
            summary = _summary(spec, results, restarts, staged=staged, events=tracking.events, started=started)
            model = self._model(prepared.job, results[0], summary)
            tracking.fitted(model)
        return model

    def _prepared(self, dataset: "DataFrame | ParquetDataset", config: TrainConfig) -> "_Prepared":
        """All that can be known before the first job of a fit.

        Raises:
            SparkdlError: The fit is not possible.
        """
        second = self._value("validationDataset")
        check_ways(
            dataset,
            indicator=self._value("validationIndicatorCol"),
            fraction=config.validation_fraction,
            second=second,
        )
        if isinstance(dataset, ParquetDataset):
            spark = _active_session()
            found = discover(spark, dataset)
            job = self._checked(found, config, None if second is None else discover(spark, second))
        else:
            spark = dataset.sparkSession
            job = self._checked(dataset, config, second)
        payload = _pickled(job.recipe)
        check_optimization(job.recipe.module, job.recipe.optimizer, job.recipe.scheduler, config)
        profile = profile_for(spark, config.device)
        report = preflight(spark, _request(config), profile=profile)
        report.raise_errors()
        if report.slots is not None:
            logger.info("numTrainWorkers: %d of %d slots used", config.num_train_workers, report.slots)
        if config.num_shards is None:
            dp_size = job.recipe.strategy.replicas(config.num_train_workers).dp_size
            config = dataclasses.replace(config, num_shards=dp_size)
        thresholds = self._value("thresholds") if self.hasParam("thresholds") else None
        spec = RunSpec(
            run_id=new_run_id(),
            config=config,
            columns=job.columns,
            payload=payload,
            thresholds=None if thresholds is None else len(thresholds),
            encrypt_spool=find_settings(spark).get("spark.io.encryption.enabled", "false").lower() == "true",
        )
        return _Prepared(spark, job, spec, profile)

    def _train(
        self, prepared: "_Prepared", on_event: Callable[[dict[str, Any]], None]
    ) -> tuple[list[RankResult], list[Restart], bool]:
        """What the ranks found, in their order; why they were started again; and whether all reach the same rows."""
        spark, job, spec, profile = prepared.spark, prepared.job, prepared.spec, prepared.profile
        config, strategy = spec.config, job.recipe.strategy
        policy = RestartPolicy(
            max_restarts=config.max_restarts,
            num_workers=config.num_train_workers,
            min_workers=config.min_workers or config.num_train_workers,
        )
        restarts: list[Restart] = []
        with contextlib.ExitStack() as stack:
            rows = self._open_rows(stack, job, spec, spark)
            held_out = job.columns.validation is not None or job.validation is not None
            needed_by = needs_validation(config, metrics=bool(self._value("metrics")))
            missing = NoValidationRows(job.columns, config, needed_by)
            if held_out and rows.staged is not None and not rows.staged.validation:
                missing.check()
            progress = stack.enter_context(Progress(shown=config.verbose))

            def take(event: dict[str, Any]) -> None:
                progress(event)
                on_event(event)

            def run(attempt: int, ranks: int) -> list[list[bytes]]:
                this = dataclasses.replace(
                    spec,
                    attempt=attempt,
                    config=dataclasses.replace(config, num_train_workers=ranks, num_shards=spec.num_shards),
                )
                return launch_stage(
                    rows.for_ranks(this, strategy.replicas(ranks)),
                    functools.partial(run_rank, this, rows.staged, rows.in_place),
                    world_size=ranks,
                    run_id=spec.run_id,
                    on_event=take,
                    attempt=attempt,
                    timeouts=config.timeouts,
                    directory=spec.checkpoint_url,
                    profile=profile,
                )

            def find_ranks() -> int | None:
                slots = find_slots(spark, profile)
                return None if slots is None else _most_ranks(strategy, min(slots, config.num_train_workers))

            chunks = supervise(run, policy, find_slots=find_ranks, on_restart=restarts.append)
        if not all(chunks):  # Spark sees that a plan has no rows, and starts no tasks for it
            raise DataError("The DataFrame has no rows to train on. Check the filters and joins before fit.")
        results = [RankResult.of_chunks(found) for found in chunks]
        if held_out and results[0].history and "validation_loss" not in results[0].history[-1]:
            logger.warning("%s", missing)
        return results, restarts, rows.staged is not None

    def _open_rows(self, stack: contextlib.ExitStack, job: Job, spec: RunSpec, spark: SparkSession) -> "_OpenRows":
        """The rows where ranks can read them, whatever the number of ranks; staged ones are removed at the end."""
        rows, second, columns, directory = job.rows, job.validation, spec.columns, spec.staging_url
        if isinstance(rows, DiscoveredDataset):
            return _OpenRows(spark, None, *open_in_place(spark, rows, columns, second))
        if directory is None:
            return _OpenRows(spark, rows)
        stack.callback(remove_staged, rows, directory)
        partitioning = spec.config.partitioning or "batch"
        staged = stage_dataset(rows, columns, directory, partitioning=partitioning, **_dealing(spec))
        if second is not None:
            staged = with_validation(staged, stage_dataset(second, columns, f"{directory}/second"), columns)
        return _OpenRows(spark, None, staged)

    def _model(self, job: "Job", first: RankResult, summary: TrainingSummary) -> M:
        module, objective = job.recipe.module, job.recipe.objective
        if has_lazy_parts(module):
            materialise(module, objective, first.inputs)
        load_weights(module, first.weights)
        model = self._model_class()
        model._resetUid(self.uid)
        copy_params(self, model)
        if first.vocabularies:
            model._set(vocabularies={**(self._value("vocabularies") or {}), **first.vocabularies})
        model._fitted = Fitted(
            module=fitted_copy(module),
            floating=floating_dtype(module),
            shapes=tuple(tuple(shape) for _, shape in first.inputs),
            outputs=first.outputs,
            transform=job.recipe.transform,
            prediction_step=objective.prediction_step,
            input_names=objective.input_names,
            assemble=job.assemble,
            moments=first.moments,
            history=History(first.history),
            summary=summary,
        )
        return model  # type: ignore[no-any-return]

    def _given(self) -> dict[str, Any]:
        """The Params that have a value, by name."""
        return {param.name: self._value(param.name) for param in self.params if self._value(param.name) is not None}

    def copy(self, extra: Any = None) -> Any:
        """A copy; see `pyspark.ml.param.Params.copy`."""
        made = super().copy(extra)
        trackers = made._value("trackers")
        # CrossValidator copies in the thread of its caller, where MLflow's active run is known, and fits in others.
        return made if trackers is None else made._set(trackers=as_of_this_thread(trackers))

    # ---- checks before any job ---------------------------------------------------------------------------------------
    def _checked_config(self) -> TrainConfig:
        """The settings that make sense whatever the rows are.

        Raises:
            ConfigError: The first that does not.
        """
        config = self.train_config()
        check_config(config)
        return config

    def _checked(self, dataset: "Rows", config: TrainConfig, second: "Rows | None" = None) -> "Job":
        """Everything else that can be known to be wrong without a job.

        Raises:
            ConfigError: The first thing that is.
        """
        if self._value("module") is None:
            raise ConfigError(f"{type(self).__name__} needs a module: an nn.Module, or a function that returns one.")
        loss = self._checked_loss()
        optimizer, scheduler = self._optimizer_recipe(), self._scheduler_recipe(config)
        metrics, callbacks = self._value("metrics"), check_callbacks(self._value("callbacks"))
        if metrics:
            from sparkdl.metrics import check_metrics

            check_metrics(metrics, self._kind)
        check_trackers(self._value("trackers"))
        transform = self._value("transform")
        if transform is not None and not callable(transform):
            raise ConfigError(f"transform={transform!r} is not a function. Give one from a dict of columns to a dict.")
        if transform is not None and draws_random_numbers(transform) and config.cache not in ("auto", "none"):
            raise ConfigError(
                f"cache={config.cache!r} would keep what the transform drew in the first epoch. Use cache='none', or a "
                "transform without a generator."
            )
        module = build_module(self._value("module"), config.seed)
        check_preparation(module, config)
        assemble = dataset.assemble if isinstance(dataset, DiscoveredDataset) else {}
        columns = self._columns(dataset, floating_dtype(module), loss, assemble)
        check_outputs(dataset, self._output_names())
        if isinstance(dataset, DiscoveredDataset):
            if config.partitioning not in (None, "batch"):
                raise ConfigError(
                    f"partitioning={config.partitioning!r} moves rows, but Parquet read in place stays where it is. "
                    "Use partitioning='batch', or fit(spark.read.parquet(...)), which deals rows as asked."
                )
        elif config.balance_shards and _is_spooled(config):
            raise ConfigError(
                "balanceShards=True needs rows that all ranks reach, but every rank spools its own. Set stagingDir or "
                "checkpointDir, or fit a ParquetDataset."
            )
        if not isinstance(dataset, DiscoveredDataset) and config.partitioning is not None:
            check_partitioning(dataset, config.partitioning, config.partition_key_col)
        objective = self._objective(loss, columns, shows_output=self._kind != "any" or bool(metrics))
        strategy = build_strategy(self._value("strategy"))
        check_strategy(strategy, module, config)
        recipe = Recipe(module, objective, strategy, optimizer, scheduler, transform, metrics, self._kind, callbacks)
        if columns.validation is None and config.validation_fraction is None and second is None:
            check_goes_without_validation(config, metrics)
        dataset, columns, second = hold_out(dataset, columns, config, second, spooled=_is_spooled(config))
        return Job(dataset, columns, recipe, assemble, second)

    @abstractmethod
    def _output_names(self) -> list[str]:
        """Columns that the model will add."""

    @abstractmethod
    def _label_columns(
        self, dataset: TypedColumns, floating: str, loss: Callable[..., Any] | None, rules: ColumnRules
    ) -> list[Column]:
        """The labels, checked, in the order in which the loss gets them."""

    def _columns(
        self, dataset: "Rows", floating: str, loss: Callable[..., Any] | None, assemble: Mapping[str, tuple[str, ...]]
    ) -> Columns:
        several = self._value("inputCols")
        if several is not None and self.isSet("featuresCol"):
            raise ConfigError(
                f"featuresCol={self.getFeaturesCol()!r} and inputCols={several!r} are both set. Set one: featuresCol "
                "for a module with one input, inputCols for positional inputs in order."
            )
        if several is not None and not several:
            raise ConfigError("inputCols is empty. Name at least one column, or use featuresCol.")
        shapes = dataset.shapes if isinstance(dataset, DiscoveredDataset) else {}
        rules = column_rules(self, transform=self._value("transform") is not None, shapes=shapes, assemble=assemble)
        param = "featuresCol" if several is None else "inputCols"
        resolve = functools.partial(resolve_column, dataset, floating=floating)
        inputs = tuple(
            resolve(name, field=f"input_{number}", param=param, role="input", rules=rules)
            for number, name in enumerate([self.getFeaturesCol()] if several is None else several)
        )
        targets = rules_of_targets(rules)
        weight = self._value("weightCol")
        flag = self._value("validationIndicatorCol")
        columns = Columns(
            inputs=inputs,
            labels=tuple(self._label_columns(dataset, floating, loss, targets)),
            weight=resolve(weight, field="weight", param="weightCol", role="weight", rules=targets) if weight else None,
            validation=resolve(flag, field="validation", param="validationIndicatorCol", role="validation")
            if flag
            else None,
        )
        check_rules(rules, [column.name for column in columns])
        return columns

    # ---- persistence -------------------------------------------------------------------------------------------------
    def write(self) -> ModuleWriter:
        """A writer; ``option("allowPickle", "true")`` permits pickling what cannot be described."""
        return ModuleWriter(self)

    @classmethod
    def read(cls) -> ModuleReader:
        """A reader; ``option("allowPickle", "true")`` opens pickles."""
        return ModuleReader(cls)

    def _saved_objects(self) -> dict[str, Any]:
        saved = ("module", "loss", "optimizer", "strategy", "transform", *_CALLABLES)
        return {name: self._value(name) for name in saved if self._value(name) is not None and self.isSet(name)}

    def _restore(self, objects: dict[str, Any], facts: dict[str, Any]) -> None:
        self._set(**objects)


def _pickled(recipe: Recipe) -> bytes:
    return dumps(recipe, "module, loss, optimizer, transform and what else the ranks call")


def _summary(
    spec: RunSpec,
    results: Sequence[RankResult],
    restarts: Sequence[Restart],
    *,
    staged: bool,
    events: str,
    started: float,
) -> TrainingSummary:
    first, ranks = results[0], len(results)
    history = first.history
    rows, seconds = (sum(float(record[name]) for record in history) for name in ("rows", "seconds"))
    return TrainingSummary(
        objectiveHistory=tuple(record["loss"] for record in history),
        totalIterations=history[-1]["step"] if history else 0,
        worldSize=ranks,
        numShards=spec.num_shards,
        device=first.device,
        backend="nccl" if first.device.startswith("cuda") else "gloo",
        threads=first.threads,
        rows=sum(result.rows for result in results),
        droppedRows=first.dropped,
        rankRows=tuple(result.rows for result in results),
        rankShards=tuple(tuple(result.shards) for result in results),
        cache=first.cache,
        staged=staged,
        seconds=time.perf_counter() - started,
        restarts=tuple(f"{restart.reason} Started again with {restart.ranks} ranks." for restart in restarts),
        checkpoints=spec.checkpoint_url,
        bestEpoch=first.best_epoch,
        timeSplit={name: sum(result.seconds[name] for result in results) / ranks for name in first.seconds},
        rankSeconds=tuple(result.seconds["compute"] for result in results),
        rankMemory=tuple(result.memory for result in results),
        rankMicroBatchSize=tuple(result.micro_batch_size for result in results),
        rowsPerSecond=rows / seconds if seconds else math.nan,
        events=events,
        strategy=first.strategy,
    )


def _active_session() -> SparkSession:
    try:
        return SparkSession.active()
    except PySparkRuntimeError as error:
        raise ConfigError(
            "A ParquetDataset is trained on by a Spark cluster, but there is no Spark session. Start one before fit: "
            "SparkSession.builder.getOrCreate()."
        ) from error


@dataclass(frozen=True, slots=True)
class _OpenRows:
    """Rows that ranks can read.

    Attributes:
        spark: The session.
        spooled: What ranks spool, each a partition of it; None where they read what all of them reach.
        staged: Where that is.
        in_place: Set where these are the user's own Parquet files.
    """

    spark: SparkSession
    spooled: "DataFrame | None"
    staged: StagedDataset | None = None
    in_place: InPlace | None = None

    def for_ranks(self, spec: RunSpec, replicas: Replicas) -> "DataFrame":
        """What feeds the barrier tasks: one partition each."""
        if self.spooled is None:
            return _one_row_per_rank(self.spark, spec.config.num_train_workers)
        partitioning = spec.config.partitioning or "sample"
        ranks = spec.config.num_train_workers
        owners = None if replicas.are_ranks(ranks) else replicas.groups
        return deal_rows(
            self.spooled, spec.columns, world_size=ranks, owners=owners, partitioning=partitioning, **_dealing(spec)
        )


def _is_spooled(config: TrainConfig) -> bool:
    """True where each rank keeps rows of a DataFrame on its own disk."""
    return config.staging_dir is None and config.checkpoint_dir is None


def _most_ranks(strategy: Strategy, slots: int) -> int:
    """The most ranks that the strategy can arrange in as many slots."""
    for ranks in range(slots, 0, -1):
        with contextlib.suppress(ConfigError):
            strategy.replicas(ranks)
            return ranks
    return 0


def _request(config: TrainConfig) -> Request:
    return Request(
        num_train_workers=config.num_train_workers,
        device=config.device,
        staging_dir=config.staging_dir,
        checkpoint_dir=config.checkpoint_dir,
        cache=config.cache,
        allow_unencrypted_traffic=config.allow_unencrypted_traffic,
        min_workers=config.min_workers,
    )


def _dealing(spec: RunSpec) -> dict[str, Any]:
    return {"num_shards": spec.num_shards, "key": spec.config.partition_key_col, "seed": spec.config.seed}


def _one_row_per_rank(spark: "SparkSession", world_size: int) -> "DataFrame":
    return spark.range(world_size).repartitionById(world_size, F.col("id").cast("int"))
