"""What a capture depends on, as a key: a call with another key is captured again.

The key holds the training flags, the structure and types of the arguments, the types and devices of the model's
tensors, autocast, and what the model's Python code may branch on: the modules themselves, their hooks and
their simple attributes. Attributes that the model's forward changes itself (a counter) are unguarded, since they
would change the key at each capture. Batch and image size are not part of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxstream.graph.shapes import stream_dims

__all__ = ["attributes", "mode_key"]

SIMPLE = (bool, int, float, str, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def mode_key(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], unguarded: Collection[str] = ()
) -> tuple[Any, ...]:
    """The key of a call; attributes named in `unguarded` are left out."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    dims = iter(stream_dims([tensor.shape for tensor in tensors]))
    inputs = tuple(
        _tensor_key(leaf, next(dims)) if isinstance(leaf, torch.Tensor) else _constant_key(leaf) for leaf in leaves
    )
    weights = {(t.dtype, t.device) for t in (*model.parameters(), *model.buffers())}
    devices = {device.type for _, device in weights} | {tensor.device.type for tensor in tensors}
    autocast = {(d, torch.get_autocast_dtype(d)) for d in devices if d != "meta" and torch.is_autocast_enabled(d)}
    guarded = tuple(item for item in attributes(model).items() if item[0] not in unguarded)
    return str(spec), inputs, frozenset(weights), frozenset(autocast), guarded


def attributes(model: nn.Module) -> dict[str, Any]:
    """Identity, hooks and simple attributes of every module, training flags included, by name."""
    values: dict[str, Any] = {}
    for path, module in model.named_modules():
        values[path] = (id(module), type(module), *(tuple(module.__dict__[hooks]) for hooks in HOOKS))
        for name, value in module.__dict__.items():
            if isinstance(value, SIMPLE) or _is_simple_tuple(value):
                values[f"{path}.{name}"] = (type(value), value)
            elif isinstance(value, torch.Tensor):
                values[f"{path}.{name}"] = id(value)
    return values


def _is_simple_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, SIMPLE) for item in value)


def _tensor_key(tensor: torch.Tensor, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """What a capture depends on in a tensor with these tiled dims: everything but batch and image size."""
    fixed = tuple(size for dim, size in enumerate(tensor.shape) if dim > 0 and dim not in dims)
    return tensor.ndim, dims, fixed, tensor.dtype, tensor.device


def _constant_key(leaf: Any) -> tuple[Any, ...]:
    """Any other argument by type and value, since 1 == True == 1.0; by its text if it cannot be hashed."""
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), repr(leaf)
    return type(leaf), leaf
