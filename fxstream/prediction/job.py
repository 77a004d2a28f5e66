"""A job: a folder of results at which any number of processes work, each image done once.

NOTE [how workers share a job]
1. Workers know of each other by files in `FOLDER/.job` alone. Whatever starts them (a shell, torchrun, SLURM,
   Ray), on whatever machines, they need that folder in common and nothing else.
2. An image is worked at in the folder `.job/IMAGE/N`. To make it, or to rename N to N + 1, is to take the image:
   both succeed for one process only. So the work of one that died goes on where it was, by one other.
3. Who took an image writes `lease` there, and touches it every `BEAT` seconds. It is dead where its process is not
   there any more (on the same machine), or where the file was not touched for `PATIENCE` seconds of the observer's
   clock: clocks of machines are not compared.
4. A process that was taken for dead and goes on writes into a folder that is no longer there, and into files that
   were copied since. It sees that before it puts a result in its place.
5. An image is done where its mark `.job/IMAGE.done` and the result that it names are there. The mark is first, so
   that a result which is not of this job is never taken for one. A result is put in its place by one rename.
6. An image that failed has the mark `.job/IMAGE.failed`: workers that run do not try it again, those that are
   started later do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fxstream.errors import InputError, StreamError
from fxstream.prediction.images import stem_of

__all__ = ["Job", "Lease"]

BEAT, PATIENCE, POLL = 10.0, 60.0, 0.5
"""Seconds between touches of a lease, until one that is not touched counts as dead, and between two looks."""


class Lease:
    """The right to work at an image, and the folder to do it in; kept alive while it is entered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file, self._stop = folder / "lease", threading.Event()
        self._write({**_process(), "turn": folder.name})

    def __enter__(self) -> Lease:
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._write({"released": True})

    @property
    def is_lost(self) -> bool:
        """Whether the image was taken by another process."""
        return not self._file.exists()

    def remove(self) -> None:
        """Delete the folder, whose work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def _write(self, content: dict[str, Any]) -> None:
        """Replace the file in one step; nothing where the folder is no longer there."""
        beside = self.folder / f".lease.{uuid.uuid4().hex}"
        beside.write_text(json.dumps(content), encoding="utf-8")
        beside.replace(self._file)


class Job:
    """The folder of a job, which is made or joined. Raises `InputError` for a job of other settings."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self._notes = folder, folder / ".job"
        self._seen: dict[Path, tuple[int, float]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._join(json.loads(json.dumps(settings)))
            self._started = self._now()
        except OSError as error:
            raise InputError(f"the folder {folder} cannot be written: {error}") from error

    def _join(self, settings: dict[str, Any]) -> None:
        """Make the folder of notes with its settings, in one step, or compare with those that are there."""
        beside = self.folder / f".job.{uuid.uuid4().hex}"
        if not self._notes.exists():
            beside.mkdir()
            (beside / "job.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
            with contextlib.suppress(OSError):
                beside.rename(self._notes)
        shutil.rmtree(beside, ignore_errors=True)
        theirs = json.loads((self._notes / "job.json").read_text(encoding="utf-8"))
        different = sorted(key for key in settings.keys() | theirs if settings.get(key) != theirs.get(key))
        if different:
            listed = ", ".join(f"{key} was {theirs.get(key)} and is {settings.get(key)}" for key in different)
            raise InputError(f"{self.folder} has results of another job ({listed}): give another folder")

    def _now(self) -> int:
        """The time as the file system of the folder has it."""
        file = self._notes / f".now.{uuid.uuid4().hex}"
        file.touch()
        now = file.stat().st_mtime_ns
        file.unlink()
        return now

    def leases(self, images: Sequence[Path]) -> Iterator[tuple[Path, Lease]]:
        """Images that this process is to do, one after the other, until all of them are done or have failed.

        Waits for those that other processes do, and takes them over where these die.
        """
        waiting = list(images)
        while waiting:
            left = []
            for image in waiting:
                if self.is_settled(image):
                    self._tidy(image)
                    continue
                lease = self._claim(_key(image))
                if lease is None:
                    left.append(image)
                    continue
                with lease:
                    if not self.is_settled(image):
                        yield image, lease
                if not self.is_settled(image):
                    left.append(image)
            if len(left) == len(waiting):
                time.sleep(POLL)
            waiting = left

    def is_settled(self, image: Path) -> bool:
        """Whether nothing is left to do: it is done, or it failed since this process joined."""
        return self.result(image) is not None or self.failure(image) is not None

    def result(self, image: Path) -> Path | None:
        """The result of an image that is done."""
        mark = _json(self._notes / f"{_key(image)}.done")
        return path if mark and (path := self.folder / mark["result"]).exists() else None

    def failure(self, image: Path) -> str | None:
        """Why an image failed, if it did since this process joined."""
        path = self._notes / f"{_key(image)}.failed"
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime_ns >= self._started:
                return str(_json(path).get("error"))
        return None

    def refuse_taken(self, image: Path, name: str) -> None:
        """Raise `InputError` where there is a result of this name already, which is not of this image."""
        if (self.folder / name).exists():
            raise InputError(
                f"{self.folder / name} is there already and is not of this image: move it, or give another folder"
            )

    def finish(self, image: Path, lease: Lease, made: Path, name: str) -> None:
        """Put a result that was made in the lease's folder into its place. Raises `StreamError` if it was lost."""
        if lease.is_lost:
            raise StreamError("another worker took this image, since this one was not heard of for long")
        self.refuse_taken(image, name)
        _write(self._notes / f"{_key(image)}.done", {"image": str(image), "result": name})
        made.rename(self.folder / name)
        (self._notes / f"{_key(image)}.failed").unlink(missing_ok=True)
        lease.remove()

    def fail(self, image: Path, error: str) -> None:
        """Tell the other workers that an image failed."""
        _write(self._notes / f"{_key(image)}.failed", {"image": str(image), "error": error})

    def _claim(self, key: str) -> Lease | None:
        """The lease of an image that nobody works at; None where someone does."""
        place = self._notes / key
        place.mkdir(exist_ok=True)
        turns = [int(folder.name) for folder in place.iterdir() if folder.name.isdigit()]
        mine = place / str(1 + max(turns, default=0))
        try:
            if not turns:
                mine.mkdir()
            elif self._is_free(place / str(max(turns))):
                (place / str(max(turns))).rename(mine)
                _copy_files(mine)
            else:
                return None
            return Lease(mine)
        except OSError:  # another process was faster
            return None

    def _is_free(self, folder: Path) -> bool:
        """Whether whoever took an image let it go or is dead (rule 3)."""
        lease, stamp = _json(folder / "lease"), 0
        with contextlib.suppress(OSError):
            stamp = (folder / "lease").stat().st_mtime_ns
        if lease.get("released"):
            return True
        if lease.get("turn") == folder.name and lease.get("machine") == _machine() and not _is_alive(lease["pid"]):
            return True
        before, since = self._seen.setdefault(folder, (stamp, time.monotonic()))
        if before != stamp:
            self._seen[folder] = stamp, time.monotonic()
            return False
        return time.monotonic() - since > PATIENCE

    def _tidy(self, image: Path) -> None:
        """Delete what a worker that was killed left of an image that is done."""
        if self.result(image) is not None and (self._notes / _key(image)).exists():
            lease = self._claim(_key(image))
            if lease is not None:
                lease.remove()


def _copy_files(folder: Path) -> None:
    """Make the files of a folder other files, so that a process that has them open writes into none of them."""
    for path in [path for path in folder.iterdir() if path.is_file() and path.suffix != ".npy"]:
        beside = folder / f".copied.{uuid.uuid4().hex}"
        shutil.copyfile(path, beside)
        beside.replace(path)


def _key(image: Path) -> str:
    """What an image is called in a job: by its name, and by where it lies."""
    place = os.path.realpath(image)
    return f"{stem_of(image)}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def _process() -> dict[str, Any]:
    return {"machine": _machine(), "pid": os.getpid()}


def _machine() -> str:
    """This machine, or this container of it: where a process has its number."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space}"


def _is_alive(pid: int) -> bool:
    """Whether there is a process of this number, which is not a corpse; True where that cannot be told."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True
    return state not in "ZX"


def _json(path: Path) -> dict[str, Any]:
    """What a file of notes has; empty where it is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a file of notes in one step."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    beside.write_text(json.dumps(content), encoding="utf-8")
    beside.replace(path)
