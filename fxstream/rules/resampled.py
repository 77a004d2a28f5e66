"""Operators that yield several output pixels per input pixel.

Depth to space, transposed convolution, and interpolation (nearest, linear, cubic; by any factor, up and down, also
antialiased; area is a pooling). On a box: crop the input, call the operator, crop the result to the box.

NOTE [how a box is interpolated]
1. Enlarged by a whole number along every axis: the operator itself on the crop, cut to the box. Relative to any
   input pixel the sources of its output pixels are the same.
2. Made smaller by a whole number along every axis, in linear mode: the operator itself on the crop, which starts
   with the first of the pixels that become one.
3. Otherwise, with aligned corners for example, the sources follow from the size of the image: each axis is looked
   up in the table that `fxstream.rules.resample_table` measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch

from fxstream.geometry.receptive_field import IDENTITY, AxisExtent, AxisMap
from fxstream.rules.access import Border, OutputSpan, Read, Value
from fxstream.rules.patterns import Resampled, Table, Windowed
from fxstream.rules.reasons import NotTileable, Reason
from fxstream.rules.resample_table import Resample
from fxstream.rules.rule import Answer, Call, RuleTable
from fxstream.rules.windowed import per_axis, window_dims

__all__ = ["add_rules"]

EXACT_EXTENT = 2**22
"""Up to this many output pixels nearest upsampling is exact in torch's float32 source index."""
LARGEST_DENOMINATOR = 1024
"""A factor that was given is a fraction with at most this denominator, or else only known at this size."""


@dataclass(frozen=True, slots=True)
class Mode:
    """The first and last pixel read from the floor of a source, which may be counted from centres of pixels.

    An antialiased one blends pixels up to `radius` pixels of the smaller image away.
    """

    taps: tuple[int, int]
    centred: bool
    radius: int = 0

    @property
    def is_weighted(self) -> bool:
        """Whether several pixels are blended."""
        return self.taps != (0, 0)

    @property
    def border(self) -> Border:
        """In linear mode a source before the first pixel is moved onto it, and the next is read with weight 0."""
        return Border.CLAMPED if self.taps == (0, 1) and not self.radius else Border.CLIPPED

    def taps_of(self, ratio: Fraction) -> tuple[int, int]:
        """The taps where so many pixels become one."""
        reach = math.ceil(self.radius * max(ratio, Fraction(1)))
        return (-reach, reach) if self.radius else self.taps


NEAREST, NEAREST_EXACT = Mode((0, 0), False), Mode((0, 0), True)
LINEAR, CUBIC = Mode((0, 1), True), Mode((-1, 2), True)
SMOOTH_LINEAR, SMOOTH_CUBIC = Mode((0, 1), True, 1), Mode((-1, 2), True, 2)


def add_rules(table: RuleTable) -> None:
    """Pixel shuffle, transposed convolution, and one rule of all interpolations, given their mode and axes."""
    for n in (1, 2, 3):
        table.add(f"aten::conv_transpose{n}d", "resampled", partial(transposed_convolution, n))
    table.add("aten::pixel_shuffle", "resampled", pixel_shuffle)
    table.add("aten::repeat_interleave", "resampled", repeat_interleave)
    for n, name in enumerate(("linear1d", "bilinear2d", "trilinear3d"), 1):
        table.add(f"aten::upsample_{name}", "resampled", partial(interpolation, n, LINEAR))
        table.add(f"aten::upsample_nearest{n}d", "resampled", partial(interpolation, n, NEAREST))
        table.add(f"aten::_upsample_nearest_exact{n}d", "resampled", partial(interpolation, n, NEAREST_EXACT))
    table.add("aten::upsample_bicubic2d", "resampled", partial(interpolation, 2, CUBIC))
    table.add("aten::_upsample_bilinear2d_aa", "resampled", partial(interpolation, 2, SMOOTH_LINEAR))
    table.add("aten::_upsample_bicubic2d_aa", "resampled", partial(interpolation, 2, SMOOTH_CUBIC))


def pixel_shuffle(call: Call) -> Answer:
    """Depth to space."""
    image: Value = call["self"]
    dims = window_dims(call, image, 2)
    if isinstance(dims, NotTileable):
        return dims
    factor = call["upscale_factor"]
    return Resampled(
        dims,
        (Read("self", image, dims, (AxisMap(1, factor, 0, 0),) * 2),),
        (OutputSpan(factor, 0, factor),) * 2,
        (AxisExtent(factor, 1, 0),) * 2,
    )


