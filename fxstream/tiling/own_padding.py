"""Which window operators pad by themselves on a tile, and which read a padded copy of their input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxstream.graph.shapes import Shape
from fxstream.graph.typed_graph import Locality
from fxstream.rules import Evaluation
from fxstream.tiling.bounds import AxisStep, AxisTile, Cut, ReadStep

__all__ = ["OwnPadding", "own_padding", "padded_copies"]

MOST_EXTRA = 1 / 8
"""An operator may compute this share of a tile's result in vain to save a padded copy of its input.

Only where its result is no larger than the input: the backward of the cut is a copy of the gradient of the result.
"""


@dataclass(frozen=True, slots=True)
class OwnPadding:
    """The operator's own padding along one axis, and the cut of what it then yields."""

    width: int
    result: Cut


def own_padding(locality: Locality, name: str, axis: int, step: AxisStep) -> OwnPadding | None:
    """The padding that an operator does by itself along an axis, instead of reading a padded copy.

    It pads both sides, so that on a side where the image goes on it yields pixels too many, which are cut away: a
    share of the result up to `MOST_EXTRA`.
    """
    footprint, meta = locality.footprint(name), locality.metas[name]
    is_window = footprint.evaluation is Evaluation.WINDOWED and footprint.average is None
    if not is_window or "padding" not in footprint.overrides:
        return None
    (read,), (served,) = footprint.reads, step.reads
    grows = isinstance(meta, Shape) and meta.elements > math.prod(read.value.shape)
    width, stride = -read.maps[axis].first, read.maps[axis].num
    before, after = width - served.before, width - served.after
    if not _pads(served) or before < 0 or after < 0 or before % stride or not served.cut.length:
        return None
    window = read.maps[axis].last - read.maps[axis].first + 1
    held = (served.cut.length + 2 * width - window) // stride + 1
    in_vain = held - step.result.length
    result = Cut(before // stride + step.result.start, step.result.length, held)
    return OwnPadding(width, result) if in_vain <= (0.0 if grows else MOST_EXTRA) * held else None


def padded_copies(
    locality: Locality, nodes: Sequence[str], axes: Sequence[Sequence[AxisTile]]
) -> dict[str, float]:
    """Bytes of the largest padded copy of its input that each operator reads on any tile; none are left out."""
    found: dict[str, float] = {}
    for place, name in enumerate(nodes) if axes else ():
        steps = [[step for tile in tiles if (step := tile.steps[place]) is not None] for tiles in axes]
        if len(locality.footprint(name).reads) != 1 or not all(steps):
            continue
        (read,) = locality.footprint(name).reads
        lengths = [[step.reads[0].cut.length + _pads(step.reads[0]) for step in along] for along in steps]
        largest = 0
        for axis, along in enumerate(steps):
            copied = [
                length
                for step, length in zip(along, lengths[axis], strict=True)
                if _pads(step.reads[0]) and own_padding(locality, name, axis, step) is None
            ]
            others = math.prod(max(other) for k, other in enumerate(lengths) if k != axis)
            largest = max(largest, max(copied, default=0) * others)
        if largest:
            pixels = math.prod(read.value.extents)
            found[name] = largest * math.prod(read.value.shape) / pixels * read.value.dtype.itemsize
    return found


def _pads(read: ReadStep) -> int:
    return read.before + read.after
