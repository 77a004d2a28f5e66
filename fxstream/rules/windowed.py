"""Operators that read a window of input pixels per output pixel.

On a box: crop the input to what the windows read, pad what lies outside the image with a fill value, call
the operator with padding 0. Convolution fills with 0, max pooling with minus infinity, average pooling with 0
and divides by the counts of the real windows. Padding is the pad alone, cropping the crop alone. Where padding
takes pixels from near the border, a tile that touches the border holds them too and pads as the operator does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from fxstream.geometry.receptive_field import IDENTITY, AxisExtent, AxisMap
from fxstream.rules.access import Average, Border, OutputSpan, Read, Value
from fxstream.rules.patterns import Averaged, Bordered, Cropped, Pointwise, Windowed
from fxstream.rules.reasons import NotTileable, Reason
from fxstream.rules.rule import Answer, Call, RuleTable

__all__ = ["CONVOLUTIONS", "add_rules", "per_axis", "window_dims"]

aten = torch.ops.aten
CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def add_rules(table: RuleTable) -> None:
    """Convolution, pooling, constant padding, cropping, space to depth."""
    for n in CONVOLUTIONS:
        table.add(f"aten::conv{n}d", "windowed", partial(convolution, n))
        table.add(f"aten::max_pool{n}d", "windowed", partial(max_pool, n))
        table.add(f"aten::avg_pool{n}d", "windowed", partial(average_pool, n))
        table.add(f"aten::reflection_pad{n}d", "windowed", partial(border_pad, Border.MIRRORED.value))
        table.add(f"aten::replication_pad{n}d", "windowed", partial(border_pad, Border.REPEATED.value))
    table.add("aten::pad", "windowed", pad)
    table.add("aten::constant_pad_nd", "windowed", constant_pad)
    table.add("aten::slice", "windowed", crop)
    table.add("aten::narrow", "windowed", narrow)
    table.add("aten::unfold", "windowed", unfold)
    table.add("aten::pixel_unshuffle", "windowed", pixel_unshuffle)


def per_axis(value: Sequence[int] | int, n: int) -> tuple[int, ...]:
    """One number per window axis, from torch's shorthand of one for all."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def window_dims(call: Call, image: Value, n: int, some: bool = False) -> tuple[int, ...] | NotTileable:
    """The tiled dims that a window over the last `n` dims slides along: all of these, or `some` of them.

    An image-dependent value that has lost its tiled dims (tokens turned back into a map) gets them again
    here: the dims a window slides along are space by definition.
    """
    rank = len(image.shape)
    sliding = tuple(range(rank - n, rank))
    if any(value.dims for _, _, value in call.tensors() if value.name != image.name):
        return NotTileable(Reason.WEIGHTS_POSITIONAL)
    if not image.dims and rank == n + 2 and min(image.shape[-n:]) > 1:
        return sliding
    fits = set(image.dims) <= set(sliding) if some else set(image.dims) == set(sliding)
    if not image.dims or not fits:
        return NotTileable(Reason.SLIDES_ALONG_OTHER_DIMS, (), (sliding, image.dims))
    return image.dims


def windowed(
    call: Call,
    argument: str,
    maps: Sequence[AxisMap],
    extents: Sequence[AxisExtent],
    dims: tuple[int, ...],
    **pattern: Any,
) -> Windowed:
    """The pattern of a window over the last dims; `maps` and `extents` are in the order of those dims."""
    image: Value = call[argument]
    first = len(image.shape) - len(maps)
    ordered = tuple(maps[d - first] for d in dims)
    reads = (Read(argument, image, dims, ordered),)
    kind = Averaged if pattern.get("averages") else Windowed
    return kind(dims, reads, tuple(extents[d - first] for d in dims), **pattern)


