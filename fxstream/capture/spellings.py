"""Other spellings of what dynamo traces, taken for it while a model is traced.

``torch.jit.isinstance(x, torch.Tensor)``, in code that is scripted too, is `isinstance`; ``ctx.saved_variables``,
in autograd functions from before torch 0.4, is ``ctx.saved_tensors``.
"""

from __future__ import annotations

import contextlib
import functools
import typing
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.functions import SkipFunctionVariable
from torch._dynamo.variables.misc import AutogradFunctionContextVariable

__all__ = ["spellings_traced"]

call_skipped = SkipFunctionVariable.call_function
attribute_of_context = AutogradFunctionContextVariable.var_getattr


@functools.wraps(call_skipped)
def _call_function(self: SkipFunctionVariable, tx: Any, args: Any, kwargs: Any) -> Any:
    if self.value is torch.jit.isinstance and len(args) == 2 and not kwargs and _is_class(args[1]):
        return VariableTracker.build(tx, isinstance).call_function(tx, args, kwargs)
    return call_skipped(self, tx, args, kwargs)


def _is_class(variable: VariableTracker) -> bool:
    """Whether it is a class; of ``List[int]`` torch looks into the list."""
    value = variable.as_python_constant() if variable.is_python_constant() else None
    return isinstance(value, type) and typing.get_origin(value) is None


@functools.wraps(attribute_of_context)
def _var_getattr(self: AutogradFunctionContextVariable, tx: Any, name: str) -> Any:
    return attribute_of_context(self, tx, "saved_tensors" if name == "saved_variables" else name)


@contextlib.contextmanager
def spellings_traced() -> Iterator[None]:
    """Dynamo takes these spellings for those that it traces."""
    SkipFunctionVariable.call_function = _call_function  # type: ignore[method-assign]
    AutogradFunctionContextVariable.var_getattr = _var_getattr  # type: ignore[method-assign]
    try:
        yield
    finally:
        SkipFunctionVariable.call_function = call_skipped  # type: ignore[method-assign]
        AutogradFunctionContextVariable.var_getattr = attribute_of_context  # type: ignore[method-assign]
