"""Reductions over tiled dims, all or some: what a tile contributes, and how the contributions are combined.

A reduction over space is one over tiles. Each tile owns a box of the positions, the boxes partition them, and it
yields a small partial result of the positions that it owns. `combine` makes the whole result of all partial
results; it is an ordinary differentiable function of them, so that its gradient is what each tile pulls back.

Partial results have 32 bits at least and are combined in 64. Means and variances are combined with the term
between tiles (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
1979). The gradient of a maximum is shared by all positions that attain it, as torch's `amax` does it.

A reduction over some axes keeps the others as dims of its result, which is whole: a tile contributes the rows
that it owns, and nothing to the others. So are rows averaged, pooled into strips, or normalised.

Of an adaptive pooling to a few windows per axis a tile reads its part of the map and, of each axis, which window
holds which of its pixels: small tensors that are cut by position like the map itself. What it yields are the sums,
or the first maxima, of its part of each window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fxstream.geometry.receptive_field import BROADCAST, IDENTITY
from fxstream.machine.kernels.moments import combined_moments, mean_variance
from fxstream.machine.operators import overload, wide
from fxstream.rules.access import Read, Value
from fxstream.rules.patterns import Combine, Reduced
from fxstream.rules.reasons import NotTileable, Reason
from fxstream.rules.rule import Answer, Call, RuleTable

__all__ = ["Reducer", "add_rules", "over_space", "reduced", "sums_of_tiles"]

NO_MAXIMUM = (-math.inf, 0.0)
"""Of no pixels: the maximum, and how often it is attained."""
OF_INTEGERS = ("sum", "prod", "any", "all")
"""Reductions of whole numbers and truth values too."""


def add_rules(table: RuleTable) -> None:
    """The operators that feature-map-wide normalisations and adaptive poolings are made of."""
    table.add("fxstream::moments", "reduction", moments)
    table.add("fxstream::window_sums", "reduction", window_sums)
    table.add("fxstream::window_maxima", "reduction", window_maxima)


def reduced(reads: Sequence[Read], target: Callable[..., Any], combine: Combine, *arguments: Any) -> Answer:
    """The pattern of a reduction, whose tiles run `target` on their parts of what it reads and `arguments`."""
    return Reduced(reads[0].dims, tuple(reads), target, combine, arguments)


def over_space(call: Call, image: Value, touched: Sequence[int]) -> Answer:
    """A reduction of one map over dims that include tiled dims."""
    name = call.target._schema.name.removeprefix("aten::")
    is_known = len(call.shapes) == 1 and (image.dtype.is_floating_point or name in OF_INTEGERS)
    reducer = REDUCERS.get(name) if is_known else None
    answer = reducer(call) if reducer is not None else None
    if answer is None:
        is_part = not set(image.dims) <= set(touched)
        return NotTileable(Reason.REDUCES_SOME_DIMS if is_part else Reason.REDUCES_SPACE)
    argument = next(name for name, _, value in call.tensors() if value.name == image.name)
    read = Read(argument, image, image.dims, (IDENTITY,) * len(image.dims))
    keepdim = bool(call.arguments.get("keepdim", False))
    kept = _kept(image, touched, keepdim)
    if kept and name == "mean":
        answer = Reducer(sum_of, partial(_means_of_sums, math.prod(image.shape[dim] for dim in touched)))
    arguments = (list(touched), keepdim)
    return Reduced(image.dims, (read,), answer.of_tile, answer.combine, arguments, kept, answer.absent)


def _kept(image: Value, touched: Sequence[int], keepdim: bool) -> dict[int, tuple[int, int]]:
    """The axes that a reduction leaves: per axis the dim of the result, counted from the last, and its extent."""
    left = [d for d in range(len(image.shape)) if keepdim or d not in touched]
    kept = ((k, d) for k, d in enumerate(image.dims) if d not in touched)
    return {k: (left.index(d) - len(left), image.shape[d]) for k, d in kept}


@dataclass(frozen=True, slots=True)
class Reducer:
    """What a tile computes, how that is combined, and what a tile has in its place where it owns nothing."""

    of_tile: Callable[..., Any]
    combine: Combine
    absent: tuple[float, ...] = (0.0,)


def _norm(call: Call) -> Reducer | None:
    orders = {
        1.0: Reducer(norm_1, partial(_norms, 1.0)),
        2.0: Reducer(norm_2, partial(_norms, 2.0)),
        math.inf: Reducer(largest_of, _maxima, NO_MAXIMUM),
    }
    return orders.get(float(call["ord"]))


def moments(call: Call) -> Answer:
    """Mean, variance and sample variance in one pass."""
    image: Value = call["self"]
    touched = [d % len(image.shape) for d in call["dim"]]
    if not set(image.dims) <= set(touched):
        return NotTileable(Reason.REDUCES_SOME_DIMS)
    others = math.prod(image.shape[dim] for dim in set(touched) - set(image.dims))
    read = Read("self", image, image.dims, (IDENTITY,) * len(image.dims))
    return reduced([read], moments_of, partial(_moments, others), touched)


def sum_of(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """A tile's sum, of whole numbers in 64 bits."""
    return (wide(tensor) if tensor.is_floating_point() else tensor).sum(dims, keepdim)


