"""Gradients that are sent in fewer bytes, and what was not sent kept for the next step.

A `Compression` says what of a bucket of gradients travels; `sparkdl.parallel.error_feedback` is the memory. Except for
the two half-precision formats, a rank keeps the difference between its gradient and what the others learned of it, and
adds it to its next gradient: error feedback, Karimireddy et al., arXiv 1901.09847. In every step, over the ranks,

    ranks x (what all of them step with) + (sum of what is kept) = sum of (gradient + what was kept before)

so that nothing of a gradient is lost, only late.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparkdl.errors import ConfigError

__all__ = [
    "BLOCK",
    "Compression",
    "Half",
    "Int8",
    "PowerSGD",
    "TopK",
    "build_compression",
    "compression_names",
    "from_int8",
    "largest",
    "to_int8",
]

Parts = Sequence[tuple[str, torch.Size]]
"""Name and shape of each parameter whose gradient a bucket holds, in the order of the bucket."""


class Compression(Protocol):
    """How the mean over ranks of a bucket of gradients is found."""

    keeps: ClassVar[bool]
    """True where what was not sent is kept for the next step."""

    def check(self) -> None:
        """Refuse options that cannot be.

        Raises:
            ConfigError: An option is out of its range.
        """
        ...

    def compresses(self, step: int) -> bool:
        """False in steps whose gradients are sent whole; steps are counted from 0."""
        ...

    def mean(
        self, values: Tensor, parts: Parts, shared: dict[str, Tensor], group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor | None]:
        """A collective: all ranks call it with their own values.

        Args:
            values: The bucket with what was kept, shape (values,).
            parts: What it consists of.
            shared: Equal on all ranks; the compression may keep there what it goes on with in the next step.
            group: The ranks that take part.

        Returns:
            What all ranks step with, equal to the bit on all of them, and what this rank keeps, None where the
            compression keeps nothing; both as ``values``.
        """
        ...


@dataclass(frozen=True)
class Half:
    """Sends 16 bits per value, "fp16" or "bf16": half of the bytes of single precision.

    Values travel in 16 bits and are added in the gradient's own precision: every rank adds up a part of the bucket and
    hands the mean on, again in 16 bits. A rank sends as many values as in a ring all-reduce. "fp16" is the finer one
    and ends at 65504: a larger gradient becomes infinite. "bf16" has the range of single precision.

    Attributes:
        format: "fp16" or "bf16".
    """

    keeps: ClassVar[bool] = False

    format: str = "bf16"

    def check(self) -> None:
        """See `Compression.check`."""
        if self.format not in _HALVES:
            raise ConfigError(f"Half(format={self.format!r}) is not known. Use 'fp16' or 'bf16'.")

    def compresses(self, step: int) -> bool:
        """In every step."""
        return True

    def mean(
        self, values: Tensor, parts: Parts, shared: dict[str, Tensor], group: dist.ProcessGroup | None
    ) -> tuple[Tensor, None]:
        """See `Compression.mean`."""
        half = _HALVES[self.format]
        mean, _ = _mean_in_slices(
            values,
            lambda rows: rows.to(half).view(torch.uint8),
            lambda data: data.view(half).to(values.dtype),
            group,
        )
        return mean, None


@dataclass(frozen=True)
class Int8:
    """Sends 8 bits per value, and one scale for `BLOCK` of them: a quarter of the bytes of single precision.

    A value is rounded to one of 255 levels between minus and plus the largest of its block: Dettmers, arXiv 1511.04561;
    scales by block as in QSGD, Alistarh et al., arXiv 1610.02132, but rounded to the nearest level. Every rank adds up
    a part of the bucket and hands the mean on, again in 8 bits; what that rounds away is kept by who added up, as
    Tang et al. do, arXiv 1905.05957.
    """

    keeps: ClassVar[bool] = True

    def check(self) -> None:
        """See `Compression.check`."""

    def compresses(self, step: int) -> bool:
        """In every step."""
        return True

    def mean(
        self, values: Tensor, parts: Parts, shared: dict[str, Tensor], group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        """See `Compression.mean`."""
        return _mean_in_slices(values, to_int8, partial(from_int8, dtype=values.dtype), group, block=BLOCK)


@dataclass(frozen=True)
class TopK:
    """Only the values that are largest in size, each with its place: 8 bytes in single precision.

    Aji and Heafield, arXiv 1704.05021; Lin et al., arXiv 1712.01887. A rank receives those of all other ranks, so that
    the bytes grow with their number: with 0.01 they are fewer than those of a whole gradient on fewer than 100 ranks.

    Attributes:
        ratio: Share of the values of a bucket that a rank sends, above 0 and at most 1.
    """

    keeps: ClassVar[bool] = True

    ratio: float = 0.01

    def check(self) -> None:
        """See `Compression.check`."""
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"TopK(ratio={self.ratio}) is out of range. Use more than 0 and at most 1.")

    def compresses(self, step: int) -> bool:
        """In every step."""
        return True

    def mean(
        self, values: Tensor, parts: Parts, shared: dict[str, Tensor], group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        """See `Compression.mean`."""
        world_size = dist.get_world_size(group)
        places = largest(values, self.ratio)
        number = torch.int32 if len(values) < 1 << 31 else torch.int64
        sent = torch.cat([values[places].view(torch.uint8), places.to(number).view(torch.uint8)])
        received = sent.new_empty(world_size, len(sent))
        dist.all_gather(list(received), sent, group=group)
        mean = torch.zeros_like(values)
        border = len(places) * values.element_size()
        for data in received:  # rank by rank: the order of summation is the same everywhere
            theirs = data[border:].clone().view(number).long()  # a copy lies aligned
            mean[theirs] += data[:border].clone().view(values.dtype)
        kept = values.clone()
        kept[places] = 0
        return mean.div_(world_size), kept


@dataclass(frozen=True)
class PowerSGD:
    """Matrices of low rank in place of gradients: Vogels et al., arXiv 1905.13727, with one power iteration per step.

    A gradient of shape (n, m) travels as (n + m) x rank values. Biases, and whatever would not become smaller by
    ``min_compression_rate``, travel whole. torch's own hook is not used: on gloo its buckets overtake each other, and a
    gradient that was zero once is none from then on.

    Attributes:
        rank: Rank of the matrices, from 1: 1 to 4 do for most modules.
        start_step: Steps at the beginning whose gradients are sent whole.
        min_compression_rate: A gradient has to become smaller by this factor.
    """

    keeps: ClassVar[bool] = True

    rank: int = 2
    start_step: int = 100
    min_compression_rate: float = 2.0

    def check(self) -> None:
        """See `Compression.check`."""
        for name, value, least in (
            ("rank", self.rank, 1), ("start_step", self.start_step, 0),
            ("min_compression_rate", self.min_compression_rate, 1),
        ):  # fmt: skip
            if not value >= least:
                raise ConfigError(f"PowerSGD({name}={value}) is too small. Use {least} or more.")

    def compresses(self, step: int) -> bool:
        """From ``start_step`` on."""
        return step >= self.start_step

    def mean(
        self, values: Tensor, parts: Parts, shared: dict[str, Tensor], group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        """See `Compression.mean`."""
        world_size = dist.get_world_size(group)
        mean, kept = torch.empty_like(values), torch.zeros_like(values)
        whole, low_rank = [], []
        sizes = [shape.numel() for _, shape in parts]
        for (name, shape), *views in zip(parts, *(every.split(sizes) for every in (values, mean, kept)), strict=True):
            if self._is_worth_it(shape):
                low_rank.append((name, *(view.view(shape[0], -1) for view in views)))
            else:
                whole.append(views)
        matrices = [value.to(_precise(value.dtype)) for _, value, *_ in low_rank]  # QR knows no half precision
        rights = [self._start(name, matrix, shared) for (name, *_), matrix in zip(low_rank, matrices, strict=True)]
        lefts = [matrix @ _orthogonal(right) for matrix, right in zip(matrices, rights, strict=True)]
        summed = _sum_together([value for value, *_ in whole] + lefts, group)
        for (_, target, _), total in zip(whole, summed, strict=False):
            target.view(-1).copy_(total.view(-1) / world_size)
        lefts = [_orthogonal(left) for left in summed[len(whole) :]]
        rights = _sum_together([matrix.T @ left for matrix, left in zip(matrices, lefts, strict=True)], group)
        for (name, value, target, rest), left, right in zip(low_rank, lefts, rights, strict=True):
            shared[name] = right / world_size
            target.copy_(left @ shared[name].T)
            rest.copy_(value - target)
        return mean, kept

    def _is_worth_it(self, shape: torch.Size) -> bool:
        rows, columns = _rows_and_columns(shape)
        return (rows + columns) * min(self.rank, rows, columns) * self.min_compression_rate < rows * columns

    def _start(self, name: str, matrix: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """What the iteration begins with, shape (columns, rank): the last step's result, without columns of zeros."""
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        columns = matrix.shape[1]
        drawn = torch.randn(columns, min(self.rank, *matrix.shape), generator=random).to(matrix)
        last = shared.get(name, drawn)
        return torch.where((last == 0).all(0), drawn, last)


