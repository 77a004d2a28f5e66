"""Context variables (`contextvars.ContextVar`) that a model's code reads and sets while it is traced.

A value that is set and, by its token, taken back within one call is known while that call is traced. Dynamo knows
none of the methods; here they answer from what the trace has set.

NOTE [context variables]
1. What the code sets is seen by the code after it, until it is reset. Nothing is set in the real variable.
2. A value from outside of the call is a constant of the trace, if it is None, a number, a text or an entry of an
   enumeration; the trace holds as long as the variable has that value (`ContextValues`). Any other is not traced.
3. A variable that still has another value when the call ends would be read by later calls: that is no trace.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

__all__ = ["ContextValues", "context_values_traced"]

MISSING = object()
"""In place of a value that a variable does not have."""
CONSTANTS = (types.NoneType, bool, int, float, str, enum.Enum)


@dataclass(frozen=True, slots=True)
class ContextValues:
    """Values of context variables outside of a call that a trace depends on."""

    values: tuple[tuple[ContextVar[Any], Any], ...] = ()

    def hold(self) -> bool:
        """Whether the variables have these values now."""
        return all(_is_same(variable.get(MISSING), value) for variable, value in self.values)


def _is_same(one: Any, value: Any) -> bool:
    return one is value or (type(one) is type(value) and one == value)


class _Token(VariableTracker):
    """What `set` returns: the variable, and what it had before (`MISSING` for what is outside of the call)."""

    def __init__(self, variable: ContextVar[Any], before: Any) -> None:
        super().__init__()
        self.variable, self.before = variable, before


def _constant(tx: Any, value: Any) -> VariableTracker:
    constant: VariableTracker = VariableTracker.build(tx, value)
    return constant


class _Traced:
    """What one attempt at a trace has read and set."""

    def __init__(self) -> None:
        self.read: dict[ContextVar[Any], Any] = {}
        self._set: dict[ContextVar[Any], VariableTracker] = {}

    def call(
        self, tx: Any, variable: ContextVar[Any], name: str, args: list[VariableTracker]
    ) -> VariableTracker | None:
        """What a method of a variable returns; None where that is not known while a call is traced."""
        if name == "set" and len(args) == 1:
            made = _Token(variable, self._set.get(variable, MISSING))
            self._set[variable] = args[0]
            return made
        if name == "reset" and len(args) == 1 and isinstance(token := args[0].realize(), _Token):
            return self._reset(tx, variable, token)
        if name == "get" and len(args) <= 1:
            return self._set[variable] if variable in self._set else self._outside(tx, variable, args)
        return None

    def _reset(self, tx: Any, variable: ContextVar[Any], token: _Token) -> VariableTracker | None:
        if token.variable is not variable:
            return None
        if token.before is MISSING:
            self._set.pop(variable, None)
        else:
            self._set[variable] = token.before
        return _constant(tx, None)

    def _outside(self, tx: Any, variable: ContextVar[Any], args: list[VariableTracker]) -> VariableTracker | None:
        """The value that a variable has outside of the call (rule 2)."""
        value = self.read[variable] = variable.get(MISSING)
        if value is MISSING:
            if args:
                return args[0]
            try:
                value = variable.get()  # its default
            except LookupError:
                return None  # the plain model raises it
        return _constant(tx, value) if isinstance(value, CONSTANTS) else None

    def check(self) -> None:
        """Raise `TorchDynamoException` for a variable that is not reset (rule 3)."""
        if self._set:
            names = ", ".join(f"`{variable.name}`" for variable in self._set)
            raise TorchDynamoException(
                f"the context variable {names} is set and not reset in the same call, so later calls would read it"
            )


@contextlib.contextmanager
def context_values_traced() -> Iterator[Callable[[], ContextValues]]:
    """Context variables have values while a model is traced; yields what tells which were read from outside."""
    attempts: list[tuple[OutputGraph | None, _Traced]] = [(None, _Traced())]
    original = UserDefinedObjectVariable.call_method

    @functools.wraps(original)
    def call_method(self: UserDefinedObjectVariable, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if isinstance(self.value, ContextVar) and not kwargs:
            if attempts[-1][0] is not tx.output:
                attempts.append((tx.output, _Traced()))
            result = attempts[-1][1].call(tx, self.value, name, list(args))
            if result is not None:
                return result
        return original(self, tx, name, args, kwargs)

    UserDefinedObjectVariable.call_method = call_method  # type: ignore[method-assign]
    try:
        yield lambda: ContextValues(tuple(attempts[-1][1].read.items()))
        attempts[-1][1].check()
    finally:
        UserDefinedObjectVariable.call_method = original  # type: ignore[method-assign]
