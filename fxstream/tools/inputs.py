"""Inputs of the shapes and types that a command line names: without memory to be analysed, or drawn to be run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fxstream.compiler.analysis import example_inputs
from fxstream.errors import InputError
from fxstream.tools.values import Input

__all__ = ["checked_inputs", "drawn_inputs", "example_inputs_of"]

Example = torch.Tensor | tuple[int, ...]
"""A tensor, or the shape of one of the model's own type."""


def example_inputs_of(model: nn.Module, inputs: Sequence[Input]) -> list[Example]:
    """What `analyze` takes: a shape, or where a type is named a tensor of it without memory."""
    device = next((parameter.device for parameter in model.parameters()), None)
    return [
        torch.zeros(1, dtype=_dtype(name), device=device).expand(shape) if name else shape
        for shape, name in inputs
    ]


def checked_inputs(model: nn.Module, inputs: Sequence[Input]) -> list[Example]:
    """What `check` takes: a shape, which it draws, or where a type is named a tensor of it with values."""
    return [_drawn(one) if isinstance(one, torch.Tensor) else one for one in example_inputs_of(model, inputs)]


def drawn_inputs(model: nn.Module, inputs: Sequence[Input]) -> list[torch.Tensor]:
    """A tensor with values for each input."""
    return [_drawn(example) for example in example_inputs(model, None, 1, 1, example_inputs_of(model, inputs))]


def _drawn(example: torch.Tensor) -> torch.Tensor:
    """From a normal distribution, or zeros and ones where the type has no fractions."""
    if example.is_floating_point():
        return torch.randn(example.shape, dtype=example.dtype, device=example.device)
    return torch.randint(0, 2, example.shape, device=example.device).to(example.dtype)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"--input has the type {name!r}, which torch does not have: use float32, uint8 or int64")
    return dtype
