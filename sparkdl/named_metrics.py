"""Metrics by name: equal to those of Spark's evaluators, where there is one.

All count in float64, as Spark does. What torchmetrics lacks, or computes in float32 or with a tolerance (its R2 takes
squared deviations below 1e-4 for none), is here.
"""

import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError, MeanSquaredError, Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassHammingDistance,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.utilities import dim_zero_cat

from sparkdl.errors import ConfigError

__all__ = ["Kind", "NamedMetric", "metric_names", "named_metric"]

Kind = Literal["class", "number", "any"]
_TOP_K = re.compile(r"top([1-9]\d*)_accuracy")


class _LogLoss(Metric):
    """Mean of -log p(label), p within 1e-15 of 0 and 1, as ``MulticlassMetrics.logLoss`` of Spark."""

    higher_is_better = False
    total: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("rows", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, chance: Tensor, labels: Tensor) -> None:
        self.total -= chance.gather(1, labels[:, None]).clamp(1e-15, 1 - 1e-15).log().sum()
        self.rows += len(labels)

    def compute(self) -> Tensor:
        return self.total / self.rows


class _Ranking(Metric):
    """A measure of how scores rank the rows of a class before all others; keeps every row.

    Of two classes it is that of class 1; of more the mean over the classes that can be judged.
    """

    higher_is_better = True
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self, measure: Callable[[Tensor, Tensor], float]) -> None:
        super().__init__()
        self.measure = measure
        self.add_state("scores", [], "cat")
        self.add_state("labels", [], "cat")

    def update(self, chance: Tensor, labels: Tensor) -> None:
        self.scores.append(chance[:, 1:] if chance.shape[1] == 2 else chance)
        self.labels.append(labels)

    def compute(self) -> float:
        scores, labels = dim_zero_cat(self.scores), dim_zero_cat(self.labels)
        if scores.isnan().any():
            return math.nan
        first = 1 if scores.shape[1] == 1 else 0
        found = [self.measure(column, labels == first + number) for number, column in enumerate(scores.unbind(1))]
        judged = [value for value in found if not math.isnan(value)]
        return sum(judged) / len(judged) if judged else math.nan


def _hits(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Positive rows, and other rows, from each distinct score upwards, highest first; float64, both begin with 0."""
    ordered, order = scores.sort(descending=True)
    last = torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    start = torch.zeros(1, dtype=torch.float64, device=scores.device)
    hits = torch.cat([start, positive[order].cumsum(0)[last].double()])
    return hits, torch.cat([start, last + 1.0]) - hits


def _area_under_roc(scores: Tensor, positive: Tensor) -> float:
    hits, misses = _hits(scores, positive)
    return float(torch.trapezoid(hits, misses) / (hits[-1] * misses[-1]))  # 0 / 0 where all rows are of one kind


def _average_precision(scores: Tensor, positive: Tensor) -> float:
    hits, misses = _hits(scores, positive)
    precision = hits[1:] / (hits[1:] + misses[1:])
    return float((hits.diff() * precision).sum() / hits[-1])


def _merged_moments(moments: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of several sets of rows together, shape (sets, 3, ...) to (3, ...).

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    count, mean, squares = moments.unbind(1)
    rows = count.sum(0)
    whole = mean[0] + (count * (mean - mean[0])).sum(0) / rows
    return torch.stack([rows, whole, squares.sum(0) + (count * (mean - whole) ** 2).sum(0)])


class _Explained(Metric):
    """1 - the errors' part in the labels' squared deviations: R2, or with ``centred`` errors the explained variance."""

    higher_is_better = True
    moments: Tensor

    def __init__(self, targets: int, *, centred: bool) -> None:
        super().__init__()
        self.centred = centred
        self.add_state("moments", torch.zeros(3, 2, targets, dtype=torch.float64), _merged_moments)

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        values = torch.stack([labels, labels - outputs], 1).reshape(len(labels), 2, -1)
        away = values - values[0]  # equal values have no variance at all then
        mean = away.mean(0)
        new = torch.stack([torch.full_like(mean, len(labels)), values[0] + mean, ((away - mean) ** 2).sum(0)])
        self.moments = _merged_moments(torch.stack([self.moments, new])) if self.moments[0].any() else new

    def compute(self) -> Tensor:
        count, mean, squares = self.moments
        errors = squares[1] if self.centred else squares[1] + count[1] * mean[1] ** 2
        explained: Tensor = (1 - errors / squares[0]).mean()  # over the targets
        return explained


class NamedMetric(NamedTuple):
    """A metric that has a name."""

    kind: Literal["class", "number"]
    build: Callable[[int], Metric]  # from the number of classes, or of targets
    higher: bool


def _averaged(metric: type[Metric], average: str) -> Callable[[int], Metric]:
    return lambda classes: metric(num_classes=classes, average=average, validate_args=False)


def _top(k: int) -> Callable[[int], Metric]:
    def build(classes: int) -> Metric:
        if k > classes:
            raise ConfigError(
                f"top{k}_accuracy needs {k} classes, but the module's output has {classes}. Use a smaller k."
            )
        return MulticlassAccuracy(num_classes=classes, average="micro", top_k=k, validate_args=False)

    return build


_NAMED = {
    "accuracy": NamedMetric("class", _averaged(MulticlassAccuracy, "micro"), True),
    "auroc": NamedMetric("class", lambda classes: _Ranking(_area_under_roc), True),
    "average_precision": NamedMetric("class", lambda classes: _Ranking(_average_precision), True),
    "explained_variance": NamedMetric("number", lambda targets: _Explained(targets, centred=True), True),
    "f1": NamedMetric("class", _averaged(MulticlassF1Score, "weighted"), True),
    "hamming_loss": NamedMetric("class", _averaged(MulticlassHammingDistance, "micro"), False),
    "log_loss": NamedMetric("class", lambda classes: _LogLoss(), False),
    "mae": NamedMetric("number", lambda targets: MeanAbsoluteError(), False),
    "mape": NamedMetric("number", lambda targets: MeanAbsolutePercentageError(), False),
    "mse": NamedMetric("number", lambda targets: MeanSquaredError(), False),
    "precision": NamedMetric("class", _averaged(MulticlassPrecision, "weighted"), True),
    "r2": NamedMetric("number", lambda targets: _Explained(targets, centred=False), True),
    "recall": NamedMetric("class", _averaged(MulticlassRecall, "weighted"), True),
    "rmse": NamedMetric("number", lambda targets: MeanSquaredError(squared=False), False),
    "top5_accuracy": NamedMetric("class", _top(5), True),
}


def metric_names(kind: Kind = "any") -> list[str]:
    """Names of metrics: of classes (``"class"``), of numbers (``"number"``), or all; any ``top<k>_accuracy`` is one."""
    return sorted(name for name, named in _NAMED.items() if kind in (named.kind, "any"))


def named_metric(name: str, kind: Kind) -> NamedMetric:
    """The metric of a name.

    Raises:
        ConfigError: There is none, or it is of the other kind.
    """
    top_k = _TOP_K.fullmatch(name)
    named = NamedMetric("class", _top(int(top_k[1])), True) if top_k else _NAMED.get(name)
    if named is None or kind not in (named.kind, "any"):
        what = "is not known" if named is None else f"compares {'numbers' if kind == 'class' else 'classes'}"
        some = ", top<k>_accuracy" if kind != "number" else ""
        raise ConfigError(
            f"The metric {name!r} {what}. Use one of {', '.join(metric_names(kind))}{some}, or a torchmetrics object."
        )
    return named
