"""Compression of gradients: the arithmetic of one rank, and what is refused before the first job."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparkdl.config import TrainConfig
from sparkdl.errors import ConfigError
from sparkdl.parallel import DataParallel
from sparkdl.parallel.compression import (
    BLOCK,
    Half,
    Int8,
    PowerSGD,
    TopK,
    build_compression,
    compression_names,
    from_int8,
    largest,
    to_int8,
)


@st.composite
def vectors(draw: st.DrawFn, multiple: int = 1) -> Tensor:
    """Values of very different sizes, some of them 0."""
    length = draw(st.integers(1, 4)) * multiple
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    values = torch.randn(length, generator=random, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-6, 6, (length,), generator=random)
    return values * (torch.rand(length, generator=random) > draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])))


@given(vectors(BLOCK), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_a_value_comes_back_within_half_a_step(values: Tensor, dtype: torch.dtype) -> None:
    rows = values.to(dtype)[None]
    back = from_int8(to_int8(rows), dtype)
    step = rows.view(-1, BLOCK).abs().amax(1, keepdim=True) / 127
    assert back.dtype == dtype
    assert ((back - rows).view(-1, BLOCK).abs() <= step * (0.5 + 1e-4)).all()


def test_8_bits_are_8_bits_and_a_scale() -> None:
    data = to_int8(torch.randn(3, 4 * BLOCK))
    assert data.shape == (3, 4 * (BLOCK + 4))
    assert data.dtype == torch.uint8


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_does_not_pass_as_a_number(odd: float) -> None:
    values = torch.ones(1, 2 * BLOCK)
    values[0, 3] = odd
    back = from_int8(to_int8(values), torch.float32)
    assert back[0, 3].isnan()
    assert torch.equal(back[0, BLOCK:], values[0, BLOCK:])


@given(vectors(40), st.floats(0.001, 1))
@settings(max_examples=60, deadline=None)
def test_the_values_that_are_largest_in_size_are_picked(values: Tensor, ratio: float) -> None:
    places = largest(values, ratio)
    assert len(places) == len(set(places.tolist())) == max(1, round(ratio * len(values)))
    left = torch.ones(len(values), dtype=torch.bool)
    left[places] = False
    assert not left.any() or values[places].abs().min() >= values[left].abs().max()


def test_every_name_is_a_compression() -> None:
    found = {name: build_compression(name) for name in compression_names()}
    assert found == {
        "fp16": Half("fp16"), "bf16": Half("bf16"), "int8": Int8(), "topk": TopK(), "powersgd": PowerSGD(),
    }  # fmt: skip


CONFIG = TrainConfig(num_train_workers=2)


def odd_module() -> nn.Module:
    module = nn.Linear(2, 2)
    module.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return module


def compiled_module() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))


@pytest.mark.parametrize(
    ("options", "settings", "module", "message"),
    [
        ({"compression": "zip"}, {}, None, "compression='zip' is not known. Use one of fp16, bf16, int8, topk, power"),
        ({"compression": 8}, {}, None, "compression=8 is no compression. Use one of fp16, bf16"),
        ({"compression": TopK}, {}, None, "is no compression. Use one of"),
        ({"compression": Half("fp8")}, {}, None, r"Half\(format='fp8'\) is not known. Use 'fp16' or 'bf16'"),
        ({"compression": TopK(0)}, {}, None, r"TopK\(ratio=0\) is out of range. Use more than 0 and at most 1"),
        ({"compression": TopK(1.5)}, {}, None, r"TopK\(ratio=1.5\) is out of range"),
        ({"compression": PowerSGD(rank=0)}, {}, None, r"PowerSGD\(rank=0\) is too small. Use 1 or more"),
        ({"compression": PowerSGD(start_step=-1)}, {}, None, r"PowerSGD\(start_step=-1\) is too small. Use 0 or more"),
        ({"compression": PowerSGD(min_compression_rate=0.5)}, {}, None, r"min_compression_rate=0.5\) is too small"),
        ({"compression": "topk"}, {"precision": "16"}, None, "compression='topk' keeps parts .* precision='16'"),
        ({"compression": Int8()}, {"non_finite": "skip"}, None, r"compression=Int8\(\) keeps .* nonFinite='skip'"),
        ({"compression": "fp16"}, {}, nn.Embedding(3, 2, sparse=True), "takes dense gradients, but those of ''"),
        ({"compression": "fp16"}, {}, odd_module(), "the parameter 'phase' is torch.complex64"),
        ({"schedule": "late"}, {}, None, "schedule='late' is not known. Use one of ready, priority"),
        ({"schedule": "priority", "compression": "fp16"}, {}, None, "priority' .* but compression='fp16' goes by the"),
        ({"schedule": "priority", "bucket_cap_mb": 5}, {}, None, "bucket_cap_mb=5 is about .* leave bucket_cap_mb out"),
        ({"schedule": "priority", "static_graph": True}, {}, None, "static_graph=True is about the buckets"),
        ({"schedule": "priority"}, {"gradient_clip_norm": 1.0}, None, "gradientClipNorm needs all gradients before"),
        ({"schedule": "priority"}, {"non_finite": "skip"}, None, "nonFinite='skip' needs all gradients"),
        ({"schedule": "priority"}, {"precision": "16"}, None, "precision='16' needs all gradients"),
        ({"schedule": "priority"}, {"averaging": "ema"}, None, "averaging='ema' needs all weights after every step"),
        ({"schedule": "priority"}, {"torch_compile": True}, None, "torchCompile=True hides where a parameter is used"),
        ({"schedule": "priority"}, {}, compiled_module(), "priority' sees where .* not in the compiled module '0'"),
        ({"bucket_cap_mb": 0}, {}, None, "bucket_cap_mb=0 is too small. Use more than 0, or None"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    options: dict[str, Any], settings: dict[str, Any], module: nn.Module | None, message: str
) -> None:
    config = TrainConfig(num_train_workers=2, **settings)
    with pytest.raises(ConfigError, match=message):
        DataParallel(**options).check(module or nn.Linear(2, 2), config)


@pytest.mark.parametrize("compression", [None, *compression_names(), TopK(1.0)])
def test_the_rest_passes(compression: Any) -> None:
    DataParallel(compression=compression, bucket_cap_mb=5, static_graph=True).check(nn.Linear(2, 2), CONFIG)


def test_priority_passes() -> None:
    DataParallel(schedule="priority").check(nn.Linear(2, 2), TrainConfig(num_train_workers=2, gradient_clip_value=1.0))


def test_half_precision_may_be_combined_with_what_skips_steps() -> None:
    DataParallel(compression="fp16").check(nn.Linear(2, 2), TrainConfig(precision="16", non_finite="skip"))
