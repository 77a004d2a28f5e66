"""Networks of torchvision and timm by name.

With a build of torch that its compiled operators do not fit, `import torchvision` fails on the fake-tensor rules
that it registers for two of them. Defining their schemas is enough for the networks, which use neither. That
happens only here, and only where loading the compiled operators fails: a second definition is an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxstream.errors import InputError

__all__ = ["build", "define_missing_torchvision_schemas"]


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

    Raises `InputError` for a name of another form and for an unknown network.
    """
    library, _, name = target.partition("/")
    if library not in ("torchvision", "timm") or not name:
        raise InputError(f"a network is named torchvision/NAME or timm/NAME, found {target!r}")
    define_missing_torchvision_schemas()
    try:
        if library == "timm":
            made = importlib.import_module("timm").create_model(name, pretrained=False, **options)
        else:
            models = importlib.import_module("torchvision").models
            backbone = "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters
            none = {"weights_backbone": None} if backbone else {}  # by default a backbone's weights are downloaded
            made = models.get_model(name, weights=None, **none | options)
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"{target} cannot be built: {error}") from error
    assert isinstance(made, nn.Module)
    return made
