"""Metrics of ranks with uneven rows, and some with none, against one process that has all of them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics
import torchmetrics.classification as tc
from torch import Tensor
from torchmetrics.utilities import dim_zero_mean
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, MultioutputWrapper

from sparkdl.errors import ConfigError
from sparkdl.metrics import Kind, Metrics, metric_names
from tests.dist.conftest import Torchrun

pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all"),
]

# Rows of each update, by number of ranks: uneven, in different numbers of updates, and for one rank none.
UPDATES = {1: [[40, 3, 17]], 2: [[], [30, 1, 29]], 4: [[11], [], [0, 7, 2, 1], [39]]}
ROWS = 60
CLASSES = 3


class RunningMean(torchmetrics.Metric):
    """The mean error of the rows so far, kept as a mean: right over ranks if each counts by its rows."""

    mean: Tensor
    rows: Tensor
    largest: Tensor
    smallest: Tensor
    bits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", torch.zeros(2), dim_zero_mean)
        self.add_state("rows", torch.zeros((), dtype=torch.int64), "sum")
        self.add_state("largest", torch.tensor(-math.inf), "max")
        self.add_state("smallest", torch.tensor(math.inf), "min")
        self.add_state("bits", torch.zeros((), dtype=torch.int64), either)

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        error = outputs - labels
        self.rows += len(error)
        self.mean += (error.mean(0) - self.mean) * len(error) / self.rows
        self.largest = self.largest.maximum(error.max())
        self.smallest = self.smallest.minimum(error.min())
        for row in error[:, 0].tolist():
            self.bits |= 1 << int(abs(row) * 10)

    def compute(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "rows": self.rows,
            "ends": [self.smallest, self.largest],
            "bits": self.bits,
        }


def either(stacked: Tensor) -> Tensor:
    """Bits that any rank has."""
    found = stacked[0].clone()
    for bits in stacked[1:]:
        found |= bits
    return found


def longest(values: list[Tensor]) -> Tensor:
    """What reduces a list to a tensor."""
    return torch.stack(values).max(0).values


class Longest(torchmetrics.Metric):
    """A list state that a function reduces."""

    values: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], longest)

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.values = [*self.values, *outputs]

    def compute(self) -> Tensor:
        return self.values if isinstance(self.values, Tensor) else longest(self.values)


class Words(torchmetrics.Metric):
    """A list state that nothing reduces, of what is no tensor."""

    words: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("words", [], None)

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.words.extend(("label", int(label)) for label in labels)

    def compute(self) -> dict[str, float]:
        return {"count": len(self.words), "third": sum(number for word, number in self.words[::3] if word == "label")}


class Unfit(Words):
    """Holds on rank 1 what cannot travel."""

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.words.append({1, 2})


def class_metrics() -> dict[str, Any]:
    micro = tc.MulticlassAccuracy(CLASSES, average="micro")
    return {
        **{name: name for name in metric_names("class") if name != "top5_accuracy"},
        "top2": "top2_accuracy",
        "exact": tc.MulticlassAUROC(CLASSES),
        "binned": tc.MulticlassAUROC(CLASSES, thresholds=10),
        "on_cpu": tc.MulticlassAveragePrecision(CLASSES, compute_on_cpu=True),
        "range": MinMaxMetric(micro),
        "each": ClasswiseWrapper(tc.MulticlassRecall(CLASSES, average=None)),
        "sum": micro + tc.MulticlassF1Score(CLASSES),
        "words": Words(),
        "collection": torchmetrics.MetricCollection([tc.MulticlassPrecision(CLASSES), tc.MulticlassRecall(CLASSES)]),
    }


def number_metrics() -> list[Any]:
    return [
        *metric_names("number"),
        torchmetrics.PearsonCorrCoef(num_outputs=2),
        MultioutputWrapper(torchmetrics.SpearmanCorrCoef(), 2),
        torchmetrics.R2Score(),
        RunningMean(),
        Longest(),
    ]


def rows(kind: Kind) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    if kind == "class":
        scores = torch.randn(20, CLASSES, generator=generator).repeat(3, 1)
        return scores, torch.randint(0, CLASSES, (ROWS,), generator=generator)
    labels = torch.randn(ROWS, 2, generator=generator) + 3
    return labels + 0.3 * torch.randn(ROWS, 2, generator=generator), labels


def found(kind: Kind, metrics: Any, group: Any, rank: int, size: int) -> list[dict[str, float]]:
    """Two epochs of one rank, and one in which no rank has rows."""
    counted = Metrics(metrics, kind=kind, group=group)
    outputs, labels = rows(kind)
    first = sum(sum(updates) for updates in UPDATES[size][:rank])
    epochs = []
    for epoch in range(3):
        start = first
        for count in UPDATES[size][rank] if epoch < 2 else []:
            counted.update(outputs[start : start + count], labels[start : start + count])
            start += count
        epochs.append(counted.compute())
    return epochs


def failure(call: Callable[[], Any]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return "no error"


def faults(rank: int) -> list[str]:
    """What all ranks hear where one of them, or what they have together, is at fault; and then they go on."""
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    unfit = Metrics([Unfit()], kind="any")
    if rank == 1:
        unfit.update(zeros, zeros[0])
    widths = Metrics(["f1"], kind="class")
    widths.update(torch.zeros(2, 3 + (rank == 3)), zeros[0])
    auroc = Metrics([tc.MulticlassConfusionMatrix(40)], kind="class")
    if rank == 2:
        auroc.update(torch.zeros(2, 40), zeros[0])
    return [failure(metrics.compute) for metrics in (unfit, widths, auroc)]


def on_ranks() -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {
        "class": found("class", class_metrics(), None, rank, size),
        "number": found("number", number_metrics(), None, rank, size),
    }
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])] if size == 4 else []
    if groups:
        results["group"] = found("class", class_metrics(), groups[rank // 2], rank % 2, 2)
        results["faults"] = faults(rank)
    return results


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def ranks(request: pytest.FixtureRequest, torchrun: Torchrun) -> list[Any]:
    return torchrun(on_ranks, request.param)


def one_process(kind: Kind, metrics: Any) -> dict[str, float]:
    return found(kind, metrics, None, 0, 1)[0]


@pytest.mark.parametrize(("kind", "metrics"), [("class", class_metrics), ("number", number_metrics)])
def test_metrics_of_ranks_are_those_of_one_process(ranks: list[Any], kind: Kind, metrics: Callable[[], Any]) -> None:
    expected = one_process(kind, metrics())
    for result in ranks:
        for epoch in result[kind][:2]:
            assert epoch == pytest.approx(expected, rel=1e-5)
        names = set(expected) - set(result[kind][2])
        assert all(math.isnan(value) for value in result[kind][2].values())
        assert all("_" in name for name in names)  # how many numbers a metric gives is known of rows only


def test_metrics_by_name_are_equal_to_the_last_digits(ranks: list[Any]) -> None:
    for kind, metrics in (("class", class_metrics), ("number", number_metrics)):
        expected = {name: value for name, value in one_process(kind, metrics()).items() if name in metric_names()}
        assert len(expected) >= 6
        for result in ranks:
            assert {name: result[kind][0][name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_all_ranks_have_the_same_numbers(ranks: list[Any]) -> None:
    for kind in ("class", "number"):
        for result in ranks[1:]:
            assert result[kind][:2] == ranks[0][kind][:2]


def test_groups_have_numbers_of_their_own(ranks: list[Any]) -> None:
    if len(ranks) == 4:
        expected = one_process("class", class_metrics())
        for result in ranks:
            assert result["group"][0] == pytest.approx(expected, rel=1e-5)


def test_all_ranks_hear_what_is_wrong(ranks: list[Any]) -> None:
    if len(ranks) == 4:
        unfit, widths, many = ranks[0]["faults"]
        assert all(result["faults"] == [unfit, widths, many] for result in ranks)
        assert "cannot travel between ranks: states.unfit..1.words.0 is a set, but" in unfit
        assert "output had 3 columns, and now 4" in widths
        assert "gives 1600 numbers" in many
