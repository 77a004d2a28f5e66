"""Exact streaming of convolutional networks over images larger than memory.

What is exported is loaded when it is first used, and torch with it: the command line prints its help without.
"""

from __future__ import annotations

import importlib as _importlib
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from fxstream import backend, rules
    from fxstream.compiler.analysis import Analysis, analyze
    from fxstream.compiler.compile import compile, plan
    from fxstream.compiler.module import StreamedModule, inspect
    from fxstream.errors import (
        CaptureError,
        FxstreamError,
        GraphBreakError,
        InputError,
        PlanError,
        ProbeError,
        RuleError,
        StreamError,
        StreamingWarning,
    )
    from fxstream.io.slides import openslide_array, pyvips_array
    from fxstream.io.source import Source, source
    from fxstream.io.target import Target, target
    from fxstream.io.tiff import tiff_array
    from fxstream.planning.decision import Decision
    from fxstream.prediction.predict import Predictions, predict
    from fxstream.probe.probe import ProbeReport
    from fxstream.rules import register_rule
    from fxstream.tools.check import CheckReport, check
    from fxstream.tools.freeze import freeze_batch_norm
    from fxstream.tools.infer import infer
    from fxstream.tools.lsuv import lsuv_

    __version__: str

_HOMES = {
    "fxstream": ("backend", "rules"),
    "fxstream.compiler.analysis": ("Analysis", "analyze"),
    "fxstream.compiler.compile": ("compile", "plan"),
    "fxstream.compiler.module": ("StreamedModule", "inspect"),
    "fxstream.errors": (
        *("CaptureError", "FxstreamError", "GraphBreakError", "InputError", "PlanError", "ProbeError"),
        *("RuleError", "StreamError", "StreamingWarning"),
    ),
    "fxstream.io.slides": ("openslide_array", "pyvips_array"),
    "fxstream.io.tiff": ("tiff_array",),
    "fxstream.io.source": ("Source", "source"),
    "fxstream.io.target": ("Target", "target"),
    "fxstream.planning.decision": ("Decision",),
    "fxstream.prediction.predict": ("Predictions", "predict"),
    "fxstream.probe.probe": ("ProbeReport",),
    "fxstream.rules": ("register_rule",),
    "fxstream.tools.check": ("CheckReport", "check"),
    "fxstream.tools.freeze": ("freeze_batch_norm",),
    "fxstream.tools.infer": ("infer",),
    "fxstream.tools.lsuv": ("lsuv_",),
}
"""The modules that what is exported is in; modules themselves are in the package."""
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Analysis",
    "CaptureError",
    "CheckReport",
    "Decision",
    "FxstreamError",
    "GraphBreakError",
    "InputError",
    "PlanError",
    "Predictions",
    "ProbeError",
    "ProbeReport",
    "RuleError",
    "Source",
    "StreamError",
    "StreamedModule",
    "StreamingWarning",
    "Target",
    "__version__",
    "analyze",
    "backend",
    "check",
    "compile",
    "freeze_batch_norm",
    "infer",
    "inspect",
    "lsuv_",
    "openslide_array",
    "plan",
    "predict",
    "pyvips_array",
    "register_rule",
    "rules",
    "source",
    "target",
    "tiff_array",
]


if not _TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What is exported by this name, loaded now and kept."""
        value: object
        if name == "__version__":
            value = _version()
        elif name not in _HOME:
            raise AttributeError(f"module 'fxstream' has no attribute {name!r}")
        elif _HOME[name] == "fxstream":
            value = _importlib.import_module(f"fxstream.{name}")
        else:
            value = getattr(_importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    metadata = _importlib.import_module("importlib.metadata")
    try:
        return str(metadata.version("fxstream"))
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


if "torch._dynamo" in _sys.modules:
    _importlib.import_module("fxstream.backend")  # which tells dynamo its name
