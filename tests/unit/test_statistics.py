"""Moments and hashes: what of the statistics needs no ranks."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkdl.io.statistics import Moments

values = st.lists(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2), max_size=12)


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=5))
def test_merged_moments_are_those_of_all_rows(parts):
    tensors = [torch.tensor(part, dtype=torch.float64).view(-1, 2) for part in parts]
    merged = Moments.of(tensors[0])
    for tensor in tensors[1:]:
        merged = merged.merge(Moments.of(tensor))
    rows = torch.cat(tensors).numpy()
    assert merged.count == len(rows)
    if len(rows):
        np.testing.assert_allclose(merged.mean.numpy(), rows.mean(0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(merged.variance.numpy(), rows.var(0), rtol=1e-9, atol=1e-9)
    else:
        assert merged.mean.tolist() == merged.variance.tolist() == [0, 0]


def test_moments_of_large_integers_do_not_overflow():
    moments = Moments.of(torch.tensor([[2**31 - 1], [2**31 - 3]], dtype=torch.int32))
    assert (moments.mean.item(), moments.variance.item()) == (2**31 - 2, 1)