_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NAMED: dict[str, Callable[[], Compression]] = {
    "fp16": partial(Half, "fp16"),
    "bf16": partial(Half, "bf16"),
    "int8": Int8,
    "topk": TopK,
    "powersgd": PowerSGD,
}


def compression_names() -> list[str]:
    """Names that `build_compression` knows."""
    return list(_NAMED)


def build_compression(compression: "str | Compression") -> Compression:
    """A compression by name with its defaults, or the caller's own, whose options are right.

    Raises:
        ConfigError: An unknown name, an object that is no compression, or an option out of its range.
    """
    known = f"Use one of {', '.join(_NAMED)}, or an object of sparkdl.parallel."
    if isinstance(compression, str):
        if compression not in _NAMED:
            raise ConfigError(f"compression={compression!r} is not known. {known}")
        return _NAMED[compression]()
    if isinstance(compression, type) or not all(hasattr(compression, name) for name in ("keeps", "compresses", "mean")):
        raise ConfigError(f"compression={compression!r} is no compression. {known}")
    compression.check()
    return compression


# ---- arithmetic ------------------------------------------------------------------------------------------------------
BLOCK = 256
"""Values of `Int8` that share a scale."""


def to_int8(values: Tensor) -> Tensor:
    """Values of shape (rows, values), a multiple of `BLOCK`, in 8 bits each.

    Returns:
        Bytes of shape (rows, values + 4 x blocks): integers of -127 to 127, and the scales in single precision. A block
        that holds a value that is not finite comes back as NaN.
    """
    blocks = values.view(len(values), -1, BLOCK)
    scales = (blocks.abs().amax(2) / 127).float()
    steps = torch.where(scales == 0, 1, scales).to(values.dtype)
    levels = (blocks / steps[:, :, None]).round().clamp(-127, 127).nan_to_num().to(torch.int8)
    return torch.cat([levels.view(len(values), -1).view(torch.uint8), scales.view(torch.uint8)], 1)


