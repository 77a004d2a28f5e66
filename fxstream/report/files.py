"""Files that a command writes: whole or not at all, where the user said, with the user's permissions."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxstream.errors import InputError

__all__ = ["writable", "write"]


def writable(path: str) -> Path:
    """The path, if a file can be made there. Raises `InputError` before any work is done."""
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: name a file in a directory that exists and is yours to write")
    return file


def write(path: Path, write_into: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all, and say so; its mode is that of the umask, or of the file before it."""
    target = path.resolve()  # of a link, what it leads to
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        write_into(unfinished)
        if target.exists():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"wrote {path}", file=sys.stderr)