def repeat_interleave(call: Call) -> Answer:
    """Every index of a dim so many times: along a tiled dim nearest upsampling, along another one local."""
    image, repeats, dim = call["self"], call["repeats"], call.arguments.get("dim")
    if not isinstance(repeats, int) or dim is None:
        return NotTileable(Reason.REPEATS_UNEVENLY)
    along = [repeats if d == dim % len(image.shape) else 1 for d in image.dims]
    return Resampled(
        image.dims,
        (Read("self", image, image.dims, tuple(AxisMap(1, s, 0, 0) for s in along)),),
        tuple(OutputSpan(s, 0, s) for s in along),
        tuple(AxisExtent(s, 1, 0) for s in along),
        {"output_size": None},
    )


def transposed_convolution(n: int, call: Call) -> Answer:
    """Transposed convolution, with output_padding, dilation and gaps (a stride larger than the kernel).

    Input pixel ``i`` contributes to output pixels ``i * stride - padding + tap * dilation``. With gaps one
    more input pixel is read than contributes, so that the call yields the bias-only pixels too.
    """
    image: Value = call["input"]
    dims = window_dims(call, image, n)
    if isinstance(dims, NotTileable):
        return dims
    stride, padding = per_axis(call["stride"], n), per_axis(call["padding"], n)
    dilation, kernel = per_axis(call["dilation"], n), call["weight"].shape[2:]
    gaps = [max(0, s - 1 - d * (k - 1)) for s, d, k in zip(stride, dilation, kernel, strict=True)]
    maps, spans, extents = [], [], []
    for dim in dims:
        j = dim - (len(image.shape) - n)
        span = dilation[j] * (kernel[j] - 1)
        maps.append(AxisMap(1, stride[j], padding[j] - span + (0 if gaps[j] else stride[j] - 1), padding[j]))
        spans.append(OutputSpan(stride[j], -padding[j], span + 1 + gaps[j]))
        extents.append(AxisExtent(stride[j], 1, call.shape[dim] - stride[j] * image.shape[dim]))
    return Resampled(
        dims,
        (Read("input", image, dims, tuple(maps)),),
        tuple(spans),
        tuple(extents),
        {"padding": [0] * n, "output_padding": gaps},
        fill=0.0,
        is_tight=not any(gaps) and all(1 in pair for pair in zip(stride, dilation, strict=True)),
    )


def interpolation(n: int, mode: Mode, call: Call) -> Answer:
    """Interpolation over the last `n` dims, by sizes or by factors; by whole numbers along those not tiled."""
    argument = "input" if "input" in call.arguments else "self"
    image: Value = call[argument]
    others = [dim for dim in range(len(image.shape) - n, len(image.shape)) if dim not in image.dims]
    some = all(_enlarged(mode, _axis(n, mode, call, image, dim)) for dim in others)
    dims = window_dims(call, image, n, some)
    if isinstance(dims, NotTileable):
        return dims
    if mode.is_weighted and not image.dtype.is_floating_point:
        return NotTileable(Reason.INTERPOLATES_INTEGERS, dims, (image.dtype,))
    axes = [_axis(n, mode, call, image, dim) for dim in dims]
    if mode is CUBIC and all(axis.extent == axis.extent_out for axis in axes):
        if not all(axis.align_corners or axis.scale in (None, 1.0) for axis in axes):
            return NotTileable(Reason.COPY_IN_BACKWARD, dims)
        return _by_itself(call, argument, dims, mode, [1] * n)
    enlarged = [_enlarged(mode, axis) for axis in axes]
    if all(enlarged):
        return _by_itself(call, argument, dims, mode, enlarged)
    if image.dims and others:
        return NotTileable(Reason.SLIDES_ALONG_OTHER_DIMS, (), ((*sorted([*others, *dims]),), dims))
    reduced = [_reduced(mode, axis) for axis in axes]
    if all(reduced):
        return _averaged(call, argument, dims, reduced)
    if not mode.is_weighted and not (image.dtype.is_floating_point and all(map(_is_certain, axes))):
        return NotTileable(Reason.UNCERTAIN_PIXELS, dims)
    claims = [axis.claim() for axis in axes]
    return Table(
        dims,
        (Read(argument, image, dims, tuple(m for m, _ in claims), border=mode.border),),
        tuple(axes),
        tuple(map(_extent, axes)),
        all(is_tight for _, is_tight in claims),
    )


