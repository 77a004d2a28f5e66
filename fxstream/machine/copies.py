"""Copies of tensors between a device and host memory."""

from __future__ import annotations

import torch

__all__ = ["pinned", "to_device"]


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that a GPU reaches directly, several times faster than other host memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; from a GPU into host memory by way of pinned memory."""
    if device.type == "cpu" and tensor.is_cuda:
        return pinned(tensor)
    return tensor.to(device)
