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
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from fxstream.io.source import Source
from fxstream.machine.device import is_idle
from fxstream.runtime.equal_tiles import Constant
from fxstream.runtime.reading.box_readers import Blocks, Copies, Dims, Stored, Views
from fxstream.runtime.schedule import Subscript, TileTask

__all__ = ["MOST_HELD", "Boxes", "Image", "Reader"]

logger = logging.getLogger("fxstream")

Image = torch.Tensor | Source

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
        self._reads = [task.reads for task in tasks]
        self._parts = [self._part(k, image) for k, image in enumerate(images)]
        self._ahead: deque[list[Future[Stored] | Stored]] = deque()
        self._next, self._waited, self._began = 0, 0.0, time.perf_counter()

    def _part(self, k: int, image: Image) -> Blocks | Copies | Views:
        dims = self._dims[k]
        if isinstance(image, Source):
            most = MOST_HELD // sum(isinstance(one, Source) for one in self._images)
            pools = self._pool("read", image.readers), self._pool("join", image.readers)
            return Blocks(image, [reads[k] for reads in self._reads], most, *pools, self._device, dims)
        if image.device == self._device:
            return Views(image, dims)
        return Copies(image, self._device, self._pool("read", 1), dims)

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
        futures = self._planned(task.reads)
        if futures is None:
            futures = [part.ask(read) for part, read in zip(self._parts, task.reads, strict=True)]
        self._read_ahead()
        began = time.perf_counter()
        results = [future if isinstance(future, Stored) else future.result() for future in futures]
        if self._pools and is_idle(self._device):
            self._waited += time.perf_counter() - began
        values = [result.constant for result in results]
        constant = None if None in values else tuple(value for value in values if value is not None)
        return Boxes(self._images, [result.box for result in results], self._device, constant)

    def _planned(self, reads: tuple[Subscript, ...]) -> list[Future[Stored] | Stored] | None:
        """What was asked for of the tile that comes next; tiles before it are left out (rule 4)."""
        try:
            index = self._reads.index(reads, self._next)
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
        reads = self._reads[self._next + len(self._ahead)]
        self._ahead.append([part.start(read) for part, read in zip(self._parts, reads, strict=True)])

    def _read_ahead(self) -> None:
        """Rule 3: begin to read for the tiles that follow."""
        while (index := self._next + len(self._ahead)) < len(self._reads):
            pairs = zip(self._parts, self._reads[index], strict=True)
            if self._ahead and not all(part.has_room(read) for part, read in pairs):
                break
            self._start()
