"""What the model's code relies on in the sizes of a call's tensors, where sizes were symbols while it was traced.

Dynamo notes each comparison that the code, or an operator on shapes, makes of such symbols. Sizes for which all of
them come out as in the trace take the same path through the code. (A number of the model that changes is a symbol
too.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

__all__ = ["SizeGuards", "size_guards", "source_name"]

NAMES = {"math": math, "torch": torch}
"""What the text of a guard may name, besides the sizes."""


@dataclass(frozen=True, slots=True)
class SizeGuards:
    """The comparisons of a trace, as a function of its symbols; the expression of each symbol in the call."""

    _check: Callable[..., bool]
    _sizes: tuple[Any, ...]

    def hold(self, local: Mapping[str, Any]) -> bool:
        """Whether a call takes the path of the trace; `local` has its `args`, `kwargs` and `model`."""
        try:
            return self._check(*(eval(size, {"L": local}) for size in self._sizes))
        except ZeroDivisionError:
            return False


def size_guards(shapes: ShapeEnv) -> SizeGuards | None:
    """The guards of a trace on its symbols; None where a size is fixed, or one is no part of call or model."""
    conditions = [guard.expr for guard in shapes.guards]
    symbols = sorted(set().union(*(condition.free_symbols for condition in conditions)), key=str)
    names = [_place(shapes, symbol) for symbol in symbols]
    fixed = [symbol for symbol, value in shapes.replacements.items() if value.is_Integer]
    if not all(name.startswith("L[") for name in names) or any(".size()[" in _place(shapes, s) for s in fixed):
        return None
    printed = PythonPrinter().doprint
    text = " and ".join(f"({printed(condition)})" for condition in conditions) or "True"
    check = eval(f"lambda {', '.join(map(str, symbols))}: {text}", dict(NAMES))
    return SizeGuards(check, tuple(compile(name, "<size>", "eval") for name in names))


def _place(shapes: ShapeEnv, symbol: Any) -> str:
    """Where the call or the model has a symbol, as an expression of the traced function's locals; else empty."""
    sources = shapes.var_to_sources.get(symbol)
    return source_name(sources[0]) if sources else ""


def source_name(source: Any) -> str:
    """Where dynamo has something from, as an expression of the traced function's locals, `L`, and globals, `G`."""
    return source.name if isinstance(source.name, str) else str(source.name())