def from_int8(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `to_int8`."""
    num_values = data.shape[1] * BLOCK // (BLOCK + 4)
    levels = data[:, :num_values].view(torch.int8).reshape(len(data), -1, BLOCK)
    scales = data[:, num_values:].clone().view(torch.float32)
    return (levels.to(dtype) * scales[:, :, None].to(dtype)).view(len(data), -1)


def largest(values: Tensor, ratio: float) -> Tensor:
    """Places of that share of the values, at least one, that are largest in size; what is no number comes first."""
    return torch.topk(values.abs(), max(1, round(ratio * len(values))), sorted=False).indices


def _mean_in_slices(
    values: Tensor,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    group: dist.ProcessGroup | None,
    *,
    block: int = 1,
) -> tuple[Tensor, Tensor]:
    """The mean of all ranks' values, and what was lost of this rank's, where all that travels is encoded.

    Rank r adds up slice r. What is lost when it hands on the mean counts as its own: as if it had sent less.

    Args:
        values: Shape (values,).
        encode: From shape (rows, values of a slice) to bytes of shape (rows, bytes).
        decode: The way back.
        group: The ranks that take part.
        block: Slices are a multiple of it.
    """
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    size = -(-len(values) // (world_size * block)) * block
    slices = nn.functional.pad(values, (0, world_size * size - len(values))).view(world_size, size)
    sent = encode(slices)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    own_mean = decode(received).mean(0, keepdim=True)
    handed_on = encode(own_mean)
    dist.all_gather(list(received), handed_on[0], group=group)
    means = decode(received)
    kept = slices - decode(sent)
    kept[rank] += world_size * (own_mean[0] - means[rank])
    return means.view(-1)[: len(values)], kept.view(-1)[: len(values)]


def _sum_together(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The sums over ranks, in one message."""
    if not tensors:
        return []
    joined = torch.cat([value.reshape(-1) for value in tensors])
    dist.all_reduce(joined, group=group)
    parts = joined.split([value.numel() for value in tensors])
    return [part.view(value.shape) for part, value in zip(parts, tensors, strict=True)]


def _orthogonal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of the matrix; those of a matrix of zeros as well."""
    orthonormal: Tensor = torch.linalg.qr(matrix)[0]
    return orthonormal


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_and_columns(shape: torch.Size) -> tuple[int, int]:
    rows = shape[0] if shape else 1
    return rows, shape.numel() // max(rows, 1)
