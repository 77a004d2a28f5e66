"""What a trace depends on in the tensors of a call, but for batch and image size, as a key.

It takes the place of dynamo's guards on these tensors: types, devices, channels, whether gradients are asked for,
memory formats, and which of them are the same tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxstream.graph.shapes import stream_dims

__all__ = ["input_key"]

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def input_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of the tensors of a call, and of what autograd does around it."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    first = {id(tensor): i for i, tensor in reversed(list(enumerate(tensors)))}
    dims = stream_dims([tensor.shape for tensor in tensors])
    keys = (_tensor_key(*pair) for pair in zip(tensors, dims, strict=True))
    return torch.is_inference_mode_enabled(), *((first[id(t)], key) for t, key in zip(tensors, keys, strict=True))


def _tensor_key(tensor: torch.Tensor, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """What a trace depends on in a tensor with these tiled dims: everything but batch and image size."""
    fixed = tuple(size for dim, size in enumerate(tensor.shape) if dim > 0 and dim not in dims)
    is_plain = tensor.layout == torch.strided
    formats = (torch.contiguous_format, FORMATS.get(tensor.ndim, torch.contiguous_format))
    strides = tuple(tensor.is_contiguous(memory_format=one) for one in formats) if is_plain else ()
    stands_in = is_plain and tensor.numel() > 1 and 0 in tensor.stride()
    return (
        type(tensor),
        tensor.ndim,
        dims,
        fixed,
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        tensor.layout,
        tensor.is_inference(),
        (True, tensor.ndim < 4) if stands_in else strides,
    )
