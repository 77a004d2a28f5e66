"""Copies of tensors: of boxes, and between an accelerator and host memory.

The latter go by way of pinned memory where that is faster.
"""

from __future__ import annotations

import torch

__all__ = ["buffer_for", "dense", "staged", "to_device"]

PINNING = frozenset({"cuda"})
"""Types of accelerators that reach pinned host memory directly, several times faster than other host memory."""


def staged(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of host memory, ready to be copied to a device: in pinned memory where the device uses that."""
    return _pinned(tensor) if device.type in PINNING else tensor


def buffer_for(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Host memory without values, ready to be copied to a device; torch reuses pinned memory that is freed."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type in PINNING)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; from an accelerator into host memory by way of pinned memory."""
    if device.type == "cpu" and tensor.device.type in PINNING:
        return _pinned(tensor)
    return tensor.to(device)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied without the gaps that a box of a larger one has, in the order of its dims in memory.

    >>> dense(torch.zeros(1, 6, 8, 4).permute(0, 3, 1, 2)[:, :, :2, :3]).stride()
    (24, 1, 12, 4)
    """
    return tensor if torch.empty_like(tensor, device="meta").stride() == tensor.stride() else tensor.clone()
