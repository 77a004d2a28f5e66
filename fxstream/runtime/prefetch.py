"""What tiles read of the segment's inputs, in a thread ahead of the computation, each pixel once per pass.

Tensors on the device are cut as views. For a `Source` and for tensors in host memory a thread reads the next
tile's boxes while this tile computes. Adjacent tiles overlap: what a tile shares with the next one along an axis
is held until that has taken it, so that a pass reads the pixels of a source once, as long as what is held stays
below `MOST_HELD` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from fxstream.geometry.box import Box, Interval
from fxstream.io.source import Source
from fxstream.machine.copies import staged
from fxstream.runtime.schedule import Subscript, TileTask

__all__ = ["MOST_HELD", "Image", "Reader", "shared_boxes"]

Image = torch.Tensor | Source

MOST_HELD = 2**28
"""Bytes of overlaps that are held to be read once."""


class Reader:
    """Reads the images' boxes for the tasks of one pass, which come in this order; a context."""

    def __init__(self, images: Sequence[Image], tasks: Sequence[TileTask], device: torch.device) -> None:
        self._images, self._device = images, device
        self._outside = [isinstance(image, Source) or image.device != device for image in images]
        self._threads = ThreadPoolExecutor(1, "fxstream-read") if any(self._outside) else None
        self._ahead: dict[TileTask, Future[list[torch.Tensor]]] = {}
        self._overlaps = [
            _Overlaps(image, [task.reads[k] for task in tasks]) if isinstance(image, Source) else None
            for k, image in enumerate(images)
        ]

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def read(self, task: TileTask, following: TileTask | None = None) -> list[torch.Tensor]:
        """What one tile reads of each image, on the device; starts to read for the one that follows."""
        if self._threads is None:
            return [image[box] for image, box in zip(self._images, task.reads, strict=True)]
        now = self._ahead.pop(task, None) or self._threads.submit(self._stored, task)
        stored = now.result()
        if following is not None and following not in self._ahead:
            self._ahead[following] = self._threads.submit(self._stored, following)
        return [
            image.place(tensor) if isinstance(image, Source) else tensor.to(self._device, non_blocking=True)
            for image, tensor in zip(self._images, stored, strict=True)
        ]

    def _stored(self, task: TileTask) -> list[torch.Tensor]:
        """The boxes as they are stored; tensors of the host ready to be copied to the device."""
        stored = []
        for image, box, overlaps, outside in zip(
            self._images, task.reads, self._overlaps, self._outside, strict=True
        ):
            if overlaps is not None:
                stored.append(overlaps.read(box))
            else:
                stored.append(staged(image[box], self._device) if outside else image[box])
        return stored


@dataclass(frozen=True, slots=True)
class _Piece:
    """A slab of a box that was read before: its box and its pixels."""

    box: Box
    pixels: torch.Tensor


class _Overlaps:
    """Reads boxes of a source, and holds what a box shares with the next one along each axis until that comes."""

    def __init__(self, source: Source, subscripts: Sequence[Subscript]) -> None:
        self._source = source
        self._dims = tuple(range(1, source.ndim))
        self._sharing = shared_boxes([self._box(subscript) for subscript in subscripts])
        self._pieces: dict[Box, list[_Piece]] = {}
        self._bytes = 0

    def _box(self, subscript: Subscript) -> Box:
        """The box along all dims but the batch: labels and weights have no channels."""
        return Box(Box.of(subscript, self._source.shape).intervals[1:])

    def read(self, subscript: Subscript) -> torch.Tensor:
        """A box as it is stored: what is held of it, and the rest from the source."""
        box = self._box(subscript)
        pieces = self._pieces.pop(box, [])
        rest = box
        for piece in pieces:
            rest = without(rest, piece.box)
        values = self._assembled(box, rest, pieces)
        self._bytes -= sum(piece.pixels.nbytes for piece in pieces)
        for shared, following in self._sharing.get(box, ()):
            size = math.prod(shared.shape) * values.shape[0] * values.itemsize
            if self._bytes + size <= MOST_HELD:
                piece = _Piece(shared, values[self._inside(box, shared)].clone())
                self._pieces.setdefault(following, []).append(piece)
                self._bytes += size
        return values

    def _assembled(self, box: Box, rest: Box, pieces: Sequence[_Piece]) -> torch.Tensor:
        if not pieces:
            return self._source.read(box.index(self._dims, self._source.ndim))
        sample = pieces[0].pixels
        whole = sample.new_empty((sample.shape[0], *box.shape))
        for piece in pieces:
            whole[self._inside(box, piece.box)] = piece.pixels
        if all(rest.shape):
            whole[self._inside(box, rest)] = self._source.read(rest.index(self._dims, self._source.ndim))
        return whole

    def _inside(self, box: Box, part: Box) -> Subscript:
        """The subscript of a part in a tensor that holds the box."""
        moved = (Interval(p.start - b.start, p.stop - b.start) for p, b in zip(part, box, strict=True))
        return Box(tuple(moved)).index(self._dims, self._source.ndim)


def shared_boxes(boxes: Iterable[Box]) -> dict[Box, list[tuple[Box, Box]]]:
    """What each box shares with the next one that differs from it along one axis only, and that next box.

    >>> row = [Box((Interval(0, 4), Interval(start, start + 3))) for start in (0, 2)]
    >>> [(str(shared), str(following)) for shared, following in shared_boxes(row)[row[0]]]
    [('[0:4, 2:3]', '[0:4, 2:5]')]
    """
    shares: dict[Box, list[tuple[Box, Box]]] = {}
    last: dict[tuple[int, tuple[Interval, ...]], Box] = {}
    for box in boxes:
        for axis, along in enumerate(box):
            others = (axis, (*box.intervals[:axis], *box.intervals[axis + 1 :]))
            before = last.get(others)
            last[others] = box
            if before is None or before == box or not all(box.shape):
                continue
            other = before.intervals[axis]
            shared = Interval(max(along.start, other.start), min(along.stop, other.stop))
            if len(shared):
                slab = Box((*box.intervals[:axis], shared, *box.intervals[axis + 1 :]))
                shares.setdefault(before, []).append((slab, box))
    return shares


def without(box: Box, slab: Box) -> Box:
    """The box less a slab at one of its ends; the box itself where the slab is none of it.

    >>> print(without(Box((Interval(0, 4), Interval(2, 9))), Box((Interval(0, 9), Interval(0, 5)))))
    [0:4, 5:9]
    """
    for axis, (whole, part) in enumerate(zip(box, slab, strict=True)):
        others = zip(box, slab, strict=True)
        covers = all(p.start <= b.start and p.stop >= b.stop for k, (b, p) in enumerate(others) if k != axis)
        if not covers:
            continue
        if part.start <= whole.start < part.stop:
            return Box((*box.intervals[:axis], Interval(part.stop, whole.stop), *box.intervals[axis + 1 :]))
        if part.start < whole.stop <= part.stop:
            return Box((*box.intervals[:axis], Interval(whole.start, part.start), *box.intervals[axis + 1 :]))
    return box
