"""The stride of a batch of one sample, by which torch tells one memory format from another.

Such a stride means nothing, and `reshape`, `unsqueeze` and `permute` leave one there that is below the size of the
sample. Torch's batch norm on a CPU then takes a channels_last gradient for a contiguous one, or the other way
round, and its gradients are wrong (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["settled"]


class _Settled(torch.autograd.Function):
    """The same tensor, and the same gradient, each with the stride that its memory format has."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _with_stride(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _with_stride(gradient)


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """A map on a CPU as batch norm must get it, and as it must get the gradient of its result.

    >>> rows = torch.zeros(1, 15, 4).transpose(1, 2).unflatten(2, (3, 5))
    >>> rows.stride(), settled(rows).stride()
    ((4, 1, 20, 4), (60, 1, 20, 4))
    """
    if tensor.is_cuda or len(tensor) != 1:
        return tensor
    result: torch.Tensor = _Settled.apply(tensor)  # type: ignore[no-untyped-call]
    return result


def _with_stride(tensor: torch.Tensor) -> torch.Tensor:
    """A view with a stride of all that a sample spans."""
    _, *strides = tensor.stride()
    span = max((size * stride for size, stride in zip(tensor.shape[1:], strides, strict=True)), default=1)
    return tensor.as_strided(tensor.shape, (max(span, 1), *strides))
