"""The tensors of a call as a trace sees them: stand-ins for them, and what it depends on in them, as a key.

The key has all but batch and image size. It takes the place of dynamo's guards on these tensors: types, devices,
channels, whether gradients are asked for, and which of them are the same tensor. How they lie in memory matters
only to a model that asks for it (`input_formats`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo import mark_static, maybe_mark_dynamic
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from fxstream.graph.shapes import stream_dims

__all__ = ["FakeInputs", "input_formats", "input_key"]

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


class FakeInputs:
    """Arguments with fake tensors in the place of tensors; `ids` are those of the fake ones.

    A tensor of a class of the user's stays, and with it the guards on its size. With `symbols` the sizes that
    differ from call to call, batch and pixels, are symbols for the trace.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], symbols: bool = False) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fakes: dict[int, torch.Tensor] = {}
        self.args, self.kwargs = pytree.tree_map(self._fake, (args, dict(kwargs)))
        fakes = list(self._fakes.values())
        self.ids = frozenset(map(id, fakes))
        for fake, dims in zip(fakes, stream_dims([fake.shape for fake in fakes]), strict=True):
            if symbols and fake.ndim:
                maybe_mark_dynamic(fake, (0, *dims))
            else:
                mark_static(fake)

    def _fake(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, nn.Parameter, FakeTensor) or value.layout != torch.strided:
            return value
        if id(value) not in self._fakes:
            stands_in = 0 in value.stride() and value.numel() > 1
            strides = torch.empty(value.shape, device="meta").stride() if stands_in else value.stride()
            with self._mode:
                fake = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
            self._fakes[id(value)] = fake.requires_grad_(value.requires_grad)
        return self._fakes[id(value)]
