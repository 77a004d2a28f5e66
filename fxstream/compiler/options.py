"""The options that a plan depends on: named once, checked once, and handed on as a `Request`.

`RequestOptions` are keyword arguments of `compile` and `plan`. Functions that only pass them on take them as
`**options`, so that a new option is a field of `Request`, a line here, and an argument of those two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from fxstream.errors import InputError
from fxstream.machine.units import parse_memory
from fxstream.tiling.request import Request

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GLOBAL_OPS", "RequestOptions", "request_of"]

GLOBAL_OPS = ("auto", "stream", "cut")


class RequestOptions(TypedDict, total=False):
    """Options of `compile`, which describes them."""

    tile: int | tuple[int, ...] | None
    memory: float | str | None
    segments: int | tuple[str, ...] | None
    cut: str | None
    global_ops: str
    offload: bool
    cuda_graphs: bool
    compile_tiles: bool | Mapping[str, Any]


def request_of(**options: Unpack[RequestOptions]) -> Request:
    """The request of a user; options that are left out have their default.

    Raises `InputError` for a tile, a memory, segments or a mode that make no sense, and for a tile with a memory.

    >>> request_of(memory="2GiB", segments=["layer1", "layer2"]).segments
    ('layer1', 'layer2')
    """
    values: dict[str, Any] = {**options}
    if values.get("global_ops", "auto") not in GLOBAL_OPS:
        modes = ", ".join(map(repr, GLOBAL_OPS))
        raise InputError(f"global_ops must be one of {modes}; found {values['global_ops']!r}")
    if values.get("tile") is not None and values.get("memory") is not None:
        raise InputError("give a tile or a memory, not both: within a memory the planner chooses the tiles")
    return Request(**values | {name: check(values[name]) for name, check in CHECKS.items() if name in values})


def _checked_tile(tile: object) -> int | tuple[int, ...] | None:
    if tile is None:
        return None
    numbers = tile if isinstance(tile, (tuple, list)) else (tile,)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise InputError(f"tile must be a positive int, or one per image axis, in pixels; found {tile!r}")
    return tuple(numbers) if isinstance(tile, (tuple, list)) else numbers[0]


def _checked_segments(segments: object) -> int | tuple[str, ...] | None:
    if segments is None or (isinstance(segments, int) and not isinstance(segments, bool) and segments > 0):
        return segments
    if isinstance(segments, (tuple, list)) and segments and all(isinstance(s, str) for s in segments):
        return tuple(segments)
    raise InputError(f"segments must be a positive int or module names; found {segments!r}")


def _checked_compilation(compile_tiles: object) -> bool:
    if not isinstance(compile_tiles, (bool, Mapping)):
        raise InputError(f"compile_tiles must be a bool, or options of torch.compile; found {compile_tiles!r}")
    return compile_tiles is not False


def _checked_memory(memory: object) -> float | None:
    return None if memory is None else parse_memory(memory)


CHECKS: dict[str, Callable[[object], Any]] = {
    "tile": _checked_tile,
    "segments": _checked_segments,
    "memory": _checked_memory,
    "compile_tiles": _checked_compilation,
}
"""What checks an option, and brings it into the form of a `Request`; those without a check are taken as given."""
