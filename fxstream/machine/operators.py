"""How an operator of the namespace `fxstream` is defined, and called by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["has_values", "operator", "overload", "untraced", "wide"]

Function = TypeVar("Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("fxstream", "DEF")


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that registers a function as an operator with this schema."""

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
        return function

    return define


def untraced(function: Function) -> Function:
    """The function, which dynamo does not look into: a backward is called in the middle of a user's code."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def overload(name: str) -> torch._ops.OpOverload:
    """The operator of this name."""
    packet: torch._ops.OpOverloadPacket = getattr(torch.ops.fxstream, name)
    return packet.default


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor is more than a shape: no fake one, and none of the meta device."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in at least 32 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
