"""The user's own code: the line and module of a node, of an error, of a call; the names in what a model runs."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

__all__ = [
    "called_by_user",
    "is_library_file",
    "last_user_frame",
    "module_path",
    "names_in",
    "names_in_calls",
    "source_line",
]

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


def names_in(code: types.CodeType) -> frozenset[str]:
    """The names of attributes and globals in code, and the texts, which may be names too.

    Torch's own code calls `len` for arguments and hooks, not for tensors.
    """
    names = frozenset(code.co_names).union(constant for constant in code.co_consts if isinstance(constant, str))
    return names - {"len"} if is_library_file(code.co_filename) else names


def names_in_calls(model: nn.Module) -> frozenset[str]:
    """The names in the code that calls of a model may run, as far as names lead, outside of torch.

    More than runs, where only one branch does; less, where a function is handed on as a value.
    """
    waiting = [(type(module), _member(type(module), "forward")) for module in model.modules()]
    seen: set[types.CodeType] = set()
    names: set[str] = set()
    for owner, function in waiting:
        unwrapped = inspect.unwrap(function)
        code = getattr(unwrapped, "__code__", None)
        if code is None or code in seen or is_library_file(code.co_filename):
            continue
        seen.add(code)
        names |= names_in(code)
        waiting += [(owner, called) for called in _called(owner, unwrapped, code)]
    return frozenset(names)


def _called(owner: type, function: types.FunctionType, code: types.CodeType) -> Iterator[types.FunctionType]:
    """The functions that names in a method's code stand for: methods, globals, and members of global modules."""
    named = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    scopes = [owner, *(value for value in named if isinstance(value, types.ModuleType))]
    named += [_member(scope, name) for scope in scopes for name in code.co_names]
    return (value for value in named if inspect.isfunction(value))


def _member(scope: object, name: str) -> Any:
    """What a name stands for in a class or module, without running any code of theirs."""
    member = inspect.getattr_static(scope, name, None)
    return getattr(member, "__func__", member) if isinstance(member, (staticmethod, classmethod)) else member
