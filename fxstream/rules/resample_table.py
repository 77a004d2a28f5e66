"""Resampling along one axis as a table of source pixels and weights, as torch itself has it.

Interpolation is separable: along each axis an output pixel is a weighted sum of a few input pixels. Which ones,
and with which weights, follows from a source index in floating point, whose rounding differs between types and
devices. So the table is not computed here but measured: torch's own operator is run along one axis on images
that mark every eighth pixel or fewer, with a one (the weights) or with NaN (the pixels read, be it with weight 0).
The table then agrees with the plain operator to the last bit, for every mode, scale and device.

NOTE [what is claimed]
1. Output pixel ``o`` has its source at ``scale * (o + 1/2) - 1/2``, or ``scale * o`` where corners are aligned; in
   nearest mode at ``scale * o``, and at ``scale * (o + 1/2)`` where that is exact. The access map is the floor of
   this, as a fraction, with the taps around it.
2. Rounding may move a source across a pixel. The map is widened until it covers every tap of the table. It is then
   not tight.
3. A source before the first pixel torch moves onto that. What it then reads with weight 0 is no part of the map. A
   tap outside of what a tile holds is moved to its nearest pixel.
4. In nearest mode torch's kernels disagree about a few pixels at some sizes: which is taken depends on the size of
   the result, the order of its dims in memory and the type. Such a table is not certain and must not be used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from fxstream.geometry.box import Interval
from fxstream.geometry.receptive_field import AxisMap
from fxstream.machine.device import is_accelerator

__all__ = ["Resample", "TablePart", "Taps", "resampled_tile"]

CLASSES = 8
"""At least every eighth pixel is marked at once: so many more than a mode reads, so that taps are told apart."""
LARGEST_DENOMINATOR = 1024
"""A scale is claimed as a fraction with at most this denominator: a map repeats after so many pixels."""
ACROSS, WIDE = 2, 129
"""Pixels of the result along another axis: not its own size, for a result of the same size may be copied, and for
nearest modes more, since a result of more than 128 pixels along both takes another kernel."""
LINES = 4
"""From so many channels on another kernel serves images whose channels lie last."""
TABLES = 64
"""So many tables are remembered."""


@dataclass(frozen=True, slots=True)
class Taps:
    """What every output pixel is made of: `indices` and `weights` are ``[taps, pixels]``, pixels of the image.

    It is certain unless torch's kernels disagree about pixels.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    is_certain: bool


