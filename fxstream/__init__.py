"""Exact streaming of convolutional networks over images larger than memory."""

import importlib.metadata as _metadata

from fxstream import backend, rules
from fxstream.compiler.analysis import Analysis, analyze
from fxstream.compiler.compile import compile, plan
from fxstream.compiler.module import StreamedModule
from fxstream.errors import (
    CaptureError,
    FxstreamError,
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
from fxstream.probe.probe import ProbeReport
from fxstream.rules import register_rule
from fxstream.tools.check import CheckReport, check
from fxstream.tools.freeze import freeze_batch_norm
from fxstream.tools.infer import infer
from fxstream.tools.lsuv import lsuv_

try:
    __version__ = _metadata.version("fxstream")
except _metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Analysis",
    "CaptureError",
    "CheckReport",
    "FxstreamError",
    "InputError",
    "PlanError",
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
    "lsuv_",
    "openslide_array",
    "plan",
    "pyvips_array",
    "register_rule",
    "rules",
    "source",
    "target",
]