def _axis(n: int, mode: Mode, call: Call, image: Value, dim: int) -> Resample:
    """The resampling along one dim."""
    place = dim - (len(image.shape) - n)
    aligned = call.arguments.get("align_corners")
    packet = getattr(torch.ops.aten, call.target._schema.name.removeprefix("aten::"))
    resample = Resample(
        packet.default,
        place,
        n,
        image.shape[dim],
        call.shape[dim],
        mode.taps,
        mode.centred and not aligned,
        aligned,
        _scales(call, n)[place],
        torch.float64 if image.dtype == torch.float64 else torch.float32,
    )
    return replace(resample, taps=mode.taps_of(resample.ratio))


def _scales(call: Call, n: int) -> list[float | None]:
    """The factor along each axis, where factors are given: as one argument or as several."""
    if "scale_factors" in call.arguments:
        return list(call["scale_factors"] or [None] * n)
    return [value for name, value in call.arguments.items() if name.startswith("scale")]


def _enlarged(mode: Mode, axis: Resample) -> int:
    """The whole number by which the axis is enlarged; 0 where it is not by one, or where rounding shows."""
    factor, rest = divmod(axis.extent_out, axis.extent)
    if factor == 1 and not rest and mode is LINEAR:
        return 1  # copied, whatever the scale
    is_ratio = axis.scale is None or axis.scale == factor
    if (
        mode.radius
        or rest
        or axis.align_corners
        or not is_ratio
        or not (mode.is_weighted or _indexes_exactly(axis, factor))
    ):
        return 0
    return factor


def _indexes_exactly(axis: Resample, factor: int) -> bool:
    """Whether torch's source index ``floor(o * (1 / s))``, in float32 or in double, is ``o // s`` everywhere."""
    rounded = Fraction(torch.tensor(1.0 / factor, dtype=torch.float32, device="cpu").item())
    in_double = all(int(factor * k * (1.0 / factor)) == k for k in range(axis.extent))
    return rounded >= Fraction(1, factor) and in_double and axis.extent_out < EXACT_EXTENT


def _is_certain(axis: Resample) -> bool:
    """Whether all of torch's kernels read the same pixels."""
    return axis.table(torch.device("cpu")).is_certain


def _reduced(mode: Mode, axis: Resample) -> int:
    """How many pixels become one along the axis, in linear mode; 0 where that is no whole number."""
    factor = Fraction(axis.extent, axis.extent_out) if axis.scale is None else 1 / Fraction(axis.scale)
    is_whole = factor.denominator == 1 and axis.extent // factor.numerator == axis.extent_out
    return factor.numerator if mode is LINEAR and is_whole and not axis.align_corners else 0


def _by_itself(call: Call, argument: str, dims: tuple[int, ...], mode: Mode, factors: list[int]) -> Resampled:
    """Rule 1 of the NOTE; an axis that keeps its size is copied, but cubic mode reads all taps even then."""
    before, after = mode.taps
    maps = []
    for s in factors:
        source = (1 - s) // 2 if mode.is_weighted else 0
        is_copy = s == 1 and mode is not CUBIC
        maps.append(IDENTITY if is_copy else AxisMap(1, s, source + s * before, source + s * after))
    return Resampled(
        dims,
        (Read(argument, call[argument], dims, tuple(maps), border=mode.border),),
        tuple(OutputSpan(s, 0, s) for s in factors),
        tuple(AxisExtent(s, 1, 0) for s in factors),
        _without_factors(call),
        size="output_size",
        is_tight=mode is not CUBIC or 1 not in factors,
    )


def _averaged(call: Call, argument: str, dims: tuple[int, ...], factors: list[int]) -> Windowed:
    """Rule 2 of the NOTE: of more than two pixels only those in the middle have an influence."""
    return Windowed(
        dims,
        (Read(argument, call[argument], dims, tuple(AxisMap(b, 1, 0, b - 1) for b in factors)),),
        tuple(AxisExtent(1, b, 0) for b in factors),
        _without_factors(call),
        size="output_size",
        is_tight=max(factors) <= 2,
    )


def _without_factors(call: Call) -> dict[str, None]:
    """No factors: they follow from the sizes, which follow the tile."""
    return {name: None for name in call.arguments if name.startswith("scale")}


def _extent(axis: Resample) -> AxisExtent:
    """By the factor where it explains the size, else by the ratio: a size is often that of another map."""
    if axis.scale is not None:
        factor = Fraction(axis.scale).limit_denominator(LARGEST_DENOMINATOR)
        by_factor = AxisExtent(factor.numerator, factor.denominator, 0)
        if by_factor.of(axis.extent) == axis.extent_out:
            return by_factor
    ratio = Fraction(axis.extent_out, axis.extent)
    return AxisExtent(ratio.numerator, ratio.denominator, 0)
