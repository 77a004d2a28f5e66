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
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fxstream.errors import InputError
from fxstream.geometry.box import Box, Interval

__all__ = ["Journal"]

FORM = "journal of fxstream, form 2"


class Journal:
    """The boxes of each result that are written, in a file of lines; see the NOTE."""

    def __init__(self, path: str | os.PathLike[str], prediction: dict[str, Any], restart: bool) -> None:
        self.path = Path(path)
        self._done: dict[int, dict[Box, int]] = {}
        header = {"form": FORM, **prediction}
        if not self._is_begun(header, restart):
            self._begin(header)

    def _is_begun(self, header: dict[str, Any], restart: bool) -> bool:
        """Whether there is a journal to continue, which is read. Raises `InputError` for one that is refused."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = [line for line in map(_parsed, text.splitlines()) if line]
        if not text.strip():
            return False
        first = lines[0] if lines else {}
        if first != json.loads(json.dumps(header)):
            if restart and first.get("form") == FORM:
                return False
            raise InputError(self._refusal(header, first))
        for line in lines[1:]:
            box = Box(tuple(Interval(*bounds) for bounds in line["box"]))
            self._done.setdefault(line["output"], {})[box] = line["sum"]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n")  # ends a line that was cut off
        return True

    def _refusal(self, header: dict[str, Any], first: dict[str, Any]) -> str:
        if first.get("form") != FORM:
            return f"{self.path} is no journal of this version of fxstream: give another path, or delete it"
        different = ", ".join(sorted(key for key in header if header[key] != first.get(key)))
        return (
            f"the journal {self.path} is of another prediction (its {different} differ): give another path, or"
            " restart=True to begin it anew"
        )

    def _begin(self, header: dict[str, Any]) -> None:
        """Write the first line; a journal that was there is replaced in one step."""
        beside = self.path.with_name(self.path.name + ".new")
        beside.unlink(missing_ok=True)
        _append(beside, header)
        beside.replace(self.path)

    def done(self, output: int) -> dict[Box, int]:
        """The boxes of a result that are ticked off, with the checksums of their values."""
        return dict(self._done.get(output, {}))

    def tick(self, output: int, box: Box, checksum: int) -> None:
        """Tick off a box that is written."""
        bounds = [[part.start, part.stop] for part in box]
        _append(self.path, {"output": output, "box": bounds, "sum": checksum})


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
