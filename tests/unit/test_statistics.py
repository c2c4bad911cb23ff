"""Moments and hashes: what of the statistics needs no ranks."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkdl.io.statistics import Moments, splitmix64

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


def test_splitmix64_is_the_published_sequence():
    # The first three outputs of the generator from seed 0: its state grows by the golden gamma.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma, 2 * gamma % 2**64], np.uint64).view(np.int64)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_splitmix64_spreads_keys_that_follow_each_other():
    shares = np.bincount((splitmix64(np.arange(0, 80_000, 8)) % np.uint64(8)).astype(int), minlength=8)
    assert shares.min() > 1100  # 1250 on average
