"""Networks of torchvision and timm by name.

With a build of torch that its compiled operators do not fit, `import torchvision` fails on the fake-tensor rules
that it registers for two of them. Defining their schemas is enough for the networks, which use neither. That
happens only here, and only where loading the compiled operators fails: a second definition is an error.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxstream.errors import InputError

__all__ = ["build", "define_missing_torchvision_schemas", "names", "nearest"]


LIBRARIES = {"torchvision": "torchvision.models", "timm": "timm"}
"""The libraries, and where each has its networks."""


@functools.cache
def define_missing_torchvision_schemas() -> torch.library.Library | None:
    """Define `torchvision::nms` and `torchvision::qnms` where no compiled operators do; returns the library."""
    package = importlib.util.find_spec("torchvision")
    if package is None:
        return None
    folders = map(Path, package.submodule_search_locations or ())
    files = [folder / f"_C{suffix}" for folder in folders for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    for file in filter(Path.is_file, files):
        with contextlib.suppress(OSError):  # compiled for another build of torch
            torch.ops.load_library(file)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def build(target: str, **options: Any) -> nn.Module:
    """The network `torchvision/NAME` or `timm/NAME`, without weights; `options` go to its constructor.

    Raises `InputError` for a name of another form, for an unknown network, which suggests those nearest to it, and
    where the library is not installed.
    """
    library, _, name = target.partition("/")
    if library not in LIBRARIES or not name:
        raise InputError(f"a network is named torchvision/NAME or timm/NAME, found {target!r}")
    package = _library(library)
    try:
        if library == "timm":
            made = package.create_model(name, pretrained=False, **options)
        else:
            backbone = "weights_backbone" in inspect.signature(package.get_model_builder(name)).parameters
            none = {"weights_backbone": None} if backbone else {}  # by default a backbone's weights are downloaded
            made = package.get_model(name, weights=None, **none | options)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        listed = _names_of(library)
        hint = "" if target in listed else nearest(target, listed)
        raise InputError(f"{target} cannot be built: {error}{hint}") from error
    assert isinstance(made, nn.Module)
    return made


def names() -> tuple[list[str], list[str]]:
    """The names of all networks that `build` knows, and what to do about each library that is not installed."""
    listed, missing = [], []
    for library in LIBRARIES:
        try:
            listed += _names_of(library)
        except InputError as error:
            missing.append(str(error))
    return listed, missing


def nearest(name: str, listed: Sequence[str]) -> str:
    """A question that suggests the names nearest to one, to follow a message; empty where none is near.

    >>> nearest("resnet51", ["vgg11", "resnet50"])
    '; did you mean resnet50?'
    """
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.75)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _names_of(library: str) -> list[str]:
    return [f"{library}/{name}" for name in sorted(_library(library).list_models())]


def _library(library: str) -> Any:
    """The module that has the networks. Raises `InputError` where the library is not installed."""
    define_missing_torchvision_schemas()
    try:
        return importlib.import_module(LIBRARIES[library])
    except ModuleNotFoundError as error:
        raise InputError(f"{library} is not installed: python -m pip install {library} ({error})") from error
