"""Results that are written into arrays tile by tile, and what of them was written before."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fxstream.errors import InputError, StreamError, StreamingWarning
from fxstream.geometry.box import Box, Interval
from fxstream.io.journal import Journal
from fxstream.io.sharing import units_of
from fxstream.io.source import as_tensor, describe, is_array, torch_dtype
from fxstream.io.target import flushes

__all__ = ["Processes", "Sink"]


class Processes(Protocol):
    """The processes that write one result together, and this one's place among them."""

    rank: int
    count: int

    def gather(self, mine: Any) -> list[Any]:
        """The object of every process, in their order."""


class Sink:
    """An array that takes one result of the network, box by box. Raises `InputError` for one that does not fit.

    `saturate` lets integers outside of the range of the array's type become its limits.
    """

    def __init__(
        self,
        array: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        output: int = 0,
        saturate: bool = False,
    ) -> None:
        if not (is_array(array) and hasattr(type(array), "__setitem__")):
            raise InputError(f"out needs shape, dtype and assignment to slices; found {type(array).__name__}")
        if tuple(array.shape) != shape:
            raise InputError(
                f"out has the shape {list(array.shape)}, the result has {list(shape)}: give it that, or a part"
                " of an array by fxstream.target"
            )
        self._array, self._output = array, output
        self._journal: Journal | None = None
        self._done: list[Box] = []
        self._dtype = torch_dtype(array.dtype)
        are_integers = _is_integer(dtype) and _is_integer(self._dtype)
        self._limits = _common_limits(dtype, self._dtype) if saturate and are_integers else None
        if self._limits is None and not _can_hold(self._dtype, dtype):
            raise InputError(
                f"out has the type {array.dtype} and the result {dtype}, which it cannot hold: convert in the"
                f" model{', or give saturate=True' if are_integers else ''}"
            )

    def resume(self, journal: Journal, processes: Processes | None = None) -> None:
        """Tick off in this journal what is written; its boxes that the array still holds count as written.

        A warning says how many it lost. Where `processes` write the result together, each looks at a part of them.
        """
        self._journal, listed = journal, list(journal.done(self._output).items())
        rank, count = (0, 1) if processes is None else (processes.rank, processes.count)
        mine = [i for i in range(rank, len(listed), count) if self._holds(*listed[i])]
        everyone = [mine] if processes is None else processes.gather(mine)
        self._done = [listed[i][0] for intact in everyone for i in intact]
        if len(self._done) < len(listed) and not rank:
            warnings.warn(
                f"{describe(self._array)} does not hold what was written in {len(listed) - len(self._done)} of"
                f" {len(listed)} boxes of the journal {journal.path} (it was made anew, or a kill left them half"
                " written): they are written again",
                StreamingWarning,
                stacklevel=2,
            )

    def _holds(self, box: Box, checksum: int) -> bool:
        """Whether a box has the values of that checksum; what cannot be read has not."""
        try:
            return _checksum(as_tensor(self._array[_index(box)])) == checksum
        except Exception:
            return False

    def units(self, box: Box) -> frozenset[tuple[int, ...]]:
        """What of the array is read and written whole where a box is written; see `units_of`."""
        return units_of(self._array, _index(box))

    def is_written(self, box: Box) -> bool:
        """Whether all of a box was written before."""
        return _is_covered(box, [done for done in self._done if _meet(box, done)])

    def write(self, box: Box, values: torch.Tensor) -> None:
        """Write one box of the result. Raises `StreamError` where the array fails, naming both."""
        limited = values.detach() if self._limits is None else values.detach().clamp(*self._limits)
        stored = limited.to("cpu", self._dtype)
        try:
            self._array[_index(box)] = stored.numpy()
            for flush in flushes(self._array):
                flush()
        except Exception as error:
            raise StreamError(
                f"writing {box} of {describe(self._array)} failed: {type(error).__name__}: {error}"
            ) from error
        if self._journal is not None:
            self._journal.tick(self._output, box, _checksum(stored))

    def write_whole(self, values: torch.Tensor) -> None:
        """Write a result that is there as a whole, unless it was written before."""
        whole = Box.of((), tuple(values.shape))
        if not self.is_written(whole):
            self.write(whole, values)


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(part.start, part.stop) for part in box)


def _checksum(values: torch.Tensor) -> int:
    """A number that differs where values do; stores may change the sign of zero and the bits of NaN."""
    if values.is_floating_point():
        values = torch.where(values.isnan(), torch.inf, values + 0.0)
    return zlib.crc32(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _common_limits(dtype: torch.dtype, other: torch.dtype) -> tuple[int, int]:
    """The least and the largest integer that both types have."""
    one, two = torch.iinfo(dtype), torch.iinfo(other)
    return max(one.min, two.min), min(one.max, two.max)


def _can_hold(dtype: torch.dtype, values: torch.dtype) -> bool:
    """Whether values of a type can be converted: to floats or to less precise ones, but not to fewer integers."""
    if _is_integer(dtype) and _is_integer(values):
        limits = torch.iinfo(values)
        return _common_limits(dtype, values) == (limits.min, limits.max)
    return torch.can_cast(values, dtype)


def _meet(one: Box, other: Box) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


def _is_covered(box: Box, others: Sequence[Box]) -> bool:
    """Whether boxes together hold all of one."""
    if not others:
        return not all(box.shape)
    first, rest = others[0], others[1:]
    return all(_is_covered(part, [other for other in rest if _meet(part, other)]) for part in _less(box, first))


def _less(box: Box, other: Box) -> list[Box]:
    """What is left of a box without another, as boxes.

    >>> [str(part) for part in _less(Box((Interval(0, 4), Interval(0, 3))), Box((Interval(1, 9), Interval(0, 2))))]
    ['[0:1, 0:3]', '[1:4, 2:3]']
    """
    if not _meet(box, other):
        return [box]
    parts, rest = [], list(box)
    for axis, (mine, cut) in enumerate(zip(box, other, strict=True)):
        for part in (Interval(mine.start, cut.start), Interval(cut.stop, mine.stop)):
            if part.stop > part.start:
                parts.append(Box((*rest[:axis], part, *rest[axis + 1 :])))
        rest[axis] = Interval(max(mine.start, cut.start), min(mine.stop, cut.stop))
    return parts
