"""Every exception and warning that fxstream raises: one base, one class per stage, one sentence each.

A message has five parts where they exist: the node, the user's source line, what was found, what was
needed, and what to do. Errors of the user's own network (a wrong number of channels, say) keep torch's
sentence as the cause and add the line of the model that it came from.
"""

__all__ = [
    "CaptureError",
    "FxstreamError",
    "GraphBreakError",
    "InputError",
    "PlanError",
    "ProbeError",
    "RuleError",
    "StreamError",
    "StreamingWarning",
]


class FxstreamError(Exception):
    """Base of all errors of this package."""


class InputError(FxstreamError, ValueError):
    """An argument of the user cannot be accepted: a tile, an image, a module name."""


class CaptureError(FxstreamError, RuntimeError):
    """The model cannot be turned into a graph."""


class GraphBreakError(CaptureError):
    """The model is not one graph: its code between two graphs has to run as Python."""


class RuleError(FxstreamError, RuntimeError):
    """An operator rule is registered twice, or says something impossible."""


class PlanError(FxstreamError, ValueError):
    """No plan satisfies the request; the message names the smallest that would.

    `least_tile` is that in pixels, `least_bytes` that in bytes of memory; None for the one that was not asked for.
    """

    def __init__(self, message: str, least_tile: int | None = None, least_bytes: int | None = None) -> None:
        super().__init__(message)
        self.least_tile = least_tile
        self.least_bytes = least_bytes


class ProbeError(FxstreamError, RuntimeError):
    """The real operators contradict what the rules claim about them."""


class StreamError(FxstreamError, RuntimeError):
    """The tile loop met something it cannot compute exactly."""


class StreamingWarning(UserWarning):
    """Said once per model: less is streamed than the user may expect."""
