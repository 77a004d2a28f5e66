"""What a rule is given and what it answers; the table that holds the rules.

A rule is a function from a `Call` (an operator call, its arguments named by the operator's schema, shapes
known) to an `AccessPattern` (what a box of the result reads and how the operator is evaluated on a box) or a
`NotTileable` (why it cannot be evaluated on a box). Rules see concrete sizes, never tensors, and are asked once
per image size. An operator without a rule is never assumed local.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxstream.errors import RuleError
from fxstream.rules.access import Value
from fxstream.rules.patterns import AccessPattern
from fxstream.rules.reasons import NotTileable

__all__ = ["Answer", "Call", "OpRule", "Rule", "RuleTable"]


@dataclass(frozen=True, slots=True)
class Call:
    """An operator call as a rule sees it.

    `arguments` has every argument of the schema by name, defaults filled in, tensors as `Value`;
    `shapes` are the full shapes of the results (one unless the operator returns several).
    """

    name: str
    target: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (first) result."""
        return self.shapes[0]

    def tensors(self) -> list[tuple[str, int | None, Value]]:
        """All tensor arguments as (argument, index in a list, value), in the order of the schema."""
        tensors: list[tuple[str, int | None, Value]] = []
        for argument, value in self.arguments.items():
            if isinstance(value, Value):
                tensors.append((argument, None, value))
            elif isinstance(value, (list, tuple)):
                tensors += [(argument, i, v) for i, v in enumerate(value) if isinstance(v, Value)]
        return tensors

    def spatial(self) -> list[Value]:
        """The tensor arguments that have tiled dims."""
        return [value for _, _, value in self.tensors() if value.dims]

    def only_spatial(self, argument: str) -> bool:
        """Whether `argument` alone has tiled dims, so that all the others are weights."""
        return all(name == argument for name, _, value in self.tensors() if value.dims)


Answer = AccessPattern | NotTileable
Rule = Callable[[Call], Answer]


@dataclass(frozen=True, slots=True)
class OpRule:
    """One row of the table: the operator (all its overloads), its family and its rule."""

    operator: str
    family: str
    rule: Rule


class RuleTable:
    """The rows by operator name, ``namespace::name``; a second row for an operator is an error."""

    def __init__(self) -> None:
        self._rows: dict[str, OpRule] = {}

    def add(self, operator: str, family: str, rule: Rule) -> OpRule:
        """Add one row. Raises `RuleError` for a name of the wrong form or one that is taken."""
        if operator.count("::") != 1:
            raise RuleError(f"an operator is named 'namespace::name', without overload; found {operator!r}")
        if operator in self._rows:
            raise RuleError(f"{operator} has a rule already, in the family {self._rows[operator].family!r}")
        row = OpRule(operator, family, rule)
        self._rows[operator] = row
        return row

    def remove(self, operator: str) -> None:
        """Take a row out again."""
        del self._rows[operator]

    def get(self, operator: str) -> OpRule | None:
        """The row of an operator, or None."""
        return self._rows.get(operator)

    def rows(self) -> tuple[OpRule, ...]:
        """All rows, sorted by family and name."""
        return tuple(sorted(self._rows.values(), key=lambda row: (row.family, row.operator)))