def convolution(n: int, call: Call) -> Answer:
    """Convolution with any stride, dilation, groups, kernel and padding, "same" and "valid" included."""
    image: Value = call["input"]
    dims = window_dims(call, image, n, some=True)
    if isinstance(dims, NotTileable):
        return dims
    kernel = call["weight"].shape[2:]
    stride, dilation = per_axis(call["stride"], n), per_axis(call["dilation"], n)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if call["padding"] == "same":
        padding = tuple(span // 2 for span in spans)
    elif call["padding"] == "valid":
        padding = (0,) * n
    else:
        padding = per_axis(call["padding"], n)
    windows = list(zip(kernel, stride, padding, dilation, strict=True))
    same = call["padding"] == "same"
    if same and any(span % 2 for span in other_axes(image, dims, spans)):
        return NotTileable(Reason.PADS_UNEVENLY, dims)
    extents = [AxisExtent.changed(0) if same else AxisExtent.window(*window) for window in windows]
    return windowed(
        call,
        "input",
        [AxisMap.window(*window) for window in windows],
        extents,
        dims,
        target=CONVOLUTIONS[n],
        replaced={"padding": other_axes(image, dims, padding)},
        fill=0.0,
    )


def other_axes(image: Value, dims: tuple[int, ...], numbers: Sequence[int]) -> list[int]:
    """The numbers given for the last dims, 0 for those that are tiled dims: what stays with the operator."""
    first = len(image.shape) - len(numbers)
    return [0 if first + i in dims else number for i, number in enumerate(numbers)]


def pool_windows(n: int, call: Call) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, stride and padding of a pooling along each of its dims; the stride defaults to the kernel."""
    kernel = per_axis(call["kernel_size"], n)
    return kernel, per_axis(call["stride"], n) or kernel, per_axis(call["padding"], n)


def max_pool(n: int, call: Call) -> Answer:
    """Max pooling; windows that reach beyond the padding under ceil_mode see the fill value there."""
    image: Value = call["self"]
    dims = window_dims(call, image, n, some=not call["ceil_mode"])
    if isinstance(dims, NotTileable):
        return dims
    if not image.dtype.is_floating_point:
        return NotTileable(Reason.POOLS_INTEGERS, dims, (image.dtype,))
    dilation = per_axis(call["dilation"], n)
    kernel, stride, padding = pool_windows(n, call)
    windows = list(zip(kernel, stride, padding, dilation, strict=True))
    maps = [AxisMap.window(*window) for window in windows]
    extents = [AxisExtent.window(*window, call["ceil_mode"]) for window in windows]
    replaced = {"padding": other_axes(image, dims, padding), "ceil_mode": False}
    return windowed(call, "self", maps, extents, dims, replaced=replaced, fill=-math.inf)


def average_pool(n: int, call: Call) -> Answer:
    """Average pooling; the divisors at the border are counted per window.

    Some of the dims need not be tiled dims, as in local response normalisation, if no window along the others
    reaches beyond the border.
    """
    image: Value = call["self"]
    whole = not call["ceil_mode"] and not any(per_axis(call["padding"], n))
    dims = window_dims(call, image, n, some=whole)
    if isinstance(dims, NotTileable):
        return dims
    if not image.dtype.is_floating_point:
        return NotTileable(Reason.AVERAGES_INTEGERS, dims, (image.dtype,))
    kernel, stride, padding = pool_windows(n, call)
    windows = list(zip(kernel, stride, padding, strict=True))
    first = len(image.shape) - n
    averages = tuple(
        Average(
            kernel[d - first], stride[d - first], padding[d - first], image.shape[d], call["count_include_pad"]
        )
        for d in dims
    )
    return windowed(
        call,
        "self",
        [AxisMap.window(*window) for window in windows],
        [AxisExtent.window(*window, 1, call["ceil_mode"]) for window in windows],
        dims,
        replaced={"padding": [0] * n, "ceil_mode": False},
        fill=0.0,
        **{} if call.arguments.get("divisor_override") else {"averages": averages},
    )


def pad(call: Call) -> Answer:
    """Padding with a constant or with pixels near the border; cropping where a pad is negative."""
    mode = call.arguments.get("mode", "constant")
    return constant_pad(call) if mode == "constant" else border_pad(mode, call)


def constant_pad(call: Call) -> Answer:
    """Padding with one value; pads of other dims stay with the operator."""
    image: Value = call["self"]
    pads = list(call["pad"])
    along, remaining = _pads_along(image, pads)
    reads = (Read("self", image, image.dims, tuple(AxisMap.shifted(-before) for before, _ in along)),)
    extents = tuple(AxisExtent.changed(before + after) for before, after in along)
    fill = float(call["value"] or 0.0)
    if not any(remaining):
        return Cropped(image.dims, reads, extents, fill)
    return Windowed(image.dims, reads, extents, {"pad": remaining}, fill)


def border_pad(mode: str, call: Call) -> Answer:
    """Padding with pixels of the image, repeated or mirrored; pads of other dims stay with the operator."""
    image: Value = call["self"]
    name = "pad" if "pad" in call.arguments else "padding"
    along, remaining = _pads_along(image, list(call[name]))
    if mode == "circular":
        return _circular_pad(image, along, remaining)
    maps = tuple(AxisMap.shifted(-before) for before, _ in along)
    return Bordered(
        image.dims,
        (Read("self", image, image.dims, maps, border=Border(mode)),),
        tuple(OutputSpan(1, before, 1) for before, _ in along),
        tuple(AxisExtent.changed(before + after) for before, after in along),
        {name: remaining} if any(remaining) else {},
    )


def _circular_pad(image: Value, along: list[tuple[int, int]], remaining: list[int]) -> Answer:
    """Padding with pixels of the opposite border, along dims that are not tiled."""
    touched = [dim for dim, pads in zip(image.dims, along, strict=True) if any(pads)]
    if touched:
        return NotTileable(Reason.PADS_OPPOSITE, image.dims, (touched,))
    reads = (Read("self", image, image.dims, (IDENTITY,) * len(image.dims)),)
    return Windowed(image.dims, reads, (AxisExtent.changed(0),) * len(image.dims), {"pad": remaining})


def _pads_along(image: Value, pads: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """The pads before and after along each tiled dim, and `pads` (last dim first) without these."""
    rank, remaining, along = len(image.shape), list(pads), []
    for dim in image.dims:
        place = 2 * (rank - 1 - dim)
        before, after = pads[place : place + 2] if place < len(pads) else (0, 0)
        along.append((before, after))
        remaining[place : place + 2] = [0, 0][: len(remaining[place : place + 2])]
    return along, remaining


def crop(call: Call) -> Answer:
    """A slice of any dim; along a tiled dim a crop, strided or not."""
    image: Value = call["self"]
    dim = call["dim"] % len(image.shape)
    maps = [IDENTITY] * len(image.dims)
    if dim not in image.dims:
        return Pointwise(image.dims, (Read("self", image, image.dims, tuple(maps)),))
    axis, step = image.dims.index(dim), call["step"]
    start, stop, _ = slice(call["start"], call["end"]).indices(image.shape[dim])
    maps[axis] = AxisMap(step, 1, start, start)
    extents = [AxisExtent.changed(0)] * len(image.dims)
    extents[axis] = _cropped(call["start"] or 0, call["end"], start, stop, image.shape[dim], step)
    reads = (Read("self", image, image.dims, tuple(maps)),)
    if step == 1:
        return Cropped(image.dims, reads, tuple(extents))
    return Windowed(image.dims, reads, tuple(extents), {"start": None, "end": None})


def _cropped(bound: int, end: int | None, start: int, stop: int, extent: int, step: int) -> AxisExtent:
    """The extent of a crop; an end that is counted from the image's end, like a start, moves with it."""
    moves = end is None or end < 0 or end >= extent
    if moves and bound >= 0:
        return AxisExtent(1, step, step - 1 - start + stop - extent)
    return AxisExtent.fixed(len(range(start, stop, step)))


def narrow(call: Call) -> Answer:
    """A slice given by its start and length."""
    image: Value = call["self"]
    dim = call["dim"] % len(image.shape)
    maps, extents = [IDENTITY] * len(image.dims), [AxisExtent.changed(0)] * len(image.dims)
    if dim not in image.dims:
        return Pointwise(image.dims, (Read("self", image, image.dims, tuple(maps)),))
    axis = image.dims.index(dim)
    maps[axis] = AxisMap.shifted(call["start"] % image.shape[dim])
    extents[axis] = AxisExtent.fixed(call["length"])
    return Cropped(image.dims, (Read("self", image, image.dims, tuple(maps)),), tuple(extents))


def unfold(call: Call) -> Answer:
    """Windows along one dim, each as a new last dim."""
    image: Value = call["self"]
    dim, size, step = call["dimension"] % len(image.shape), call["size"], call["step"]
    window = size, step, 0
    maps = tuple(AxisMap.window(*window) if d == dim else IDENTITY for d in image.dims)
    extents = tuple(AxisExtent.window(*window) if d == dim else AxisExtent.changed(0) for d in image.dims)
    read = Read("self", image, image.dims, maps)
    return Windowed(image.dims, (read,), extents)


def pixel_unshuffle(call: Call) -> Answer:
    """Space to depth: each output pixel reads a square of `downscale_factor` pixels a side."""
    dims = window_dims(call, call["self"], 2)
    if isinstance(dims, NotTileable):
        return dims
    factor = call["downscale_factor"]
    maps, extents = [AxisMap(factor, 1, 0, factor - 1)] * 2, [AxisExtent(1, factor, 0)] * 2
    return windowed(call, "self", maps, extents, dims)
