"""Operators that feature-map-wide ones are made of, as torch operators of the namespace `fxstream`.

They are compositions of torch's own operators: torch differentiates them, and runs them on any device and on fake
tensors. Graphs name them, so that rules can say what a tile contributes to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxstream.machine.operators import operator, overload, wide

__all__ = [
    "attention",
    "average_windows",
    "class_weights",
    "contract",
    "dropout",
    "entry_keys",
    "overload",
    "placed",
    "positions",
    "whole",
    "wide",
    "window_maxima",
    "window_sums",
    "windows",
]


@operator("attention(Tensor query, Tensor key, Tensor value, Tensor? mask, int rows, float? scale) -> Tensor")
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    rows: int,
    scale: float | None,
) -> torch.Tensor:
    """Attention of queries [*batch, *positions, channels] to keys [*batch, keys, channels].

    The positions are `rows` dims. The mask broadcasts to [*batch, *positions, keys]. Torch's fused kernels take
    four dims.

    >>> maps = torch.ones(2, 1, 3, 4, 5)
    >>> attention(maps, maps[:, :, 0], maps[:, :, 0], None, 2, None).shape
    torch.Size([2, 1, 3, 4, 5])
    """
    batch, positions = query.shape[: -1 - rows], query.shape[-1 - rows : -1]
    if mask is not None:
        mask = mask[(None,) * (query.ndim - mask.ndim)]
        mask = mask.expand(*mask.shape[: len(batch)], *positions, key.shape[-2]).flatten(-1 - rows, -2)
        mask = _four_dims(mask, batch)
    query, key, value = (_four_dims(t, batch) for t in (query.flatten(-1 - rows, -2), key, value))
    result = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return result.reshape(*batch, *positions, value.shape[-1])


def _four_dims(tensor: torch.Tensor, batch: Sequence[int]) -> torch.Tensor:
    """[*batch, length, channels] with two dims for the batch; dims of one stay where all of the first do."""
    lead, (heads, *matrix) = tensor.shape[: len(batch) - 1], tensor.shape[max(0, len(batch) - 1) :]
    if len(batch) == 0:
        return tensor[None, None]
    if all(size == 1 for size in lead):
        return tensor.reshape(1, heads, *matrix)
    return tensor.expand(*batch[:-1], heads, *matrix).reshape(-1, heads, *matrix)


@operator("class_weights(Tensor target, Tensor? weight, int ignore_index, *, ScalarType dtype) -> Tensor")
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


@operator("contract(str equation, Tensor self, Tensor other) -> Tensor")
def contract(equation: str, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.einsum` of two operands.

    >>> contract("nc,nk->ck", torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]))
    tensor([[11.]])
    """
    return torch.einsum(equation, one, other)


