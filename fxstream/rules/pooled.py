"""Poolings of the whole map to a few windows per axis, as reductions over space.

A tile reads its part of the map and, of each axis, which window holds which of its pixels: small tensors that are
cut by position like the map itself. What it yields are the sums, or the first maxima, of its part of each window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxstream.operators import overload
from fxstream.receptive_field import BROADCAST, IDENTITY
from fxstream.rules.reductions import Combine, reduced
from fxstream.rules.rule import Answer, Call, Footprint, Kind, Read, Refusal, RuleTable, Value

__all__ = ["add_rules"]


def add_rules(table: RuleTable) -> None:
    """The operators that adaptive poolings are made of."""
    table.add("fxstream::window_sums", "reduction", window_sums)
    table.add("fxstream::window_maxima", "reduction", window_maxima)


def window_sums(call: Call) -> Answer:
    """Sums over windows."""
    return _over_windows(call, ["windows"], sums_of, _sums)


def window_maxima(call: Call) -> Answer:
    """The first maximum of each window, and its position."""
    return _over_windows(call, ["windows", "positions"], maxima_of, _first_maxima)


def _over_windows(call: Call, arguments: Sequence[str], target: Callable[..., Any], combine: Combine) -> Answer:
    """The reduction of a map whose stream axes are its last dims; `arguments` are tensors of one per axis."""
    image: Value = call["self"]
    axes = len(call["windows"])
    start = len(image.shape) - axes
    if set(image.dims) != set(range(start, len(image.shape))):
        return Refusal(Kind.REDUCE, "pools some stream axes and keeps others")
    reads = [Read("self", image, image.dims, (IDENTITY,) * axes)]
    for argument in arguments:
        for i, value in enumerate(call[argument]):
            before = len(value.shape) - axes - start
            maps = tuple(IDENTITY if dim == start + i else BROADCAST for dim in image.dims)
            reads.append(Read(argument, value, tuple(dim + before for dim in image.dims), maps, i))
    answer = reduced(reads, target, combine)
    macs = math.prod(image.shape) * call["windows"][-1].shape[0]
    return replace(answer, macs=macs) if isinstance(answer, Footprint) else answer


def sums_of(tensor: torch.Tensor, *windows: torch.Tensor) -> torch.Tensor:
    """A tile's part of each window's sum."""
    found: torch.Tensor = overload("window_sums")(tensor, windows)
    return found


def maxima_of(tensor: torch.Tensor, *small: torch.Tensor) -> torch.Tensor:
    """The first maximum in a tile's part of each window and its position in the whole map."""
    axes = len(small) // 2
    found: torch.Tensor = overload("window_maxima")(tensor, small[:axes], small[axes:])
    return found


def _sums(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return partials.double().sum(0)


def _first_maxima(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    maxima, places = partials.double().unbind(1)
    known = maxima.detach()
    best = (known == known.amax(0)) | known.isnan()
    first = torch.where(best, places.detach(), math.inf).argmin(0, keepdim=True)
    return torch.stack([maxima.gather(0, first)[0], places.gather(0, first)[0]])
