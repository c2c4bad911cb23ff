"""Modules and losses that can be imported by name, as those of a user's own package; and what tests ask of Spark."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
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


def decode_png(columns: dict[str, Any]) -> dict[str, Any]:
    """PNG files as images of shape (rows, 1, 4, 4), from 0 to 1; what else there is stays as it is."""
    images = [np.asarray(Image.open(io.BytesIO(cell))) for cell in columns["picture"].to_pylist()]
    return {**columns, "picture": torch.from_numpy(np.stack(images)[:, None]).float() / 255}


class Pictures(nn.Module):
    """Two scores of an image of shape (1, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


class PictureAndMatrix(nn.Module):
    """A number of an image of bytes, shape (4, 4), and a matrix, shape (2, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Linear(22, 1)

    def forward(self, picture: Tensor, matrix: Tensor) -> Tensor:
        assert picture.shape[1:] == (4, 4)
        assert matrix.shape[1:] == (2, 3)
        return self.weigh(torch.cat([picture.flatten(1).float() / 255, matrix.flatten(1)], 1))


class Census(nn.Module):
    """A small module, and beside it one weight per row id that the row moves by one step when it is trained on."""

    def __init__(self, rows: int, width: int = 3) -> None:
        super().__init__()
        self.seen = nn.Embedding(rows, 1)
        self.regress = nn.Linear(width, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def forward(self, row: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.seen(row)[:, 0], self.regress(features)[:, 0]

    def times_seen(self, batch_rows: float, learning_rate: float) -> Tensor:
        """How often each row was trained on, in batches of ``batch_rows`` rows."""
        return -self.seen.weight.detach()[:, 0] * batch_rows / learning_rate


def census_loss(outputs: tuple[Tensor, Tensor], label: Tensor) -> Tensor:
    """One value per row, whose derivative by the row's own weight is 1."""
    seen, regressed = outputs
    return seen - seen.detach() + (regressed - label) ** 2


class Words(nn.Module):
    """A number per word, and what the tokens add to it."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(4, 1)
        self.tokens = nn.Embedding(10, 1, padding_idx=0)

    def forward(self, word: Tensor, tokens: Tensor) -> Tensor:
        return self.word(word)[:, 0] + self.tokens(tokens).sum((1, 2))
