"""What travels between ranks in one run of bytes."""

import pytest
import torch

from sparkdl.parallel.messages import Package

SHAPES = [
    torch.randn(3, 5),
    torch.tensor(2.5, dtype=torch.float64),
    torch.randn(7).bfloat16(),
    torch.empty(0, 4),
    torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    torch.randn(3, dtype=torch.complex64),
]


def test_tensors_come_out_as_they_went_in() -> None:
    sender, receiver = Package(SHAPES), Package(SHAPES)
    sender.put(SHAPES)
    receiver.data.copy_(sender.data)
    for found, expected in zip(receiver.get(), SHAPES, strict=True):
        assert found is not None
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_tensors_that_are_not_there_are_none_and_leave_nothing_behind() -> None:
    package = Package(SHAPES)
    package.put(SHAPES)
    package.put([None, *SHAPES[1:]])
    assert package.get()[0] is None
    package.put([torch.ones(3, 5), *[None] * 5])
    there = package.get()
    assert torch.equal(there[0], torch.ones(3, 5))  # type: ignore[arg-type]
    assert there[1:] == [None] * 5


def test_sparse_gradients_become_dense() -> None:
    layer = torch.nn.Embedding(6, 2, sparse=True)
    layer(torch.tensor([1, 1, 4])).sum().backward()
    package = Package([layer.weight])
    package.put([layer.weight.grad])
    (found,) = package.get()
    assert found is not None
    assert found.sum(1).tolist() == [0, 4, 0, 0, 2, 0]


def test_as_many_tensors_as_there_is_room_for() -> None:
    with pytest.raises(ValueError, match="zip"):
        Package(SHAPES).put(SHAPES[:2])
