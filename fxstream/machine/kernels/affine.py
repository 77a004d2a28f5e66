"""Batch norm with statistics given, by kernels that read channels_last as it is.

On CUDA torch's backward of it gathers each channel of a channels_last map on its own, which takes as long as all
else together; the kernels that SyncBatchNorm is made of read rows of channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fxstream.machine.kernels.one_sample import settled, with_settled_gradient
from fxstream.machine.operators import operator, overload, untraced

__all__ = ["BATCH_NORM", "batch_norm"]


class _Affine(torch.autograd.Function):
    """The kernels of SyncBatchNorm; the gradients of the statistics are none."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        mean, root = mean.to(wide), (variance.to(wide) + eps).rsqrt()
        ctx.save_for_backward(tensor, weight, mean, root)
        ctx.has_bias = bias is not None
        result: torch.Tensor = torch.batch_norm_elemt(tensor, weight, bias, mean, root, eps)  # type: ignore[attr-defined]
        return result

    @staticmethod
    @once_differentiable
    @untraced
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensor, weight, mean, root = ctx.saved_tensors
        of_tensor, of_weight, of_bias = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sums: tuple[torch.Tensor | None, ...] = (None, None)
        if of_weight or of_bias:
            which = (False, of_weight, of_bias)
            sums = torch.batch_norm_backward_reduce(gradient, tensor, mean, root, weight, *which)[2:]  # type: ignore[attr-defined]
        moved = None
        if of_tensor:
            nothing = torch.zeros_like(mean)
            moved = torch.batch_norm_elemt(gradient, weight, None, nothing, root, 0.0)  # type: ignore[attr-defined]
        return moved, sums[0] if of_weight else None, sums[1] if of_bias else None, None, None, None


@operator(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var,"
    " bool training, float momentum, float eps, bool cudnn_enabled) -> Tensor"
)
def batch_norm(
    tensor: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> torch.Tensor:
    """`torch.batch_norm` with statistics given, which are constants; for the tiles of a map.

    >>> one = torch.ones(1)
    >>> batch_norm(torch.tensor([[[1.0, 3.0]]]), 2 * one, one, one, one, False, 0.0, 0.0, False)
    tensor([[[1., 5.]]])
    """
    if _has_rows_of_channels(tensor) and torch.is_grad_enabled():
        result: torch.Tensor = _Affine.apply(tensor, weight, bias, mean, variance, eps)  # type: ignore[no-untyped-call]
        return result
    arguments = (settled(tensor), weight, bias, mean, variance, False, momentum, eps, cudnn_enabled)
    return with_settled_gradient(torch.ops.aten.batch_norm(*arguments))


BATCH_NORM = overload("batch_norm")
"""The operator."""


def _has_rows_of_channels(tensor: torch.Tensor) -> bool:
    """Whether it is a channels_last map on CUDA."""
    is_map = tensor.is_cuda and tensor.ndim == 4 and not tensor.is_contiguous()
    return is_map and tensor.is_contiguous(memory_format=torch.channels_last)
