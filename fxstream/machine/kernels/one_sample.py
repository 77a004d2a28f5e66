"""The stride of a batch of one sample, by which torch tells one memory format from another.

Such a stride means nothing, and `reshape`, `unsqueeze` and `permute` leave one there that is below the size of the
sample. Torch's batch norm on a CPU then takes a channels_last gradient for a contiguous one, or the other way
round, and its gradients are wrong (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["settled", "with_settled_gradient"]


class _Settled(torch.autograd.Function):
    """The same tensor, and the same gradient, with another stride."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _with_stride(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """A map with the stride of a batch of one that its format has, where it is on a CPU.

    >>> rows = torch.zeros(1, 15, 4).transpose(1, 2).unflatten(2, (3, 5))
    >>> rows.stride(), settled(rows).stride()
    ((4, 1, 20, 4), (60, 1, 20, 4))
    """
    if not _is_one_sample(tensor) or tensor.stride(0) >= _span(tensor):
        return tensor
    result: torch.Tensor = _Settled.apply(tensor)  # type: ignore[no-untyped-call]
    return result


def with_settled_gradient(result: torch.Tensor) -> torch.Tensor:
    """The same tensor, whose gradient will have that stride."""
    if result.requires_grad and _is_one_sample(result):
        result.register_hook(_with_stride)
    return result


def _is_one_sample(tensor: torch.Tensor) -> bool:
    return not tensor.is_cuda and len(tensor) == 1


def _span(tensor: torch.Tensor) -> int:
    """The elements from the first to behind the last of a sample, at least one."""
    spans = (size * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    return max(1, *spans)


def _with_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided(tensor.shape, (_span(tensor), *tensor.stride()[1:]))
