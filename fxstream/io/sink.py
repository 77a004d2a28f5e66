"""Results that are written into arrays tile by tile, and the journal of what is written.

NOTE [what a killed prediction leaves]
1. A tile is announced in the journal before it is written, and ticked off after: one line of JSON each, on disk
   before the next step. A line that was cut off counts as not written.
2. A resumed prediction skips tiles that lie in boxes ticked off, whatever its own tiles are.
3. Where the array is stored in chunks (zarr, HDF5), a tile that was announced and not ticked off may have left a
   chunk half written: what was ticked off before and shares a chunk with it counts as not written.
4. The first line names the prediction: shapes, types, weights. A journal of another one is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fxstream.errors import InputError, StreamError
from fxstream.geometry.box import Box, Interval
from fxstream.io.source import describe, is_array, torch_dtype

__all__ = ["Journal", "Sink"]


class Journal:
    """The boxes of each result that are written, in a file of lines; see the NOTE."""

    def __init__(self, path: str | os.PathLike[str], prediction: dict[str, Any]) -> None:
        self._path = Path(path)
        self._begun: dict[int, list[Box]] = {}
        self._done: dict[int, list[Box]] = {}
        if self._path.exists():
            self._load(prediction)
        else:
            self._append(prediction)

    def _load(self, prediction: dict[str, Any]) -> None:
        lines = [line for line in map(_parsed, self._path.read_text(encoding="utf-8").splitlines()) if line]
        header = lines[0] if lines else {}
        if header != json.loads(json.dumps(prediction)):
            different = sorted(key for key in prediction if prediction[key] != header.get(key))
            raise InputError(
                f"the journal {self._path} is of another prediction (its {', '.join(different) or 'form'} differ):"
                " give another path, or delete it to start over"
            )
        for line in lines[1:]:
            box = Box(tuple(Interval(*bounds) for bounds in line["box"]))
            (self._done if line["done"] else self._begun).setdefault(line["output"], []).append(box)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n")  # ends a line that was cut off

    def done(self, output: int, chunks: Sequence[int] | None) -> list[Box]:
        """The boxes of a result that are whole (rules 2 and 3)."""
        done = self._done.get(output, [])
        broken = [_in_chunks(box, chunks) for box in set(self._begun.get(output, [])) - set(done)]
        return [box for box in done if not any(_meet(_in_chunks(box, chunks), other) for other in broken)]

    def note(self, output: int, box: Box, *, done: bool) -> None:
        """Announce a box, or tick it off."""
        self._append({"output": output, "box": [[part.start, part.stop] for part in box], "done": done})

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _in_chunks(box: Box, chunks: Sequence[int] | None) -> Box:
    """The box, grown to whole chunks."""
    if not chunks:
        return box
    parts = zip(box, chunks, strict=True)
    return Box(tuple(Interval(p.start // size * size, -(-p.stop // size) * size) for p, size in parts))


def _meet(one: Box, other: Box) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


class Sink:
    """An array that takes one result of the network, box by box. Raises `InputError` for one that does not fit."""

    def __init__(
        self,
        array: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        output: int = 0,
        journal: Journal | None = None,
    ) -> None:
        if not (is_array(array) and hasattr(array, "__setitem__")):
            raise InputError(f"out needs shape, dtype and assignment to slices; found {type(array).__name__}")
        if tuple(array.shape) != shape:
            raise InputError(f"out has the shape {list(array.shape)}, the result has {list(shape)}: give it that")
        self._array, self._output, self._journal = array, output, journal
        self._dtype = torch_dtype(array.dtype)
        if not torch.can_cast(dtype, self._dtype):
            raise InputError(f"out has the type {array.dtype} and the result {dtype}: convert in the model")
        chunks = getattr(array, "chunks", None)
        self._done = [] if journal is None else journal.done(output, chunks)

    def is_written(self, box: Box) -> bool:
        """Whether all of a box was written before."""
        return _is_covered(box, [done for done in self._done if _meet(box, done)])

    def write(self, box: Box, values: torch.Tensor) -> None:
        """Write one box of the result. Raises `StreamError` where the array fails, naming both."""
        if self._journal is not None:
            self._journal.note(self._output, box, done=False)
        index = tuple(slice(part.start, part.stop) for part in box)
        try:
            self._array[index] = values.detach().to("cpu", self._dtype).numpy()
            for flush in _flushes(self._array):
                flush()
        except Exception as error:
            raise StreamError(
                f"writing {box} of {describe(self._array)} failed: {type(error).__name__}: {error}"
            ) from error
        if self._journal is not None:
            self._journal.note(self._output, box, done=True)

    def write_whole(self, values: torch.Tensor) -> None:
        """Write a result that is there as a whole, unless it was written before."""
        whole = Box.of((), tuple(values.shape))
        if not self.is_written(whole):
            self.write(whole, values)


def _flushes(array: Any) -> list[Callable[[], Any]]:
    """What brings an array's values to its file: its own flush, or its file's."""
    methods = (getattr(array, "flush", None), getattr(getattr(array, "file", None), "flush", None))
    return [flush for flush in methods if callable(flush)]


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
