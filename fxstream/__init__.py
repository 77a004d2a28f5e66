"""Exact streaming of convolutional networks over images larger than memory."""

from fxstream import backend, rules
from fxstream.analysis import Analysis, analyze
from fxstream.check import CheckReport, check
from fxstream.compiler import StreamedModule, compile, plan
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
from fxstream.freeze import freeze_batch_norm
from fxstream.inference import infer
from fxstream.lsuv import lsuv_
from fxstream.probe import ProbeReport
from fxstream.rules import register_rule
from fxstream.source import Source, openslide_array, pyvips_array, source

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
]
