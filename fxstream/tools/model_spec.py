"""Model specs, the names of models on the command line: a network of a library, or a function of the user.

    torchvision/resnet50      timm/convnext_tiny      package.module:function      path/to/file.py:function

The function (or class) is called and returns the model; a model itself will do. Arguments stand in brackets and
are Python literals, ``model.py:Net(8, depth=3)`` or ``timm/resnet18(num_classes=2)``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import operator
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxstream.errors import InputError
from fxstream.tools.zoo import build, names, nearest

__all__ = ["load"]

FORMS = "torchvision/NAME, timm/NAME, module:callable or file.py:callable"
SPEC = re.compile(r"(?P<place>[^(]+?)(?P<brackets>\(.*\))?", re.DOTALL)
PIP_NAMES = {"cv2": "opencv-python", "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
"""Packages that pip knows by another name than Python."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def load(spec: str, *, weights: bool = False) -> nn.Module:
    """The model that a spec names; on the meta device, without memory, unless `weights` are needed.

    Raises `InputError` with one line that says what is wrong and what to do.
    """
    place, arguments = _parsed(spec)
    if ":" in place:
        return _called(place, _attribute(place), arguments)
    if place.split("/")[0] not in ("torchvision", "timm"):
        raise InputError(f"{spec!r} names no network: give {FORMS}{_nearest_network(place)}")
    if arguments is not None and arguments[0]:
        raise InputError(f"arguments of {place} need their names: {place}(num_classes=2)")
    settings = arguments[1] if arguments is not None else {}
    if weights:
        return build(place, **settings)
    try:
        with torch.device("meta"):
            return build(place, **settings)
    except (InputError, NotImplementedError, RuntimeError):
        return build(place, **settings)  # a constructor that computes with numbers


def _parsed(spec: str) -> tuple[str, Arguments | None]:
    """What a spec names, and the arguments in its brackets; None without brackets.

    >>> _parsed("model.py:Net(8, depth=3)")
    ('model.py:Net', ((8,), {'depth': 3}))
    """
    match = SPEC.fullmatch(spec)
    if match is None or match["brackets"] is None:
        return spec, None
    try:
        call = ast.parse(f"f{match['brackets']}", mode="eval").body
        if not isinstance(call, ast.Call) or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return match["place"], (tuple(map(ast.literal_eval, call.args)), keywords)
    except (SyntaxError, ValueError):
        raise InputError(
            f"the arguments of {spec!r} are no Python literals (numbers, texts, tuples): write them as in"
            f" {match['place']}(8, depth=3)"
        ) from None


def _nearest_network(text: str) -> str:
    """A suggestion: the name with its library, if there is such a network, or one that is nearly so."""
    listed, _ = names()
    same = [name for name in listed if name.split("/")[1] == text]
    return f"; did you mean {' or '.join(same)}?" if same else nearest(text, listed)


def _attribute(spec: str) -> Any:
    location, _, name = spec.rpartition(":")
    module = _module(location)
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise InputError(
            f"{location} has no {name!r}; it defines {', '.join(public[:8]) or 'nothing callable'}"
            f"{nearest(name, public)}"
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
            f"{_how_to_install(error, location)}"
        ) from error


def _how_to_install(error: BaseException, location: str) -> str:
    """Which package is missing, and the command that installs it; the user's own module has no package."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if not missing:
        return ""
    package = missing.split(".")[0]
    if package == location.split(".")[0]:
        return f": no file {package}.py and no package {package} is here or installed"
    return f": python -m pip install {PIP_NAMES.get(package, package)}"


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


def _called(spec: str, attribute: Any, arguments: Arguments | None) -> nn.Module:
    """The model that an attribute is, or returns for these arguments."""
    if isinstance(attribute, nn.Module) and arguments is None:
        return attribute
    if not callable(attribute):
        raise InputError(f"{spec} is a {type(attribute).__name__}: name a function that returns the model")
    required = _required(attribute)
    if required and arguments is None:
        raise InputError(
            f"{spec} needs arguments ({', '.join(required)}): give them in brackets, in quotes for the shell:"
            f' "{spec}(...)"'
        )
    args, kwargs = arguments or ((), {})
    try:
        model = attribute(*args, **kwargs)
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
