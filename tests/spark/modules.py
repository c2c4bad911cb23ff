"""Modules and losses that can be imported by name, as those of a user's own package; and what tests ask of Spark."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pyspark.sql import SparkSession
from torch import Tensor, nn


class FourInputs(nn.Module):
    """Two scores per row of a vector, an array, a number and a category, each of a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(5, 3)
        self.scores = nn.Linear(2 + 3 + 1 + 3, 2)

    def forward(self, vector: Tensor, array: Tensor, number: Tensor, place: Tensor) -> Tensor:
        return self.scores(torch.cat([vector, 10 * array, 100 * number, self.places(place)], 1))


class TwoHeads(nn.Module):
    """Two numbers and three scores per row, after a BatchNorm; one of its layers is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.numbers = nn.Linear(3, 2)
        self.scores = nn.Linear(3, 3)
        self.idle = nn.Linear(7, 7)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        normal = self.norm(features)
        return self.numbers(normal), self.scores(normal)


def loss_of_two_heads(outputs: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> Tensor:
    """Squared error of the first output plus cross entropy of the second, per row."""
    numbers = nn.functional.mse_loss(outputs[0], labels[0], reduction="none").mean(1)
    return numbers + nn.functional.cross_entropy(outputs[1], labels[1], reduction="none")


class TiedNet(nn.Module):
    """Two layers with one and the same weight."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, features: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(features)))


def make_tied_net() -> nn.Module:
    """A `TiedNet`, as a function that can be imported."""
    return TiedNet()


def absolute_error(output: Tensor, label: Tensor) -> Tensor:
    """Mean absolute error of the rows given: one number."""
    return (output - label).abs().mean()


def make_sgd(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer from a function."""
    return torch.optim.SGD(parameters, lr=0.05)


@contextlib.contextmanager
def job_ids(spark: SparkSession, group: str) -> Iterator[list[int]]:
    """The ids of all jobs that the block starts; complete once the block is left, also by an error."""
    context = spark.sparkContext
    started: list[int] = []
    context.setJobGroup(group, "counted by a test")
    try:
        yield started
    finally:
        context.setLocalProperty("spark.jobGroup.id", None)
        context._jsc.sc().listenerBus().waitUntilEmpty()
        started += context.statusTracker().getJobIdsForGroup(group)
