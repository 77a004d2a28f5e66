"""Libraries of file formats, which are installed only where someone uses them."""

from __future__ import annotations

import importlib
from types import ModuleType

from fxstream.errors import InputError

__all__ = ["has_library", "library"]

PIP_NAMES = {"PIL": "pillow", "openslide": "openslide-python openslide-bin"}
"""Packages that pip knows by another name than Python."""


def library(name: str, purpose: str) -> ModuleType:
    """The module of a library. Raises `InputError` that says how to install it, where it is not."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = PIP_NAMES.get(name.split(".")[0], name.split(".")[0])
        raise InputError(
            f"{purpose} needs {name.split('.')[0]}: python -m pip install {package} ({error})"
        ) from error


def has_library(name: str) -> bool:
    """Whether a library can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
