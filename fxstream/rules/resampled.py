"""Operators that yield several output pixels per input pixel: depth to space, transposed convolution.

On a box: crop the input, call the operator, crop the result to the box.
"""

from __future__ import annotations

import math
from functools import partial

from fxstream.geometry.receptive_field import AxisExtent, AxisMap
from fxstream.rules.rule import (
    Answer,
    Call,
    Evaluation,
    Footprint,
    Production,
    Read,
    Refusal,
    RuleTable,
    Value,
)
from fxstream.rules.windowed import per_axis, window_dims

__all__ = ["add_rules"]


def add_rules(table: RuleTable) -> None:
    """Pixel shuffle, transposed convolution."""
    for n in (1, 2, 3):
        table.add(f"aten::conv_transpose{n}d", "resampled", partial(transposed_convolution, n))
    table.add("aten::pixel_shuffle", "resampled", pixel_shuffle)


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
