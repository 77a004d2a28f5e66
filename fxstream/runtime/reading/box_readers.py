"""The boxes of one image, for the tiles of one pass: views, copies, or made of blocks that are kept.

Rules are those of the NOTE in `prefetch`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from fxstream.geometry.box import Box, Interval
from fxstream.io.blocks import grid_of
from fxstream.io.source import Source
from fxstream.machine.copies import buffer_for, staged
from fxstream.machine.device import is_accelerator
from fxstream.runtime.equal_tiles import constant_values
from fxstream.runtime.schedule import Subscript

__all__ = ["Blocks", "Copies", "Dims", "Stored", "Views"]

Place = tuple[int, ...]
Dims = tuple[int, ...] | None
Groups = list[Future[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Stored:
    """A box of an image as it is stored, and its values where it is constant."""

    box: torch.Tensor
    constant: bytes | None


class Views:
    """Boxes of a tensor on the device."""

    def __init__(self, image: torch.Tensor, dims: Dims) -> None:
        self._image = image
        self._dims = None if is_accelerator(image.device) else dims  # looking at values there takes a wait

    def ask(self, read: Subscript) -> Stored:
        """A box, at once."""
        part = self._image[read]
        return Stored(part, constant_values(part, self._dims))

    start = ask

    def take(self) -> None:
        """Nothing is kept."""

    def has_room(self, read: Subscript) -> bool:
        """There is nothing to read ahead."""
        return True


class Copies:
    """Boxes of a tensor in host memory, copied one tile ahead."""

    def __init__(self, image: torch.Tensor, device: torch.device, pool: ThreadPoolExecutor, dims: Dims) -> None:
        self._image, self._device, self._pool, self._dims = image, device, pool, dims

    def ask(self, read: Subscript) -> Future[Stored]:
        """A box, when the thread comes to it."""
        return self._pool.submit(self._copied, read)

    start = ask

    def _copied(self, read: Subscript) -> Stored:
        part = self._image[read]
        return Stored(staged(part, self._device), constant_values(part, self._dims))

    def take(self) -> None:
        """Nothing is kept."""

    def has_room(self, read: Subscript) -> bool:
        """One tile is copied ahead, and no more."""
        return False


class Blocks:
    """Boxes of a source, made of blocks that are kept as long as a later box of the pass meets them.

    Blocks are read by `readers`, boxes are joined by `joiners`; all else is done by the thread that asks.
    """

    def __init__(
        self,
        source: Source,
        reads: Sequence[Subscript],
        most: int,
        readers: ThreadPoolExecutor,
        joiners: ThreadPoolExecutor,
        device: torch.device,
        dims: Dims,
    ) -> None:
        self._source, self._most, self._device, self._dims = source, most, device, dims
        self._readers, self._joiners = readers, joiners
        inner = [_inner(self._box(read)) for read in reads]
        self._grid = grid_of(source.chunk_edges, source.shape[1:], set(inner), self._pixel, most // 4)
        self._uses: dict[Place, deque[int]] = {}
        for order, box in enumerate(inner):
            for place in self._grid.meeting(box):
                self._uses.setdefault(place, deque()).append(order)
        self._kept: dict[Place, Groups] = {}
        self._pending: list[Future[torch.Tensor]] = []
        self._ahead: deque[int] = deque()
        self.kept_bytes = 0

    @property
    def _pixel(self) -> int:
        """Bytes of a pixel of one channel in all entries."""
        return self._source.stored.itemsize * self._source.shape[0]

    def ask(self, read: Subscript) -> Future[Stored]:
        """A box that the pass has not planned for, from the source alone."""
        return self._readers.submit(self._read, read)

    def start(self, read: Subscript) -> Future[Stored]:
        """The next box of the pass."""
        box = self._box(read)
        places, size = self._grid.meeting(_inner(box)), self._size(box)
        self._make_room(size, set(places))
        self._ahead.append(size)
        blocks = deque((self._grid.box(place), self._block(place)) for place in places)
        return self._joiners.submit(self._joined, box, blocks, self._buffer(box))

    def take(self) -> None:
        """The first box that was started is no longer ahead."""
        self._ahead.popleft()

    def has_room(self, read: Subscript) -> bool:
        """Whether the threads run out of work, and there is memory for one more box."""
        self._pending = [future for future in self._pending if not future.done()]
        idle = len(self._pending) < 2 * self._source.readers
        return idle and self.kept_bytes + sum(self._ahead) + self._size(self._box(read)) <= self._most

    def _box(self, read: Subscript) -> Box:
        return Box.of(read, self._source.shape)

    def _size(self, box: Box) -> int:
        """Bytes of a box, and of the blocks that it needs and that are not kept."""
        fresh = (place for place in self._grid.meeting(_inner(box)) if place not in self._kept)
        return sum(map(self._block_bytes, fresh)) + math.prod(_inner(box).shape) * self._pixel

    def _block_bytes(self, place: Place) -> int:
        return math.prod(self._grid.box(place).shape) * self._pixel

    def _block(self, place: Place) -> Groups:
        """A block of each group of entries; it is kept while a later box of the pass meets it."""
        uses, is_kept = self._uses[place], place in self._kept
        uses.popleft()
        groups = self._kept[place] if is_kept else self._requested(place)
        if uses and not is_kept:
            self._kept[place] = groups
            self.kept_bytes += self._block_bytes(place)
        elif is_kept and not uses:
            self._forget(place)
        return groups

    def _requested(self, place: Place) -> Groups:
        bounds = [range(part.start, part.stop) for part in self._grid.box(place)]
        count = len(self._source.groups)
        groups = [self._readers.submit(self._source.read_group, group, bounds) for group in range(count)]
        self._pending += groups
        return groups

    def _make_room(self, size: int, needed: Collection[Place]) -> None:
        """Rule 3: give up what is needed last."""
        while self._kept and self.kept_bytes + sum(self._ahead) + size > self._most:
            last = max(self._kept, key=lambda place: -1 if place in needed else self._uses[place][0])
            if last in needed:
                break
            self._forget(last)

    def _forget(self, place: Place) -> None:
        del self._kept[place]
        self.kept_bytes -= self._block_bytes(place)

    def _joined(self, box: Box, blocks: deque[tuple[Box, Groups]], whole: torch.Tensor) -> Stored:
        """A box of its blocks, each of which is let go when it is copied."""
        target = _inner(box)
        while blocks:
            block, groups = blocks.popleft()
            common, first = _common(block, target), 0
            for values in (group.result() for group in groups):
                if values.dtype != whole.dtype:  # of an array whose slices are of another type than it says
                    whole = whole.to(values.dtype)
                entries = slice(first, first + len(values))
                first += len(values)
                whole[(entries, *_inside(target, common))] = values[(slice(None), *_inside(block, common))]
        return self._stored(whole)

    def _buffer(self, box: Box) -> torch.Tensor:
        """Memory for a box, its dims in the order of the array's: the device turns them."""
        order = self._source.order
        buffer = buffer_for(self._device, tuple(box.shape[dim] for dim in order), self._source.stored)
        return buffer.permute([order.index(dim) for dim in range(len(order))])

    def _read(self, read: Subscript) -> Stored:
        return self._stored(staged(self._source.read(read), self._device))

    def _stored(self, values: torch.Tensor) -> Stored:
        return Stored(values, constant_values(values, self._dims))


def _inner(box: Box) -> Box:
    """A box along all dims but the batch: labels and weights have no channels."""
    return Box(box.intervals[1:])


def _common(one: Box, other: Box) -> Box:
    """What two boxes have in common."""
    pairs = zip(one, other, strict=True)
    return Box(tuple(Interval(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs))


def _inside(box: Box, part: Box) -> Subscript:
    """The subscript of a part in a tensor that holds the box."""
    return tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(part, box, strict=True))
