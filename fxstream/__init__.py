"""Exact streaming of convolutional networks over images larger than memory."""

from fxstream import rules
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
from fxstream.probe import ProbeReport
from fxstream.rules import register_rule

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
    "StreamError",
    "StreamedModule",
    "StreamingWarning",
    "analyze",
    "check",
    "compile",
    "freeze_batch_norm",
    "plan",
    "register_rule",
    "rules",
]
