"""The Estimators: what each of them takes, and what is particular to its loss, its labels and its outputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pyspark import keyword_only
from pyspark.ml.param import Param, Params, TypeConverters
from torch import nn

from sparkdl.config import Column
from sparkdl.errors import ConfigError
from sparkdl.fitting import TorchTrainer
from sparkdl.io.resolve import TypedColumns
from sparkdl.io.schema import ColumnRules, resolve_column
from sparkdl.model import (
    TorchClassificationModel,
    TorchModel,
    TorchRegressionModel,
)
from sparkdl.objective import Loss, wants_class_labels
from sparkdl.params import (
    ClassifierColumns,
    EstimatorColumns,
    RegressorColumns,
    accessors,
)

__all__ = ["TorchClassifier", "TorchEstimator", "TorchRegressor"]


@accessors
class TorchClassifier(TorchTrainer[TorchClassificationModel], ClassifierColumns):
    """Trains a torch module as a Spark ML classifier.

    The module returns one score per class, shape (rows, classes), or one logit per row for two classes. Labels are
    class numbers from 0. Every argument is a Param; see `explainParams`.
    """

    _model_class = TorchClassificationModel
    _kind = "class"

    @keyword_only
    def __init__(
        self,
        *,
        module: nn.Module | Callable[[], nn.Module] | None = None,
        loss: Loss = "cross_entropy",
        optimizer: Any = "adamw",
        optimizerParams: Mapping[str, Any] | None = None,
        learningRate: float | None = None,
        learningRateScaling: str = "none",
        baseBatchSize: int = 256,
        weightDecay: float | None = None,
        parameterGroups: Mapping[str, Mapping[str, Any]] | None = None,
        configure: Callable[[nn.Module], Any] | None = None,
        scheduler: str | Callable[..., Any] | None = None,
        schedulerParams: Mapping[str, Any] | None = None,
        schedulerInterval: str = "epoch",
        warmupSteps: int = 0,
        trainingStep: Callable[..., Any] | None = None,
        predictionStep: Callable[..., Any] | None = None,
        maxEpochs: int = 10,
        batchSize: int = 256,
        microBatchSize: int | None = None,
        precision: str = "32",
        gradientClipNorm: float | None = None,
        gradientClipValue: float | None = None,
        averaging: str = "none",
        averagingDecay: float = 0.999,
        averagingStart: int = 1,
        frozenParameters: Sequence[str] = (),
        activationCheckpointing: Sequence[str] = (),
        syncBatchNorm: bool = False,
        torchCompile: bool = False,
        nonFinite: str = "stop",
        shuffle: str = "window",
        seed: int = 0,
        partitioning: str | None = None,
        partitionKeyCol: str | None = None,
        reshuffleInterval: int | None = None,
        balanceShards: bool = False,
        cache: str = "auto",
        cacheBytes: int | None = None,
        readerThreads: int | None = None,
        nulls: Any = "error",
        padding: Mapping[str, Mapping[str, Any]] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        vocabularies: Mapping[str, Sequence[str] | None] | None = None,
        standardization: bool = False,
        transform: Callable[..., Mapping[str, Any]] | None = None,
        featuresCol: str = "features",
        inputCols: Sequence[str] | None = None,
        labelCol: str = "label",
        weightCol: str | None = None,
        validationIndicatorCol: str | None = None,
        validationFraction: float | None = None,
        validationDataset: Any = None,
        metrics: Any = None,
        monitor: str | None = None,
        monitorMode: str = "auto",
        earlyStoppingPatience: int | None = None,
        earlyStoppingMinDelta: float = 0.0,
        restoreBest: bool = False,
        callbacks: Sequence[Any] | None = None,
        trackers: Sequence[Any] | None = None,
        trackingDir: str | None = None,
        predictionCol: str = "prediction",
        probabilityCol: str = "probability",
        rawPredictionCol: str = "rawPrediction",
        thresholds: Sequence[float] | None = None,
        strategy: Any = "ddp",
        numTrainWorkers: int = 1,
        numShards: int | None = None,
        device: str = "auto",
        stagingDir: str | None = None,
        checkpointDir: str | None = None,
        checkpointInterval: int | None = None,
        checkpointSeconds: float | None = None,
        keepCheckpoints: int = 3,
        maxRestarts: int = 3,
        minWorkers: int | None = None,
        timeouts: Mapping[str, float] | None = None,
        allowUnencryptedTraffic: bool = False,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self._setDefault(loss="cross_entropy")
        self._setDefault(predictionCol="prediction", probabilityCol="probability", rawPredictionCol="rawPrediction")
        self._set(**self._input_kwargs)

    def _check_loss(self, loss: Callable[..., Any]) -> None:
        if isinstance(loss, nn.BCELoss):
            raise ConfigError(
                "loss='binary_cross_entropy' takes probabilities, but a classifier's module returns scores. Use "
                "'cross_entropy', which for one output is binary cross entropy of the logit."
            )
        thresholds = self._value("thresholds")
        if thresholds is not None and (min(thresholds, default=-1) < 0 or sum(not value for value in thresholds) > 1):
            raise ConfigError(f"thresholds={list(thresholds)} must be >= 0, with at most one 0.")

    def _output_names(self) -> list[str]:
        names = [self.getRawPredictionCol(), self.getProbabilityCol(), self.getPredictionCol()]
        return [name for name in names if name]

    def _label_columns(
        self, dataset: TypedColumns, floating: str, loss: Callable[..., Any] | None, rules: ColumnRules
    ) -> list[Column]:
        name = self.getLabelCol()
        return [
            resolve_column(
                dataset, name, field="label_0", param="labelCol", floating=floating, role="class", rules=rules
            )
        ]


@accessors
class TorchRegressor(TorchTrainer[TorchRegressionModel], RegressorColumns):
    """Trains a torch module as a Spark ML regressor.

    The module returns one number per row, or one per target where ``labelCol`` is a Vector or an array. Every argument
    is a Param; see `explainParams`.
    """

    _model_class = TorchRegressionModel
    _kind = "number"

    @keyword_only
    def __init__(
        self,
        *,
        module: nn.Module | Callable[[], nn.Module] | None = None,
        loss: Loss = "mse",
        optimizer: Any = "adamw",
        optimizerParams: Mapping[str, Any] | None = None,
        learningRate: float | None = None,
        learningRateScaling: str = "none",
        baseBatchSize: int = 256,
        weightDecay: float | None = None,
        parameterGroups: Mapping[str, Mapping[str, Any]] | None = None,
        configure: Callable[[nn.Module], Any] | None = None,
        scheduler: str | Callable[..., Any] | None = None,
        schedulerParams: Mapping[str, Any] | None = None,
        schedulerInterval: str = "epoch",
        warmupSteps: int = 0,
        trainingStep: Callable[..., Any] | None = None,
        predictionStep: Callable[..., Any] | None = None,
        maxEpochs: int = 10,
        batchSize: int = 256,
        microBatchSize: int | None = None,
        precision: str = "32",
        gradientClipNorm: float | None = None,
        gradientClipValue: float | None = None,
        averaging: str = "none",
        averagingDecay: float = 0.999,
        averagingStart: int = 1,
        frozenParameters: Sequence[str] = (),
        activationCheckpointing: Sequence[str] = (),
        syncBatchNorm: bool = False,
        torchCompile: bool = False,
        nonFinite: str = "stop",
        shuffle: str = "window",
        seed: int = 0,
        partitioning: str | None = None,
        partitionKeyCol: str | None = None,
        reshuffleInterval: int | None = None,
        balanceShards: bool = False,
        cache: str = "auto",
        cacheBytes: int | None = None,
        readerThreads: int | None = None,
        nulls: Any = "error",
        padding: Mapping[str, Mapping[str, Any]] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        vocabularies: Mapping[str, Sequence[str] | None] | None = None,
        standardization: bool = False,
        transform: Callable[..., Mapping[str, Any]] | None = None,
        featuresCol: str = "features",
        inputCols: Sequence[str] | None = None,
        labelCol: str = "label",
        weightCol: str | None = None,
        validationIndicatorCol: str | None = None,
        validationFraction: float | None = None,
        validationDataset: Any = None,
        metrics: Any = None,
        monitor: str | None = None,
        monitorMode: str = "auto",
        earlyStoppingPatience: int | None = None,
        earlyStoppingMinDelta: float = 0.0,
        restoreBest: bool = False,
        callbacks: Sequence[Any] | None = None,
        trackers: Sequence[Any] | None = None,
        trackingDir: str | None = None,
        predictionCol: str = "prediction",
        strategy: Any = "ddp",
        numTrainWorkers: int = 1,
        numShards: int | None = None,
        device: str = "auto",
        stagingDir: str | None = None,
        checkpointDir: str | None = None,
        checkpointInterval: int | None = None,
        checkpointSeconds: float | None = None,
        keepCheckpoints: int = 3,
        maxRestarts: int = 3,
        minWorkers: int | None = None,
        timeouts: Mapping[str, float] | None = None,
        allowUnencryptedTraffic: bool = False,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self._setDefault(loss="mse", predictionCol="prediction")
        self._set(**self._input_kwargs)

    def _output_names(self) -> list[str]:
        return [self.getPredictionCol()] if self.getPredictionCol() else []

    def _label_columns(
        self, dataset: TypedColumns, floating: str, loss: Callable[..., Any] | None, rules: ColumnRules
    ) -> list[Column]:
        name = self.getLabelCol()
        # Counts and ages are regressed on as numbers: an integer column is floating here.
        return [
            resolve_column(
                dataset, name, field="label_0", param="labelCol", floating=floating, role="number", rules=rules
            )
        ]


@accessors
class TorchEstimator(TorchTrainer[TorchModel], EstimatorColumns):
    """Trains any torch module with any loss.

    The loss is called with (output, label); with several ``labelCols`` the label is a tuple of tensors, and so is the
    output of a module that returns several. Integer labels arrive as int64 of shape (rows,), floating ones in the
    module's dtype. Every argument is a Param; see `explainParams`.
    """

    _model_class = TorchModel

    labelCols: "Param[list[str]]" = Param(
        Params._dummy(),
        "labelCols",
        "several labels, given to the loss as a tuple in this order; instead of labelCol.",
        TypeConverters.toListString,
    )

    @keyword_only
    def __init__(
        self,
        *,
        module: nn.Module | Callable[[], nn.Module] | None = None,
        loss: Loss | None = None,
        optimizer: Any = "adamw",
        optimizerParams: Mapping[str, Any] | None = None,
        learningRate: float | None = None,
        learningRateScaling: str = "none",
        baseBatchSize: int = 256,
        weightDecay: float | None = None,
        parameterGroups: Mapping[str, Mapping[str, Any]] | None = None,
        configure: Callable[[nn.Module], Any] | None = None,
        scheduler: str | Callable[..., Any] | None = None,
        schedulerParams: Mapping[str, Any] | None = None,
        schedulerInterval: str = "epoch",
        warmupSteps: int = 0,
        trainingStep: Callable[..., Any] | None = None,
        predictionStep: Callable[..., Any] | None = None,
        maxEpochs: int = 10,
        batchSize: int = 256,
        microBatchSize: int | None = None,
        precision: str = "32",
        gradientClipNorm: float | None = None,
        gradientClipValue: float | None = None,
        averaging: str = "none",
        averagingDecay: float = 0.999,
        averagingStart: int = 1,
        frozenParameters: Sequence[str] = (),
        activationCheckpointing: Sequence[str] = (),
        syncBatchNorm: bool = False,
        torchCompile: bool = False,
        nonFinite: str = "stop",
        shuffle: str = "window",
        seed: int = 0,
        partitioning: str | None = None,
        partitionKeyCol: str | None = None,
        reshuffleInterval: int | None = None,
        balanceShards: bool = False,
        cache: str = "auto",
        cacheBytes: int | None = None,
        readerThreads: int | None = None,
        nulls: Any = "error",
        padding: Mapping[str, Mapping[str, Any]] | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        vocabularies: Mapping[str, Sequence[str] | None] | None = None,
        standardization: bool = False,
        transform: Callable[..., Mapping[str, Any]] | None = None,
        featuresCol: str = "features",
        inputCols: Sequence[str] | None = None,
        labelCol: str = "label",
        labelCols: Sequence[str] | None = None,
        weightCol: str | None = None,
        validationIndicatorCol: str | None = None,
        validationFraction: float | None = None,
        validationDataset: Any = None,
        metrics: Any = None,
        monitor: str | None = None,
        monitorMode: str = "auto",
        earlyStoppingPatience: int | None = None,
        earlyStoppingMinDelta: float = 0.0,
        restoreBest: bool = False,
        callbacks: Sequence[Any] | None = None,
        trackers: Sequence[Any] | None = None,
        trackingDir: str | None = None,
        outputCol: str = "output",
        outputCols: Sequence[str] | None = None,
        strategy: Any = "ddp",
        numTrainWorkers: int = 1,
        numShards: int | None = None,
        device: str = "auto",
        stagingDir: str | None = None,
        checkpointDir: str | None = None,
        checkpointInterval: int | None = None,
        checkpointSeconds: float | None = None,
        keepCheckpoints: int = 3,
        maxRestarts: int = 3,
        minWorkers: int | None = None,
        timeouts: Mapping[str, float] | None = None,
        allowUnencryptedTraffic: bool = False,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self._set(**self._input_kwargs)

    def _output_names(self) -> list[str]:
        several = self._value("outputCols")
        if several is not None and self.isSet("outputCol"):
            raise ConfigError(
                f"outputCol={self.getOutputCol()!r} and outputCols={several!r} are both set. Set one: outputCols for a "
                "module that returns several outputs."
            )
        return [name for name in (several or [self.getOutputCol()]) if name]

    def _label_columns(
        self, dataset: TypedColumns, floating: str, loss: Callable[..., Any] | None, rules: ColumnRules
    ) -> list[Column]:
        several = self._value("labelCols")
        if several == [] and loss is not None:
            raise ConfigError("labelCols is empty, but the loss compares with labels. Name them, or use trainingStep.")
        if several is not None and self.isSet("labelCol"):
            raise ConfigError(
                f"labelCol={self.getLabelCol()!r} and labelCols={several!r} are both set. Set one: labelCols for a "
                "loss that compares several outputs."
            )
        param = "labelCol" if several is None else "labelCols"
        role: Literal["class", "target"] = "class" if wants_class_labels(loss) else "target"
        return [
            resolve_column(
                dataset, name, field=f"label_{number}", param=param, floating=floating, role=role, rules=rules
            )
            for number, name in enumerate([self.getLabelCol()] if several is None else several)
        ]
