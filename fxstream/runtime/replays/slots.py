"""Static tensors: where replays read their arguments and leave their results."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import NamedTuple

import torch

__all__ = ["Form", "Slots", "form_of"]

FORMS = 4096
"""Shapes and strides whose dense strides are remembered."""


class Form(NamedTuple):
    """The shape, strides and type of a tensor that has no gaps."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def form_of(tensor: torch.Tensor) -> Form:
    """The form of a dense copy of a tensor, in the same memory format."""
    return _dense(tensor.shape, tensor.stride(), tensor.dtype)


@functools.lru_cache(FORMS)
def _dense(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Form:
    """What `torch.empty_like` makes of a tensor.

    >>> _dense((1, 2, 3), (100, 50, 5), torch.float32).strides
    (6, 3, 1)
    """
    like = torch.empty_like(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
    return Form(tuple(shape), like.stride(), dtype)


class Slots:
    """Memory by name and type, of which tensors of several forms are views: each name has that of the largest.

    It may be written in inference mode and without.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[tuple[Hashable, torch.dtype], torch.Tensor] = {}
        self._least: dict[Hashable, int] = {}

    def reserve(self, name: Hashable, count: int) -> None:
        """Let a name have room for so many elements when it is first asked for."""
        self._least[name] = max(count, self._least.get(name, 0))

    @torch.inference_mode(False)
    def get(self, name: Hashable, form: Form) -> torch.Tensor:
        """The tensor of a name in this form. It shares memory with those of other forms of the name."""
        count, key = math.prod(form.shape), (name, form.dtype)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < count:
            size = max(count, self._least.get(name, 0))
            memory = self._memory[key] = torch.empty(size, dtype=form.dtype, device=self._device)
        return memory.as_strided(form.shape, form.strides)

    @property
    def bytes(self) -> int:
        """Of all memory."""
        return sum(memory.nbytes for memory in self._memory.values())

    def clear(self) -> None:
        """Give the memory back."""
        self._memory.clear()
