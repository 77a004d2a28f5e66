"""`torch.compile(model, backend="fxstream", options={"tile": 2048})`: dynamo captures, fxstream streams.

`options` are those of `fxstream.compile`; any other raises `InputError` at the first call. Dynamo splits a program
at what it cannot trace and hands over each part as a graph: every part with an image among its inputs is streamed
by itself, every other part runs as it is. `logging.getLogger("fxstream")` tells the plan of each at level INFO.

Prefer `fxstream.compile` where it can capture the model: it plans the whole network within one memory, where a
graph break is a boundary that is kept whole and each part has the memory to itself; and one capture serves all
sizes, where dynamo traces again at the second size (not with `dynamic=True`). The first call traces twice, by
dynamo and then by fxstream. The backend is for programs that are written around `torch.compile`, for functions
that call several modules, and for models whose control flow depends on values, which dynamo follows and a whole
graph cannot.

The name is an entry point, found where the package is installed. `register` makes it known otherwise; importing
fxstream does so only where dynamo is loaded already, since loading dynamo takes longer than loading fxstream.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxstream.compiler.compile import compile, options_of
from fxstream.compiler.parts import streamed_part
from fxstream.compiler.shared import Shared
from fxstream.errors import InputError

__all__ = ["NAME", "backend", "register"]

NAME = "fxstream"
OPTIONS = tuple(inspect.signature(compile).parameters)[1:]
Compiled = Callable[..., Any]


def register() -> None:
    """Make the backend known to `torch.compile` by its name; does nothing where it is known."""
    if NAME not in torch.compiler.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(backend, name=NAME)


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Dynamo's graph as a function that streams; what `torch.compile` calls.

    A mistake in the options is raised when that function is called: dynamo would wrap what is raised here.
    """
    try:
        chosen = options_of(**_checked_options(options or {}, mode))
    except InputError as error:
        return _refusal(error)
    return streamed_part(graph_module, Shared("the part of a program", chosen))


def _checked_options(options: Mapping[str, Any], mode: str | None) -> Mapping[str, Any]:
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise InputError(
            f"the backend {NAME!r} has no option {', '.join(map(repr, unknown))}; it has {', '.join(OPTIONS)}"
        )
    if mode is not None:
        raise InputError(f"the backend {NAME!r} has no modes; found mode={mode!r}: give options")
    return options


def _refusal(error: InputError) -> Compiled:
    def refuse(*_: Any) -> Any:
        raise error

    return refuse


if "torch._dynamo" in sys.modules:
    register()
