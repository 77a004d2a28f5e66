"""Where in the user's own code something happens: the line and the module of a node, of an error, of a call."""

from __future__ import annotations

import functools
import re
import sys
import traceback
from pathlib import Path

import torch
from torch import fx

__all__ = ["called_by_user", "is_library_file", "last_user_frame", "module_path", "source_line"]

FRAME = re.compile(r'^\s*File "([^"]*)", line (\d+)', re.MULTILINE)
LIBRARIES = (f"{torch.__path__[0]}/", f"{Path(__file__).parent.parent}/", "<")
STANDARD_LIBRARY = Path(traceback.__file__).parent
TRACING = tuple(f"{torch.__path__[0]}/{part}" for part in ("_", "fx/", "overrides", "export/"))


def is_library_file(path: str) -> bool:
    """Whether a source file belongs to torch or fxstream, and so not to the user."""
    return path.startswith(LIBRARIES)


def source_line(node: fx.Node) -> str:
    """The last line of the user's code that led to the node, as ``file:line``; empty if there is none."""
    return _line_of_user(node.meta.get("stack_trace") or "")


@functools.lru_cache(2**12)
def _line_of_user(trace: str) -> str:
    frames = FRAME.findall(trace)
    return next((f"{file}:{line}" for file, line in reversed(frames) if not is_library_file(file)), "")


def module_path(node: fx.Node) -> str:
    """The user's module that the node belongs to, as in ``layer1.0.conv1``; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0].split("@")[0] if stack else ""


def last_user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The last frame of the user's code that the error passed through."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    users = (frame for frame in frames if not is_library_file(frame.filename))
    return next((frame for frame in users if Path(frame.filename).parent != STANDARD_LIBRARY), None)


def called_by_user() -> bool:
    """For a ``__torch_function__``: whether the function that it handles was called by code outside of torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_name == "__torch_function__" or frame.f_code.co_filename.startswith(TRACING)
    ):
        frame = frame.f_back
    return not is_library_file(frame.f_code.co_filename)
