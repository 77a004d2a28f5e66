"""What a trace depends on in the tensors of a call, but for batch and image size, as a key.

It takes the place of dynamo's guards on these tensors: types, devices, channels, whether gradients are asked for,
and which of them are the same tensor. How they lie in memory matters only to a model that asks for it
(`input_formats`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxstream.graph.shapes import stream_dims

__all__ = ["input_formats", "input_key"]

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
    )


def input_formats(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """How the tensors of a call lie in memory: which of torch's formats each has."""
    return tuple(
        tuple(tensor.is_contiguous(memory_format=one) for one in (torch.contiguous_format, FORMATS[tensor.ndim]))
        if tensor.ndim in FORMATS and tensor.layout == torch.strided and 0 not in tensor.stride()
        else tensor.is_contiguous() or 0 in tensor.stride()
        for tensor in tensors
    )