def mean_of(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """A tile's mean."""
    return wide(tensor).mean(dims, keepdim)


def maximum_of(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """A tile's maximum, and how often it is attained."""
    maximum = wide(tensor).amax(dims, True)
    often = (tensor.detach() == maximum.detach()).sum(dims, keepdim)
    return torch.stack([maximum if keepdim else maximum.squeeze(dims), often.to(maximum.dtype)])


def minimum_of(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """The same of the negated tile."""
    return maximum_of(-tensor, dims, keepdim)


def largest_of(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """The same of the absolute values."""
    return maximum_of(tensor.abs(), dims, keepdim)


def any_of(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """Whether any of a tile is true, as a number."""
    return tensor.any(dims, keepdim).int()


def all_of(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """Whether all of a tile is true, as a number."""
    return tensor.all(dims, keepdim).int()


def product_of(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """A tile's product, of whole numbers in 64 bits."""
    product = wide(tensor) if tensor.is_floating_point() else tensor.long()
    for dim in sorted(dims, reverse=True):
        product = product.prod(dim, keepdim)
    return product


def logsumexp_of(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """A tile's logarithm of the sum of exponentials."""
    return torch.logsumexp(wide(tensor), dims, keepdim)


def norm_1(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """A tile's sum of absolute values."""
    norm: torch.Tensor = torch.linalg.vector_norm(wide(tensor), 1, dims, keepdim)
    return norm


def norm_2(tensor: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """A tile's Euclidean norm."""
    norm: torch.Tensor = torch.linalg.vector_norm(wide(tensor), 2, dims, keepdim)
    return norm


def moments_of(tensor: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """A tile's mean and variance."""
    return mean_variance(tensor, dims)


def sums_of_tiles(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The sum of the sums of tiles."""
    return (partials.double() if partials.is_floating_point() else partials).sum(0)


def _along_tiles(counts: torch.Tensor, partials: torch.Tensor) -> torch.Tensor:
    return counts.view(-1, *[1] * (partials.ndim - 1))


def _means(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (partials.double() * _along_tiles(counts / counts.sum(), partials)).sum(0)


def _means_of_sums(count: int, partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return sums_of_tiles(partials, counts) / count


def _products(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (partials.double() if partials.is_floating_point() else partials).prod(0)


def _any(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return partials.amax(0)


def _all(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return partials.amin(0)


def _maxima(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    maxima, often = partials.double().unbind(1)
    whole = maxima.detach().amax(0)
    shares = often.detach() * (maxima.detach() == whole)
    shares = shares / shares.sum(0).clamp(min=1)
    finite = torch.where(maxima.isfinite(), maxima, 0.0)
    return whole + (shares * (finite - finite.detach())).sum(0)


def _minima(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return -_maxima(partials, counts)


def _logsumexps(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(partials.double(), 0)


def _norms(order: float, partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(partials.double(), order, 0)
    return norm


def _moments(others: int, partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return combined_moments(partials, counts * others)


REDUCERS: dict[str, Callable[[Call], Reducer | None]] = {
    "sum": lambda call: Reducer(sum_of, sums_of_tiles),
    "mean": lambda call: Reducer(mean_of, _means),
    "amax": lambda call: Reducer(maximum_of, _maxima, NO_MAXIMUM),
    "amin": lambda call: Reducer(minimum_of, _minima, NO_MAXIMUM),
    "max": lambda call: Reducer(maximum_of, _maxima, NO_MAXIMUM),
    "min": lambda call: Reducer(minimum_of, _minima, NO_MAXIMUM),
    "any": lambda call: Reducer(any_of, _any, (0,)),
    "all": lambda call: Reducer(all_of, _all, (1,)),
    "prod": lambda call: Reducer(product_of, _products, (1,)),
    "logsumexp": lambda call: Reducer(logsumexp_of, _logsumexps, (-math.inf,)),
    "linalg_vector_norm": _norm,
}
"""Per reduction of a map: what a tile computes and how that is combined."""


def window_sums(call: Call) -> Answer:
    """Sums over windows."""
    return _over_windows(call, ["windows"], window_sums_of, _summed)


def window_maxima(call: Call) -> Answer:
    """The first maximum of each window, and its position."""
    return _over_windows(call, ["windows", "positions"], window_maxima_of, _first_maxima)


def _over_windows(call: Call, arguments: Sequence[str], target: Callable[..., Any], combine: Combine) -> Answer:
    """The reduction of a map whose tiled dims are its last dims; `arguments` are tensors of one per axis."""
    image: Value = call["self"]
    axes = len(call["windows"])
    start = len(image.shape) - axes
    if set(image.dims) != set(range(start, len(image.shape))):
        return NotTileable(Reason.POOLS_SOME_DIMS)
    reads = [Read("self", image, image.dims, (IDENTITY,) * axes)]
    for argument in arguments:
        for i, value in enumerate(call[argument]):
            before = len(value.shape) - axes - start
            maps = tuple(IDENTITY if dim == start + i else BROADCAST for dim in image.dims)
            reads.append(Read(argument, value, tuple(dim + before for dim in image.dims), maps, i))
    return reduced(reads, target, combine)


def window_sums_of(tensor: torch.Tensor, *windows: torch.Tensor) -> torch.Tensor:
    """A tile's part of each window's sum."""
    sums: torch.Tensor = overload("window_sums")(tensor, windows)
    return sums


def window_maxima_of(tensor: torch.Tensor, *small: torch.Tensor) -> torch.Tensor:
    """The first maximum in a tile's part of each window and its position in the whole map."""
    axes = len(small) // 2
    maxima: torch.Tensor = overload("window_maxima")(tensor, small[:axes], small[axes:])
    return maxima


def _summed(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return partials.double().sum(0)


def _first_maxima(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    maxima, places = partials.double().unbind(1)
    detached = maxima.detach()
    best = (detached == detached.amax(0)) | detached.isnan()
    first = torch.where(best, places.detach(), math.inf).argmin(0, keepdim=True)
    return torch.stack([maxima.gather(0, first)[0], places.gather(0, first)[0]])
