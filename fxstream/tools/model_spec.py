"""Model specs, the names of models on the command line: a network of a library, or a function of the user.

    torchvision/resnet50      timm/convnext_tiny      package.module:function      path/to/file.py:function

The function (or class) is called without arguments and returns the model; a model itself will do.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import operator
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


def load(spec: str, *, weights: bool = False) -> nn.Module:
    """The model that a spec names; on the meta device, without memory, unless `weights` are needed.

    Raises `InputError` with one line that says what is wrong and what to do.
    """
    if ":" in spec:
        return _called(spec, _attribute(spec))
    if spec.split("/")[0] not in ("torchvision", "timm"):
        raise InputError(f"{spec!r} names no network: give {FORMS}")
    if weights:
        return build(spec)
    try:
        with torch.device("meta"):
            return build(spec)
    except (InputError, NotImplementedError, RuntimeError):
        return build(spec)  # a constructor that computes with numbers


def _attribute(spec: str) -> Any:
    location, _, name = spec.rpartition(":")
    module = _module(location)
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise InputError(
            f"{location} has no {name!r}; it defines {', '.join(public[:8]) or 'nothing callable'}"
        ) from None


def _module(location: str) -> ModuleType:
    """The module of a file or an import path; an error in it is reported with its own line."""
    is_file = location.endswith(".py")
    if is_file and not Path(location).is_file():
        raise InputError(f"there is no file {location}: give the path of the file that defines the model")
    try:
        if is_file:
            return _module_of_file(Path(location))
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(location)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"importing {location} fails with {type(error).__name__}: {error}{_line_of(error)}"
        ) from error


def _module_of_file(path: Path) -> ModuleType:
    """The module of a file, which may import what lies beside it."""
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    module_spec.loader.exec_module(module)
    return module


def _line_of(error: BaseException) -> str:
    """File and line of the user's code where an error was raised."""
    trace = error.__traceback__
    last = None
    while trace is not None:
        if "importlib" not in trace.tb_frame.f_code.co_filename and trace.tb_frame.f_code.co_filename != __file__:
            last = trace
        trace = trace.tb_next
    return f" ({last.tb_frame.f_code.co_filename}:{last.tb_lineno})" if last is not None else ""


def _called(spec: str, attribute: Any) -> nn.Module:
    """The model that an attribute is, or returns without arguments."""
    if isinstance(attribute, nn.Module):
        return attribute
    if not callable(attribute):
        raise InputError(f"{spec} is a {type(attribute).__name__}: name a function that returns the model")
    required = _required(attribute)
    if required:
        raise InputError(
            f"{spec} needs arguments ({', '.join(required)}): name a function that takes none, for example"
            f" one that returns {attribute.__name__}(...)"
        )
    try:
        model = attribute()
    except (Exception, SystemExit) as error:
        raise InputError(f"{spec} fails with {type(error).__name__}: {error}{_line_of(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returns a {type(model).__name__}, not an nn.Module")
    return model


def _required(function: Any) -> list[str]:
    """The names of the arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in fixed]
