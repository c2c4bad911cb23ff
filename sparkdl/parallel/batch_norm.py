"""BatchNorm over the rows of all ranks: Ioffe and Szegedy, arXiv 1502.03167, with sums that are reduced over ranks.

`torch.nn.SyncBatchNorm` runs on GPUs alone. This one runs wherever there is a process group, and takes part with no
rows as well: a rank may have none in a step.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """A BatchNorm layer of any number of dimensions; in eval mode it is the layer that it stands for."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        """Any tensor of shape (rows, channels, ...)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalise values of shape (rows, channels, ...) by the statistics of all ranks' rows."""
        if not self.training:
            normalised: Tensor = super().forward(input)
            return normalised
        dims = [0, *range(2, input.dim())]
        values = input if input.dtype == torch.float64 else input.float()
        # In float64, or the difference of the two sums is lost where the mean is large.
        total, total_of_squares = (found.sum(dims, dtype=torch.float64) for found in (values, values.square()))
        own = torch.cat([total, total_of_squares, total.new_full((1,), input.numel() / self.num_features)])
        summed: Tensor = _SumOverRanks.apply(own)  # type: ignore[no-untyped-call]
        sums, squares, count = summed.split([self.num_features, self.num_features, 1])
        mean = sums / count
        variance = (squares / count - mean.square()).clamp(min=0)
        if self.track_running_stats:
            self._track(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        shape = [1, -1, *[1] * (input.dim() - 2)]
        scale = torch.rsqrt(variance + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        scale, shift = scale.to(values.dtype).view(shape), shift.to(values.dtype).view(shape)
        return torch.addcmul(shift, values, scale).to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """A module whose BatchNorm layers are of this class; parameters and buffers are the same objects."""
        if isinstance(module, _BatchNorm) and not isinstance(module, cls):
            made = cls(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
            ).train(module.training)
            made._parameters, made._buffers = module._parameters, module._buffers
            return made
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child))
        return module


class _SumOverRanks(torch.autograd.Function):
    """The sum of a vector over all ranks, and of its gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, own: Tensor) -> Tensor:
        summed = own.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Any) -> Any:
        summed = gradient.clone()
        dist.all_reduce(summed)
        return summed
