"""What a user can name on the command line: a network of a library, or a function of their own.

    torchvision/resnet50      timm/convnext_tiny      package.module:function      path/to/file.py:function

The function (or class) is called without arguments and returns the model; a model itself will do.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxstream.errors import InputError
from fxstream.tools.zoo import build

__all__ = ["load"]

FORMS = "torchvision/NAME, timm/NAME, module:callable or file.py:callable"


def load(target: str, *, weights: bool = False) -> nn.Module:
    """The model that `target` names; on the meta device, without memory, unless `weights` are needed.

    Raises `InputError` with one line that says what is wrong and what to do.
    """
    if ":" in target:
        return _called(target, _attribute(target))
    if target.split("/")[0] not in ("torchvision", "timm"):
        raise InputError(f"{target!r} names no network: give {FORMS}")
    if weights:
        return build(target)
    try:
        with torch.device("meta"):
            return build(target)
    except (InputError, NotImplementedError, RuntimeError):
        return build(target)  # a constructor that computes with numbers


def _attribute(target: str) -> Any:
    place, _, name = target.rpartition(":")
    module = _module(place)
    try:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise InputError(
            f"{place} has no {name!r}; it defines {', '.join(public[:8]) or 'nothing callable'}"
        ) from None
    return found


def _module(place: str) -> ModuleType:
    """The module of a file or an import path; an error inside it is told with its own line."""
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise InputError(f"there is no file {place}: give the path of the file that defines the model")
    try:
        if not is_file:
            sys.path.insert(0, str(Path.cwd()))
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.insert(0, str(Path(place).resolve().parent))
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        raise InputError(
            f"importing {place} fails with {type(error).__name__}: {error}{_line_of(error)}"
        ) from error


def _line_of(error: BaseException) -> str:
    """Where in the user's code an error was raised."""
    trace = error.__traceback__
    last = None
    while trace is not None:
        if "importlib" not in trace.tb_frame.f_code.co_filename and trace.tb_frame.f_code.co_filename != __file__:
            last = trace
        trace = trace.tb_next
    return f" ({last.tb_frame.f_code.co_filename}:{last.tb_lineno})" if last is not None else ""


def _called(target: str, found: Any) -> nn.Module:
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(f"{target} is a {type(found).__name__}: name a function that returns the model")
    required = _required(found)
    if required:
        raise InputError(
            f"{target} needs arguments ({', '.join(required)}): name a function that takes none, for example"
            f" one that returns {found.__name__}(...)"
        )
    try:
        model = found()
    except (Exception, SystemExit) as error:
        raise InputError(f"{target} fails with {type(error).__name__}: {error}{_line_of(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{target} returns a {type(model).__name__}, not an nn.Module")
    return model


def _required(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in fixed]
