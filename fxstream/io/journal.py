"""The journal of a prediction: which boxes of its results are written.

NOTE [what a journal vouches for]
1. A tile is ticked off after it is written: a line of JSON, on disk before the next tile. It has the box and a
   checksum of the values. A line that was cut off counts as not written.
2. When the prediction is started again, a box counts as written where the array still gives values of that
   checksum: an array that was made anew, a chunk or a shard that a kill left half written, a page that never
   reached the disk are written again.
3. A resumed prediction skips tiles that lie in such boxes, whatever its own tiles are.
4. The first line names the prediction: images and results by shape and type, images by their values, arguments,
   weights. A journal of another prediction is refused, or begun anew by request.
5. One process writes a journal at a time: it has a lock on the file (where the file system has locks), which ends
   with the process.
6. Where ranks share the tiles, each has a file of its own: the journal, and beside it `journal.1`, `journal.2`.
   The next start, of as many processes or of others, puts all of them into the first.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fxstream.errors import InputError, StreamError
from fxstream.geometry.box import Box, Interval

__all__ = ["Journal"]

FORM = "journal of fxstream, form 2"


class Journal:
    """The boxes of each result that are written, in a file of lines, which is locked until `close`; see the NOTE.

    `rank` is that of the process among those that share the tiles; the first opens its journal before the others.
    Raises `InputError` for the journal of another prediction, `StreamError` for one that another process writes.
    """

    def __init__(
        self, path: str | os.PathLike[str], prediction: dict[str, Any], restart: bool = False, rank: int = 0
    ) -> None:
        self.path = Path(path)
        self._done: dict[int, dict[Box, int]] = {}
        header = json.dumps({"form": FORM, **prediction})
        self._file = _File(self.path if not rank else self.path.with_name(f"{self.path.name}.{rank}"))
        try:
            if rank:
                self._file.begin(header)
                self._learn(self.path.read_text(encoding="utf-8"))
            else:
                self._join(header, restart)
        except BaseException:
            self.close()
            raise

    def _join(self, header: str, restart: bool) -> None:
        """Continue the journal with what other ranks wrote beside it, or begin it. Raises `InputError`."""
        text = self._file.path.read_text(encoding="utf-8")
        is_begun = self._is_begun(text, header, restart)
        if not is_begun:
            self._file.begin(header)
        for path in _parts(self.path):
            part = _File(path)
            lines = path.read_text(encoding="utf-8").splitlines()
            if is_begun and lines and _parsed(lines[0]) == json.loads(header):
                self._file.append("\n".join(line for line in lines[1:] if _parsed(line)))
            path.unlink()
            part.close()
        self._learn(self._file.path.read_text(encoding="utf-8"))

    def _is_begun(self, text: str, header: str, restart: bool) -> bool:
        """Whether there is a journal to continue. Raises `InputError` for one that is refused."""
        if not text.strip() or header.startswith(text):  # nothing, or a first line that was cut off
            return False
        first, this = next(_lines(text), {}), json.loads(header)
        if first != this:
            if restart and first.get("form") == FORM:
                return False
            raise InputError(self._refusal(this, first))
        self._file.append("")  # ends a line that was cut off
        return True

    def _refusal(self, header: dict[str, Any], first: dict[str, Any]) -> str:
        if first.get("form") != FORM:
            return f"{self.path} is no journal of this version of fxstream: give another path, or delete it"
        different = ", ".join(sorted(key for key in header if header[key] != first.get(key)))
        return (
            f"the journal {self.path} is of another prediction (its {different} differ): give another path, or"
            " restart=True to begin it anew"
        )

    def _learn(self, text: str) -> None:
        """Take in the boxes that lines tell of."""
        for line in _lines(text):
            if "box" in line:
                box = Box(tuple(Interval(*bounds) for bounds in line["box"]))
                self._done.setdefault(line["output"], {})[box] = line["sum"]

    def done(self, output: int) -> dict[Box, int]:
        """The boxes of a result that are ticked off, with the checksums of their values."""
        return dict(self._done.get(output, {}))

    def tick(self, output: int, box: Box, checksum: int) -> None:
        """Tick off a box that is written. Raises `StreamError` where the file cannot be written."""
        bounds = [[part.start, part.stop] for part in box]
        self._file.append(json.dumps({"output": output, "box": bounds, "sum": checksum}))

    def close(self) -> None:
        """Let other processes have it."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _File:
    """A file of lines that this process alone writes. Raises `StreamError` where another one does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise InputError(f"the journal {path} cannot be written: {error}") from error
        self.close = weakref.finalize(self, os.close, self._number)
        if not _is_locked(self._number):
            self.close()
            raise StreamError(
                f"another process writes the journal {path}: wait until it has ended, or give this one a journal"
                " and arrays of its own"
            )

    def begin(self, line: str) -> None:
        """Replace all of it by a first line."""
        os.ftruncate(self._number, 0)
        self.append(line)

    def append(self, line: str) -> None:
        """Add a line, on disk before this returns. Raises `StreamError` where that fails."""
        try:
            rest = memoryview(f"{line}\n".encode())
            while rest:
                rest = rest[os.write(self._number, rest) :]
            os.fsync(self._number)
        except OSError as error:
            raise StreamError(
                f"writing the journal {self.path} failed: {error}. What is written stays: the next start continues"
            ) from error


def _is_locked(number: int) -> bool:
    """Whether the open file is this process's now; also where there are no locks."""
    with contextlib.suppress(ModuleNotFoundError):
        locks = importlib.import_module("fcntl")
        try:
            locks.flock(number, locks.LOCK_EX | locks.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
    return True


def _parts(path: Path) -> Sequence[Path]:
    """The files of other ranks beside a journal."""
    beside = sorted(path.parent.glob(f"{glob.escape(path.name)}.[0-9]*"))
    return [part for part in beside if next(_lines(part.read_text(encoding="utf-8")), {}).get("form") == FORM]


def _lines(text: str) -> Iterator[dict[str, Any]]:
    """What is whole of the lines of a journal."""
    return (line for line in map(_parsed, text.splitlines()) if line)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
