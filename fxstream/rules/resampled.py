"""Operators that yield several output pixels per input pixel: upsampling, depth to space, transposed convolution.

On a box: crop the input, call the operator, crop the result to the box.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import torch

from fxstream.receptive_field import AxisExtent, AxisMap
from fxstream.rules.rule import (
    Answer,
    Call,
    Evaluation,
    Footprint,
    Kind,
    Production,
    Read,
    Refusal,
    RuleTable,
    TileSize,
    Value,
)
from fxstream.rules.windowed import per_axis, window_dims

__all__ = ["add_rules"]

EXACT_EXTENT = 2**22
"""Up to this many output pixels nearest upsampling is exact in torch's float32 source index."""


def add_rules(table: RuleTable) -> None:
    """Nearest upsampling, pixel shuffle, transposed convolution."""
    for n in (1, 2, 3):
        table.add(f"aten::upsample_nearest{n}d", "resampled", partial(upsample_nearest, n))
        table.add(f"aten::_upsample_nearest_exact{n}d", "resampled", partial(upsample_nearest, n))
        table.add(f"aten::conv_transpose{n}d", "resampled", partial(transposed_convolution, n))
    table.add("aten::pixel_shuffle", "resampled", pixel_shuffle)


def upsample_nearest(n: int, call: Call) -> Answer:
    """Nearest upsampling by a whole number per axis, given as a size or as scale factors."""
    argument = "input" if "input" in call.arguments else "self"
    image: Value = call[argument]
    dims = window_dims(call, image, n)
    if isinstance(dims, Refusal):
        return dims
    exact = all(not call.shape[d] % image.shape[d] and _indexes_exactly(call, d, image) for d in dims)
    if not exact or not _scales_are_the_ratio(call, image, n):
        sizes = [(image.shape[d], call.shape[d]) for d in dims]
        return Refusal(Kind.NO_RULE, f"nearest resampling {sizes} is not by a whole number", dims)
    scales = [call.shape[d] // image.shape[d] for d in dims]
    overrides = {"output_size": TileSize.STREAM} | {
        name: None for name in call.arguments if name.startswith("scale")
    }
    return Footprint(
        Evaluation.RESAMPLED,
        dims,
        (Read(argument, image, dims, tuple(AxisMap(1, s, 0, 0) for s in scales)),),
        call.target,
        overrides,
        production=tuple(Production(s, 0, s) for s in scales),
        extents=tuple(AxisExtent(s, 1, 0) for s in scales),
    )


def _scales_are_the_ratio(call: Call, image: Value, n: int) -> bool:
    """Whether scale factors, where given, are the ratio of the sizes; torch indexes by the factors."""
    given = [value for name, value in call.arguments.items() if name.startswith("scale") and value is not None]
    factors = [f for value in given for f in (value if isinstance(value, (list, tuple)) else [value])]
    ratios = [call.shape[d] / image.shape[d] for d in range(len(call.shape) - n, len(call.shape))]
    return not factors or factors == ratios


def _indexes_exactly(call: Call, dim: int, image: Value) -> bool:
    """Whether torch's source index ``floor(o * float32(1 / s))`` is the exact ``o // s`` everywhere."""
    scale = call.shape[dim] // image.shape[dim]
    rounded = Fraction(torch.tensor(1.0 / scale, dtype=torch.float32).item())
    return rounded >= Fraction(1, scale) and call.shape[dim] < EXACT_EXTENT


def pixel_shuffle(call: Call) -> Answer:
    """Depth to space."""
    image: Value = call["self"]
    dims = window_dims(call, image, 2)
    if isinstance(dims, Refusal):
        return dims
    factor = call["upscale_factor"]
    return Footprint(
        Evaluation.RESAMPLED,
        dims,
        (Read("self", image, dims, (AxisMap(1, factor, 0, 0),) * 2),),
        call.target,
        production=(Production(factor, 0, factor),) * 2,
        extents=(AxisExtent(factor, 1, 0),) * 2,
    )


def transposed_convolution(n: int, call: Call) -> Answer:
    """Transposed convolution, with output_padding, dilation and gaps (a stride larger than the kernel).

    Input pixel ``i`` contributes to output pixels ``i * stride - padding + tap * dilation``. With gaps one
    more input pixel is read than contributes, so that the call yields the bias-only pixels too.
    """
    image: Value = call["input"]
    dims = window_dims(call, image, n)
    if isinstance(dims, Refusal):
        return dims
    first = len(image.shape) - n
    stride, padding = per_axis(call["stride"], n), per_axis(call["padding"], n)
    dilation, kernel = per_axis(call["dilation"], n), call["weight"].shape[2:]
    gaps = [max(0, s - 1 - d * (k - 1)) for s, d, k in zip(stride, dilation, kernel, strict=True)]
    maps, production, extents = [], [], []
    for dim in dims:
        j = dim - first
        span = dilation[j] * (kernel[j] - 1)
        maps.append(AxisMap(1, stride[j], padding[j] - span + (0 if gaps[j] else stride[j] - 1), padding[j]))
        production.append(Production(stride[j], -padding[j], span + 1 + gaps[j]))
        extents.append(AxisExtent(stride[j], 1, call.shape[dim] - stride[j] * image.shape[dim]))
    return Footprint(
        Evaluation.RESAMPLED,
        dims,
        (Read("input", image, dims, tuple(maps)),),
        call.target,
        {"padding": [0] * n, "output_padding": gaps},
        fill=0.0,
        production=tuple(production),
        extents=tuple(extents),
        tight=not any(gaps) and all(1 in pair for pair in zip(stride, dilation, strict=True)),
        macs=math.prod(image.shape) * math.prod(call["weight"].shape[1:]),
    )
