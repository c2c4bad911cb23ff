"""What the rows of all ranks say together: vocabularies, means and variances.

Functions of a ``group`` are its collectives, as all of `sparkdl.io.exchange`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor

from sparkdl.io.exchange import (
    Group,
    agree,
    all_to_all,
    fault_of_size,
    gather_numbers,
    gather_rows,
    gather_texts,
)

__all__ = ["Moments", "global_moments", "global_vocabulary"]


def global_vocabulary(
    values: Iterable[pa.Array], *, max_size: int | None = None, group: Group = None
) -> tuple[str, ...]:
    """The strings of all ranks, the most frequent first, those of one frequency in alphabetical order; nulls left out.

    Args:
        values: Arrays of strings, dictionaries of strings included, one in memory at a time.
        max_size: How many to return at most; None: all.
        group: The ranks that take part.

    Raises:
        ConfigError: On all ranks, where a rank's values are not strings, or ``max_size`` differs or is below 1.
    """
    counts: Counter[str] = Counter()
    fault = fault_of_size("max_size", max_size)
    for array in values if fault is None else ():
        kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            fault = f"its values are {array.type}. Give strings."
            break
        pairs = pc.value_counts(array)
        counts.update(dict(zip(pairs.field("values").to_pylist(), pairs.field("counts").to_pylist(), strict=True)))
    del counts[None]
    agree("global_vocabulary", {"max_size": str(max_size)}, fault, group)
    owned = _owned_counts(counts, group)
    # Strings have one owner each: what is not among the first of its owner is not among the first of all.
    texts = gather_texts(json.dumps(_most_frequent(owned.items(), max_size)), group)
    pairs = _most_frequent([pair for text in texts for pair in json.loads(text)], max_size)
    return tuple(text for text, _ in pairs)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """How many rows there were, and of each value the mean and the variance (of the rows: divided by their count).

    Attributes:
        count: Rows.
        mean: float64 of shape (values,).
        variance: float64 of shape (values,).
    """

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Those of the rows of a tensor of shape (rows, values), in float64; zeros of no rows."""
        if not len(rows):
            return cls(0, rows.new_zeros(rows.shape[1:], dtype=torch.float64), rows.new_zeros(rows.shape[1:]).double())
        variance, mean = torch.var_mean(rows.double(), 0, correction=0)
        return cls(len(rows), mean, variance)

    def merge(self, other: "Moments") -> "Moments":
        """Those of the rows of both.

        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
        """
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        variance = self.variance * (1 - share) + other.variance * share + delta.square() * (share * (1 - share))
        return Moments(count, self.mean + delta * share, variance)


def global_moments(batches: Iterable[Tensor], *, group: Group = None) -> Moments:
    """Moments of the rows of all ranks, equal to the last bit on all of them.

    Every rank merges those of its batches, of shape (rows, values), and then those of all ranks in rank order.

    Raises:
        ConfigError: On all ranks, where the numbers of values differ, or a batch has not two dimensions.
    """
    own: Moments | None = None
    fault = None
    for batch in batches:
        if batch.dim() != 2 or (own is not None and len(own.mean) != batch.shape[1]):
            before = "" if own is None else f" after one of {len(own.mean)} values"
            fault = f"it has a batch of shape {tuple(batch.shape)}{before}. Give all batches the shape (rows, values)."
            break
        moments = Moments.of(batch.detach().cpu())
        own = moments if own is None else own.merge(moments)
    num_values = -1 if own is None else len(own.mean)
    widths: list[int] = gather_numbers([num_values], group)[:, 0].tolist()
    if num_values < 0:
        num_values = next((width for width in widths if width >= 0), 0)  # no batches: takes that of the others
    agree("global_moments", {"the number of values": str(num_values)}, fault, group)
    own = own or Moments.of(torch.empty(0, num_values))
    counts = gather_numbers([own.count], group)[:, 0].tolist()
    each = gather_rows(torch.stack([own.mean, own.variance])[None], [1] * len(counts), group)
    merged = Moments(counts[0], each[0, 0], each[0, 1])
    for count, (mean, variance) in zip(counts[1:], each[1:], strict=True):
        merged = merged.merge(Moments(count, mean, variance))
    return merged


def _most_frequent(pairs: Iterable[tuple[str, int]], number: int | None) -> list[tuple[str, int]]:
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:number]


def _owned_counts(local: Mapping[str, int], group: Group) -> Counter[str]:
    """Send every string's count to the rank that owns its hash; the sums of the strings that this rank owns."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts: list[list[tuple[str, int]]] = [[] for _ in range(size)]
    for text, count in local.items():
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        parts[int.from_bytes(digest, "little") % size].append((text, count))
    data = [json.dumps(part).encode() for part in parts]
    sent = [len(part) for part in data]
    received: list[int] = gather_numbers(sent, group)[:, rank].tolist()
    arrived = all_to_all(torch.frombuffer(bytearray(b"".join(data)), dtype=torch.uint8)[:, None], sent, received, group)
    owned: Counter[str] = Counter()
    for part in arrived.cpu().split(received):
        for text, count in json.loads(part.numpy().tobytes()):
            owned[text] += count
    return owned
