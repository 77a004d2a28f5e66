"""Operators that feature-map-wide ones are made of, as torch operators of the namespace `fxstream`.

They are compositions of torch's own operators: torch differentiates them, and runs them on any device and on fake
tensors. Graphs name them, so that rules can say what a tile contributes to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["class_weights", "contract", "moments", "overload"]

_LIBRARY = torch.library.Library("fxstream", "DEF")


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that registers a function of tensors as an operator with this schema."""

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
        return function

    return define


def overload(name: str) -> torch._ops.OpOverload:
    """The operator of this name."""
    packet: torch._ops.OpOverloadPacket = getattr(torch.ops.fxstream, name)
    return packet.default


@_operator("moments(Tensor self, int[] dim) -> Tensor")
def moments(tensor: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """Mean, variance and sample variance over `dims`, stacked in front, in at least 32 bits.

    >>> moments(torch.tensor([[1.0, 3.0]]), [1])
    tensor([[2.],
            [1.],
            [2.]])
    """
    held = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    variance, mean = torch.var_mean(held, dims, correction=0)
    count = 1
    for dim in dims:
        count *= tensor.shape[dim]
    return torch.stack([mean, variance, variance * (count / max(1, count - 1))])


@_operator("class_weights(Tensor target, Tensor? weight, int ignore_index, *, ScalarType dtype) -> Tensor")
def class_weights(
    target: torch.Tensor, weight: torch.Tensor | None, ignored: int, *, dtype: torch.dtype
) -> torch.Tensor:
    """The weight of each pixel's class, one where there are no weights; zero of the ignored class.

    >>> class_weights(torch.tensor([1, 0, 9]), torch.tensor([2.0, 3.0]), 9, dtype=torch.float32)
    tensor([3., 2., 0.])
    """
    counted = target != ignored
    if weight is None:
        return counted.to(dtype)
    return weight.detach().to(dtype)[torch.where(counted, target, 0)] * counted


@_operator("contract(str equation, Tensor self, Tensor other) -> Tensor")
def contract(equation: str, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.einsum` of two operands.

    >>> contract("nc,nk->ck", torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]))
    tensor([[11.]])
    """
    return torch.einsum(equation, one, other)
