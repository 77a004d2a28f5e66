"""What a capture depends on, as a key: a call with another key captures anew.

The key holds the training flags, the structure and types of the arguments, the types and devices of the model's
tensors, autocast, and what the model's Python code may branch on: the modules themselves, their hooks and
their simple attributes. Attributes that the model's own forward changes (a counter) are left out, for they would
change the key at each capture. Batch and image size are no part of it.
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
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], volatile: Collection[str] = ()
) -> tuple[Any, ...]:
    """The key of a call; attributes named in `volatile` are left out."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    images = iter(stream_dims([leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)]))
    inputs = tuple(_fixed(t, next(images)) if isinstance(t, torch.Tensor) else _constant(t) for t in leaves)
    weights = {(t.dtype, t.device) for t in (*model.parameters(), *model.buffers())}
    devices = {device.type for _, device in weights} | {
        t.device.type for t in leaves if isinstance(t, torch.Tensor)
    }
    autocast = {(d, torch.get_autocast_dtype(d)) for d in devices if d != "meta" and torch.is_autocast_enabled(d)}
    known = attributes(model)
    kept = tuple(item for item in known.items() if item[0] not in volatile) if volatile else tuple(known.items())
    return str(spec), inputs, frozenset(weights), frozenset(autocast), kept


def attributes(model: nn.Module) -> dict[str, Any]:
    """Identity, hooks and simple attributes of every module, training flags included, by name."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = (id(module), type(module), *(tuple(module.__dict__[hooks]) for hooks in HOOKS))
        for name, value in module.__dict__.items():
            if isinstance(value, SIMPLE) or (
                isinstance(value, tuple) and all(isinstance(v, SIMPLE) for v in value)
            ):
                found[f"{path}.{name}"] = (type(value), value)
            elif isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = id(value)
    return found


def _fixed(tensor: torch.Tensor, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """What of a tensor with these stream dims a capture depends on: everything but batch and image size."""
    fixed = tuple(size for dim, size in enumerate(tensor.shape) if dim > 0 and dim not in dims)
    return tensor.ndim, dims, fixed, tensor.dtype, tensor.device


def _constant(leaf: Any) -> tuple[Any, ...]:
    """Any other argument by type and value, since 1 == True == 1.0; what cannot be hashed by its text."""
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), repr(leaf)
    return type(leaf), leaf