@operator("positions(int[] shape, int dim, *, Device? device=None) -> Tensor")
def positions(shape: list[int], dim: int, *, device: torch.device | None = None) -> torch.Tensor:
    """What each index along `dim` adds to the row-major position in an array of this shape.

    The result has the rank of the array and extent 1 along all other dims, so that the sum over the dims of it are
    the positions.

    >>> (positions([2, 3], 0) + positions([2, 3], 1)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    line = torch.arange(shape[dim], device=device) * math.prod(shape[dim + 1 :])
    return line.view([-1 if d == dim else 1 for d in range(len(shape))])


@operator("whole(Tensor(a) self, int start, int end) -> Tensor(a)")
def whole(tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """The positions in dims `start` to `end` in one dim, for an operator that reads all of them.

    >>> whole(torch.ones(2, 3, 4, 5), 1, 2).shape
    torch.Size([2, 12, 5])
    """
    return tensor.flatten(start, end)


@operator("windows(int count, int extent, int axis, int axes, *, Device? device=None) -> Tensor")
def windows(count: int, extent: int, axis: int, axes: int, *, device: torch.device | None = None) -> torch.Tensor:
    """Which pixels of an axis each window of an adaptive pooling holds.

    Window ``i`` of ``k`` on ``n`` pixels holds ``floor(i * n / k) .. ceil((i + 1) * n / k) - 1``; neighbours
    overlap where k does not divide n. The result is `count` masks that broadcast along the other axes.

    >>> windows(2, 5, 0, 1).int()
    tensor([[1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1]], dtype=torch.int32)
    """
    pixel = torch.arange(extent, device=device)
    window = torch.arange(count, device=device).unsqueeze(1)
    inside = (pixel >= window * extent // count) & (pixel < -(-(window + 1) * extent // count))
    return inside.view([count, *(-1 if a == axis else 1 for a in range(axes))])


def _outside(inside: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """For each window along a dim (counted from the last), which pixels it does not hold."""
    return [~window.view(-1, *[1] * (-dim - 1)) for window in inside.flatten(1)]


@operator("window_sums(Tensor self, Tensor[] windows) -> Tensor")
def window_sums(tensor: torch.Tensor, inside: list[torch.Tensor]) -> torch.Tensor:
    """Sums over the products of the windows of the last axes, in at least 32 bits.

    A product of matrices would be fewer operations, but spreads infinities and NaN to all windows.
    """
    partial = wide(tensor)
    for dim, of_axis in zip(range(-1, -len(inside) - 1, -1), reversed(inside), strict=True):
        sums = [partial.masked_fill(hidden, 0).sum(dim, keepdim=True) for hidden in _outside(of_axis, dim)]
        partial = torch.cat(sums, dim)
    return partial


NOWHERE = 2**53
"""A position behind all others."""


@operator("window_maxima(Tensor self, Tensor[] windows, Tensor[] positions) -> Tensor")
def window_maxima(tensor: torch.Tensor, inside: list[torch.Tensor], places: list[torch.Tensor]) -> torch.Tensor:
    """Maxima over the products of the windows of the last axes, and their positions, stacked in front.

    Of equal maxima it is the first in row-major order, and that one has the gradient. In 64 bits, which hold every
    position exactly.
    """
    values, place = tensor, torch.zeros((), dtype=torch.int64, device=tensor.device)
    dims = range(-1, -len(inside) - 1, -1)
    for dim, of_axis, indices in zip(dims, reversed(inside), reversed(places), strict=True):
        maxima, firsts = [], []
        for hidden in _outside(of_axis, dim):
            shown = values if len(of_axis) == 1 else values.masked_fill(hidden, -math.inf)
            maximum, at = shown.max(dim, keepdim=True)
            first = (indices.view(hidden.shape) + place).expand_as(shown).gather(dim, at)
            maxima.append(maximum)
            firsts.append(torch.where(hidden.all(), NOWHERE, first))
        values, place = torch.cat(maxima, dim), torch.cat(firsts, dim)
    return torch.stack([values.double(), place.double()])


ODD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""The multipliers of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
LAST = 0x85EBCA6B - 2**32
"""A multiplier of MurmurHash3's finaliser."""


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Random bits from distinct 64-bit integers, in place: SplitMix64, but that its shifts keep the sign."""
    for shift, factor in zip((30, 27), ODD[1:], strict=True):
        numbers.bitwise_xor_(numbers >> shift).mul_(factor)
    return numbers.bitwise_xor_(numbers >> 31)


@operator("entry_keys(Tensor key, int[] shape) -> Tensor")
def entry_keys(key: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """An odd and another random 32-bit number for each entry of an array of this shape, stacked in front.

    `key` is one 64-bit integer.
    """
    entries = torch.arange(1, math.prod(shape) + 1, device=key.device)
    bits = _mixed(entries * ODD[0] + _mixed(key.clone())).view(shape)
    return torch.stack([(bits >> 32) | 1, bits]).to(torch.int32)


@operator(
    "dropout(Tensor self, Tensor factor, Tensor summand, Tensor[] positions, float p, float scale, float shift,"
    " float dropped) -> Tensor"
)
def dropout(
    tensor: torch.Tensor,
    factor: torch.Tensor,
    summand: torch.Tensor,
    places: list[torch.Tensor],
    p: float,
    scale: float,
    shift: float,
    dropped: float,
) -> torch.Tensor:
    """``scale * tensor + shift``, but `dropped` with probability `p`, as the other tensors say, and not chance.

    `factor` and `summand` are the `entry_keys` of what lies at one position, `places` the `positions` along each
    axis; all broadcast against the tensor. Only the mask is kept for backward.
    """
    scaled = tensor * scale
    if shift:
        scaled = scaled + shift
    return scaled.masked_fill_(_is_dropped(factor, summand, places, p), dropped)


def _is_dropped(factor: torch.Tensor, summand: torch.Tensor, places: list[torch.Tensor], p: float) -> torch.Tensor:
    """A random mask, true with probability `p`.

    The bits of a position are one random number, that of an entry at it another function of them: a product and a
    sum, and a round of mixing, whose top bits depend on all bits before.
    """
    place = sum(places[1:], places[0]).long()
    bits = torch.addcmul(summand, (_mixed(place * ODD[0]) >> 32).to(torch.int32), factor)
    bits.bitwise_xor_(bits >> 15).mul_(LAST)
    return bits < min(round(p * 2**32), 2**32 - 1) - 2**31


def average_windows(tensor: torch.Tensor, windows: Sequence[tuple[int, int, Sequence[int]]]) -> torch.Tensor:
    """The sums of windows over the last dims, each divided by the product of its counts of pixels.

    `windows` has, per dim, the kernel, the stride and the count of each window.

    >>> average_windows(torch.tensor([[[1.0, 3.0, 5.0, 0.0]]]), ((2, 2, (2, 1)),))
    tensor([[[2., 5.]]])
    """
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    kernel, stride = [k for k, _, _ in windows], [s for _, s, _ in windows]
    if len(windows) == 1:
        sums = torch.ops.aten.avg_pool2d(
            wide.unsqueeze(-2), [1, *kernel], [1, *stride], divisor_override=1
        ).squeeze(-2)
    else:
        pool = torch.ops.aten.avg_pool2d if len(windows) == 2 else torch.ops.aten.avg_pool3d
        sums = pool(wide, kernel, stride, divisor_override=1)
    divisor = sums.new_ones(())
    for _, _, counts in windows:
        divisor = divisor.unsqueeze(-1) * sums.new_tensor(counts)
    averages: torch.Tensor = sums / divisor
    return averages.to(tensor.dtype)


def placed(
    tensor: torch.Tensor, absent: Sequence[float], places: Sequence[tuple[int, int, torch.Tensor]]
) -> torch.Tensor:
    """A tensor in a larger one, given per dim (counted from the last) the extent there and the places of indices.

    Everywhere else is the value `absent`; of several, each is that of one tensor that is stacked in front.

    >>> placed(torch.tensor([5, 6]), [0], [(-1, 4, torch.tensor([1, 2]))])
    tensor([0, 5, 6, 0])
    """
    if len(absent) > 1:
        pairs = zip(tensor.unbind(0), absent, strict=True)
        return torch.stack([placed(one, [value], places) for one, value in pairs])
    for dim, extent, indices in places:
        shape = list(tensor.shape)
        shape[dim] = extent
        tensor = tensor.new_full(shape, absent[0]).index_copy(dim, indices, tensor)
    return tensor
