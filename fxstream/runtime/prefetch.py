"""What tiles read of the segment's inputs, in threads ahead of the computation.

NOTE [reading ahead]
1. Tensors on the device are cut as views. Boxes of tensors in host memory are copied, ready for the device, one
   tile ahead.
2. A `Source` is read in blocks (`fxstream.io.blocks`), each by one of its reading threads. A block that later
   tiles read too is kept until the last of them has it, so that a pass asks for each block once.
3. One tile is read ahead in any case, and more while the reading threads would run out of work. What is kept and
   what is read ahead of the tile that computes has at most `MOST_HELD` bytes of host memory, unless one tile needs
   more. Where the next tile does not fit beside what is kept, the blocks that are needed last are given up, and
   read again.
4. Tiles come in the order of the pass. One that comes unplanned (a half, where memory ran out) is read when it is
   asked for.
5. A box becomes a tensor of its own in host memory, pinned for a device that uses that, and is looked at whether
   it is constant (`fxstream.runtime.equal_tiles`): both in threads.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from fxstream.geometry.box import Box, Interval
from fxstream.io.blocks import grid_of
from fxstream.io.source import Source
from fxstream.machine.copies import buffer_for, staged
from fxstream.machine.device import is_accelerator, is_idle
from fxstream.runtime.equal_tiles import Constant, constant_values
from fxstream.runtime.schedule import Subscript, TileTask

__all__ = ["MOST_HELD", "Boxes", "Image", "Reader"]

logger = logging.getLogger("fxstream")

Image = torch.Tensor | Source
Place = tuple[int, ...]
Dims = tuple[int, ...] | None
_Groups = list[Future[torch.Tensor]]

MOST_HELD = 2**28
"""Bytes of blocks that are kept to be read once, and of what is read ahead."""
NOTABLE = 0.1
"""From this share of a pass on it is said that the computation waits for reading."""


@dataclass(frozen=True, slots=True)
class Boxes:
    """What one tile reads of each image: on the device, or in host memory until it is `placed`.

    `constant` has their values where each is constant along its tiled dims.
    """

    images: Sequence[Image]
    stored: Sequence[torch.Tensor]
    device: torch.device
    constant: Constant | None = None

    def placed(self) -> list[torch.Tensor]:
        """The boxes on the device, in the types that the model is given."""
        pairs = zip(self.images, self.stored, strict=True)
        return [
            image.place(box) if isinstance(image, Source) else box.to(self.device, non_blocking=True)
            for image, box in pairs
        ]


class Reader:
    """Reads the images' boxes for the tasks of one pass, which come in this order; a context.

    `dims` are the tiled dims of each image where it is to be told whether boxes are constant along them.
    """

    def __init__(
        self,
        images: Sequence[Image],
        tasks: Sequence[TileTask],
        device: torch.device,
        what: str = "",
        dims: Sequence[Dims] = (),
    ) -> None:
        self._images, self._device, self._what = images, device, what
        self._dims = dims or [None] * len(images)
        self._pools: dict[tuple[str, int], ThreadPoolExecutor] = {}
        self._places = [[Box.of(r, i.shape) for r, i in zip(t.reads, images, strict=True)] for t in tasks]
        self._parts = [self._part(k, image) for k, image in enumerate(images)]
        self._ahead: deque[list[Future[_Stored]]] = deque()
        self._next, self._waited, self._began = 0, 0.0, time.perf_counter()

    def _part(self, k: int, image: Image) -> _Blocks | _Copies | _Views:
        dims = self._dims[k]
        if isinstance(image, Source):
            most = MOST_HELD // sum(isinstance(one, Source) for one in self._images)
            pools = self._pool("read", image.readers), self._pool("join", image.readers)
            return _Blocks(image, [boxes[k] for boxes in self._places], most, *pools, self._device, dims)
        if image.device == self._device:
            return _Views(image, dims)
        return _Copies(image, self._device, self._pool("read", 1), dims)

    def _pool(self, work: str, threads: int) -> ThreadPoolExecutor:
        """Threads for some work; arrays that only one thread may read have that in common."""
        if (work, threads) not in self._pools:
            self._pools[work, threads] = ThreadPoolExecutor(threads, f"fxstream-{work}")
        return self._pools[work, threads]

    def __enter__(self) -> Reader:
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
        if error is None:
            for source in (image for image in self._images if isinstance(image, Source)):
                source.require_complete()
            if self.note:
                logger.info("%s%s: more threads (source(..., readers=)), or a faster store", self._what, self.note)

    @property
    def note(self) -> str:
        """What part of the time the computation waited for reading, in words; empty where that is little."""
        share = self._waited / max(time.perf_counter() - self._began, 1e-9)
        return f", reading {share:.0%} of the time" if self._pools and share >= NOTABLE else ""

    def read(self, task: TileTask) -> Boxes:
        """What one tile reads of each image; goes on reading for those that follow."""
        boxes = [Box.of(read, image.shape) for read, image in zip(task.reads, self._images, strict=True)]
        futures = self._planned(boxes)
        if futures is None:
            futures = [part.ask(box) for part, box in zip(self._parts, boxes, strict=True)]
        self._read_ahead()
        began = time.perf_counter()
        results = [future.result() for future in futures]
        if is_idle(self._device):
            self._waited += time.perf_counter() - began
        values = [result.constant for result in results]
        constant = None if None in values else tuple(value for value in values if value is not None)
        return Boxes(self._images, [result.box for result in results], self._device, constant)

    def _planned(self, boxes: list[Box]) -> list[Future[_Stored]] | None:
        """What was asked for of the tile that comes next; tiles before it are left out (rule 4)."""
        try:
            index = self._places.index(boxes, self._next)
        except ValueError:
            return None
        futures = None
        while self._next <= index:
            if not self._ahead:
                self._start()
            futures = self._ahead.popleft()
            for part in self._parts:
                part.take()
            self._next += 1
        return futures

    def _start(self) -> None:
        """Begin to read for the first tile that is not yet begun."""
        boxes = self._places[self._next + len(self._ahead)]
        self._ahead.append([part.start(box) for part, box in zip(self._parts, boxes, strict=True)])

    def _read_ahead(self) -> None:
        """Rule 3: begin to read for the tiles that follow."""
        while (index := self._next + len(self._ahead)) < len(self._places):
            pairs = zip(self._parts, self._places[index], strict=True)
            if self._ahead and not all(part.has_room(box) for part, box in pairs):
                break
            self._start()


@dataclass(frozen=True, slots=True)
class _Stored:
    """A box of an image as it is stored, and its values where it is constant."""

    box: torch.Tensor
    constant: bytes | None


class _Views:
    """Boxes of a tensor on the device."""

    def __init__(self, image: torch.Tensor, dims: Dims) -> None:
        self._image = image
        self._dims = None if is_accelerator(image.device) else dims  # looking at values there takes a wait

    def ask(self, box: Box) -> Future[_Stored]:
        """A box, at once."""
        part = self._image[_subscript(box)]
        future: Future[_Stored] = Future()
        future.set_result(_Stored(part, constant_values(part, self._dims)))
        return future

    start = ask

    def take(self) -> None:
        """Nothing is kept."""

    def has_room(self, box: Box) -> bool:
        """There is nothing to read ahead."""
        return True


class _Copies:
    """Boxes of a tensor in host memory, copied one tile ahead."""

    def __init__(self, image: torch.Tensor, device: torch.device, pool: ThreadPoolExecutor, dims: Dims) -> None:
        self._image, self._device, self._pool, self._dims = image, device, pool, dims

    def ask(self, box: Box) -> Future[_Stored]:
        """A box, when the thread comes to it."""
        return self._pool.submit(self._copied, box)

    start = ask

    def _copied(self, box: Box) -> _Stored:
        part = self._image[_subscript(box)]
        return _Stored(staged(part, self._device), constant_values(part, self._dims))

    def take(self) -> None:
        """Nothing is kept."""

    def has_room(self, box: Box) -> bool:
        """One tile is copied ahead, and no more."""
        return False


class _Blocks:
    """Boxes of a source, made of blocks that are kept as long as a later box of the pass meets them.

    Blocks are read by `readers`, boxes are joined by `joiners`; all else is done by the thread that asks.
    """

    def __init__(
        self,
        source: Source,
        boxes: Sequence[Box],
        most: int,
        readers: ThreadPoolExecutor,
        joiners: ThreadPoolExecutor,
        device: torch.device,
        dims: Dims,
    ) -> None:
        self._source, self._most, self._device, self._dims = source, most, device, dims
        self._readers, self._joiners = readers, joiners
        inner = [_inner(box) for box in boxes]
        self._grid = grid_of(source.chunk_edges, source.shape[1:], set(inner), self._pixel, most // 4)
        self._uses: dict[Place, deque[int]] = {}
        for order, box in enumerate(inner):
            for place in self._grid.meeting(box):
                self._uses.setdefault(place, deque()).append(order)
        self._kept: dict[Place, _Groups] = {}
        self._pending: list[Future[torch.Tensor]] = []
        self._ahead: deque[int] = deque()
        self.kept_bytes = 0

    @property
    def _pixel(self) -> int:
        """Bytes of a pixel of one channel in all entries."""
        return self._source.stored.itemsize * self._source.shape[0]

    def ask(self, box: Box) -> Future[_Stored]:
        """A box that the pass has not planned for, from the source alone."""
        return self._readers.submit(self._stored, box)

    def start(self, box: Box) -> Future[_Stored]:
        """The next box of the pass."""
        places, size = self._grid.meeting(_inner(box)), self._size(box)
        self._make_room(size, set(places))
        self._ahead.append(size)
        blocks = [(self._grid.box(place), self._block(place)) for place in reversed(places)]
        return self._joiners.submit(self._joined, box, blocks)

    def take(self) -> None:
        """The first box that was started is no longer ahead."""
        self._ahead.popleft()

    def has_room(self, box: Box) -> bool:
        """Whether the threads run out of work, and there is memory for one more box."""
        self._pending = [future for future in self._pending if not future.done()]
        idle = len(self._pending) < 2 * self._source.readers
        return idle and self.kept_bytes + sum(self._ahead) + self._size(box) <= self._most

    def _size(self, box: Box) -> int:
        """Bytes of a box, and of the blocks that it needs and that are not kept."""
        fresh = (place for place in self._grid.meeting(_inner(box)) if place not in self._kept)
        return sum(map(self._block_bytes, fresh)) + math.prod(_inner(box).shape) * self._pixel

    def _block_bytes(self, place: Place) -> int:
        return math.prod(self._grid.box(place).shape) * self._pixel

    def _block(self, place: Place) -> _Groups:
        """A block of each group of entries; it is kept while a later box of the pass meets it."""
        uses, is_kept = self._uses[place], place in self._kept
        uses.popleft()
        groups = self._kept[place] if is_kept else self._asked(place)
        if uses and not is_kept:
            self._kept[place] = groups
            self.kept_bytes += self._block_bytes(place)
        elif is_kept and not uses:
            self._forget(place)
        return groups

    def _asked(self, place: Place) -> _Groups:
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

    def _joined(self, box: Box, blocks: list[tuple[Box, _Groups]]) -> _Stored:
        """A box of its blocks, each of which is let go when it is copied."""
        whole, target = None, _inner(box)
        while blocks:
            block, groups = blocks.pop()
            common = _common(block, target)
            first = 0
            for values in (group.result() for group in groups):
                if whole is None:
                    whole = buffer_for(self._device, (self._source.shape[0], *target.shape), values.dtype)
                entries = slice(first, first + len(values))
                first += len(values)
                whole[(entries, *_inside(target, common))] = values[(slice(None), *_inside(block, common))]
        return self._stored(box, whole)

    def _stored(self, box: Box, values: torch.Tensor | None = None) -> _Stored:
        if values is None:
            values = staged(self._source.read(_subscript(box)), self._device)
        return _Stored(values, constant_values(values, self._dims))


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


def _subscript(box: Box) -> Subscript:
    return tuple(slice(part.start, part.stop) for part in box)