@dataclass(frozen=True, slots=True)
class Resample:
    """One axis of a call to an upsampling operator.

    `target` resamples the last `axes` dims, this is the one at `place`. `taps` are the first and last tap from the
    floor of the source, which is `centred` if it is counted from centres of pixels. `align_corners` is None for an
    operator without it, `scale` the factor given, if any, `dtype` the type that torch computes the weights in.
    """

    target: torch._ops.OpOverload
    place: int
    axes: int
    extent: int
    extent_out: int
    taps: tuple[int, int]
    centred: bool
    align_corners: bool | None
    scale: float | None
    dtype: torch.dtype

    @property
    def gathers(self) -> bool:
        """Whether every output pixel is one input pixel."""
        return self.taps == (0, 0)

    @property
    def ratio(self) -> Fraction:
        """Input pixels from one output pixel to the next."""
        if self.align_corners:
            return Fraction(self.extent - 1, max(1, self.extent_out - 1))
        if self.scale is not None and self.scale > 0:
            return Fraction(1.0 / self.scale)
        return Fraction(self.extent, self.extent_out)

    @property
    def antialiased(self) -> bool:
        """Whether it blends more pixels the more it shrinks; the taps are then a bound."""
        return self.target._schema.name.endswith("_aa")

    @property
    def classes(self) -> int:
        """Pixels from one marked pixel to the next."""
        return max(CLASSES, 2 * (self.taps[1] - self.taps[0] + 2))

    def table(self, device: torch.device) -> Taps:
        """The taps of all output pixels, on `device`."""
        if not self.gathers or not is_accelerator(device):
            return _measured(self, device)
        table = _measured(self, torch.device("cpu"))
        return replace(table, indices=table.indices.to(device), weights=table.weights.to(device))

    def claim(self) -> tuple[AxisMap, bool]:
        """The access map, and whether it claims nothing that is not read: rules 1 and 2 of the NOTE."""
        num, den = self.ratio.limit_denominator(LARGEST_DENOMINATOR).as_integer_ratio()
        centre = (num - den * (not self.gathers)) // 2 if self.centred else 0
        indices, start, low, high = self._extremes(num, centre)
        first, last = int((den * low + den - 1 - start).min()), int((den * high - start).max())
        if not self.antialiased:
            first, last = min(centre + den * self.taps[0], first), max(centre + den * self.taps[1], last)
        lows = ((start + first) // den).clamp(0, self.extent - 1)
        highs = ((start + last) // den).clamp(0, self.extent - 1)
        tight = bool((lows >= indices.amin(0)).all() and (highs <= indices.amax(0)).all())
        return AxisMap(num, den, first, last), tight

    def _extremes(self, num: int, centre: int) -> tuple[torch.Tensor, ...]:
        """Of the table the pixels [taps, pixels]; of each of these its start, the first and last pixel read."""
        table = self.table(torch.device("cpu"))
        start = num * torch.arange(self.extent_out, device="cpu")
        counts = (table.weights != 0) | (start + centre >= 0)
        low = table.indices.masked_fill(~counts, self.extent).amin(0)
        return table.indices, start, low, table.indices.masked_fill(~counts, -1).amax(0)

    def apply(
        self, lines: torch.Tensor, across: int, layout: torch.memory_format = torch.contiguous_format
    ) -> torch.Tensor:
        """The operator along this axis: ``[lines, extent]`` to ``[lines, extent_out]``.

        The other axes have one pixel; one of them is drawn out to `across`.
        """
        extents, sizes = [1] * self.axes, [1] * self.axes
        sizes[self.place - 1] = across
        extents[self.place], sizes[self.place] = self.extent, self.extent_out
        scales = [self.scale if axis == self.place else None for axis in range(self.axes)]
        aligned = () if self.align_corners is None else (self.align_corners,)
        image = lines.view(1, len(lines), *extents).contiguous(memory_format=layout)
        result: torch.Tensor = self.target(image, sizes, *aligned, *scales)
        return result.movedim(2 + self.place, 2).reshape(len(lines), self.extent_out, -1)[..., 0]


def _measured_taps(resample: Resample, device: torch.device) -> Taps:
    """The table of a weighted mode, from the operator's answers to marked pixels.

    The lines are a ramp, which tells about where the source is, and per class of pixels a line of ones and zeros
    and one of NaN and zeros. Taps that an output pixel has fewer than others repeat its first one with weight 0.
    """
    count, pixels = resample.classes, torch.arange(resample.extent, device=device)
    classes = torch.arange(count, device=device).unsqueeze(1)
    marked = pixels % count == classes
    ones = marked.to(resample.dtype)
    lines = [pixels.to(resample.dtype)[None], ones, ones.masked_fill(marked, torch.nan)]
    source, weights, poisoned = resample.apply(torch.cat(lines), ACROSS).split([1, count, count])
    source = source.round().long()
    indices = source + (classes - source + count // 2) % count - count // 2
    is_read = poisoned.isnan()
    order = indices.masked_fill(~is_read, resample.extent).argsort(0)[: int(is_read.sum(0).max())]
    indices, weights, is_read = (table.gather(0, order) for table in (indices, weights, is_read))
    return Taps(torch.where(is_read, indices, indices[:1]), weights.masked_fill(~is_read, 0), True)


def _measured_pixels(resample: Resample, device: torch.device) -> Taps:
    """The table of a nearest mode, and whether all of torch's kernels have the same."""
    ramp = torch.arange(resample.extent, device=device).to(resample.dtype).expand(LINES, -1).contiguous()
    ramps = [resample.apply(ramp, across) for across in (ACROSS, WIDE)]
    if resample.axes > 1:
        layout = torch.channels_last if resample.axes == 2 else torch.channels_last_3d
        ramps.append(resample.apply(ramp, WIDE, layout))
    indices = ramps[0][:1].long()
    agree = all(torch.equal(other, ramps[0]) for other in ramps)
    return Taps(indices, torch.ones_like(indices, dtype=resample.dtype), agree)


@functools.lru_cache(TABLES)
def _measured(resample: Resample, device: torch.device) -> Taps:
    """The table, as ordinary tensors whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return (_measured_pixels if resample.gathers else _measured_taps)(resample, device)


@dataclass(frozen=True, slots=True)
class TablePart:
    """The part of a table that one tile needs: the output pixels `out`, from the input pixels `held`."""

    resample: Resample
    out: Interval
    read: Interval

    @property
    def parts(self) -> tuple[str, ...]:
        """What `tensors` are."""
        return ("pixels",) if self.resample.gathers else ("pixels", "weights")

    def tensors(self, device: torch.device) -> list[torch.Tensor]:
        """Indices into what the tile holds, ``[taps, pixels]``, and their weights unless pixels are only moved."""
        table = self.resample.table(device)
        indices = table.indices[:, self.out.start : self.out.stop] - self.read.start
        indices = indices.clamp(0, len(self.read) - 1)
        return [indices] if self.resample.gathers else [indices, table.weights[:, self.out.start : self.out.stop]]


def resampled_tile(
    tensor: torch.Tensor, axes: Sequence[tuple[int, Sequence[torch.Tensor]]], dtype: torch.dtype
) -> torch.Tensor:
    """`tensor` resampled along several dims, each given with its tensors of a `TablePart`, in the type `dtype`.

    >>> indices, weights = torch.tensor([[0, 0, 1], [0, 1, 1]]), torch.tensor([[1.0, 0.5, 1.0], [0.0, 0.5, 0.0]])
    >>> resampled_tile(torch.tensor([[2.0, 4.0]]), [(1, [indices, weights])], torch.float32)
    tensor([[2., 3., 4.]])
    """
    for dim, (indices, *weights) in axes:
        if not weights:
            tensor = tensor.index_select(dim, indices[0])
            continue
        shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
        parts = [tensor.index_select(dim, i) * w.view(shape) for i, w in zip(indices, weights[0], strict=True)]
        tensor = functools.reduce(torch.add, parts)
    return tensor.to(dtype)
