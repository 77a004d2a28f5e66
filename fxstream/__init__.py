"""Exact streaming of convolutional networks over images larger than memory."""

from fxstream import rules
from fxstream.compiler import StreamedModule, compile
from fxstream.errors import (
    CaptureError,
    FxstreamError,
    InputError,
    PlanError,
    RuleError,
    StreamError,
    StreamingWarning,
)
from fxstream.rules import register_rule

__all__ = [
    "CaptureError",
    "FxstreamError",
    "InputError",
    "PlanError",
    "RuleError",
    "StreamError",
    "StreamedModule",
    "StreamingWarning",
    "compile",
    "register_rule",
    "rules",
]
