"""The table of operator rules: per ATen operator, what a box reads and how it is evaluated on a box.

`rule_of` finds the row of an operator; `register_rule` adds one for an operator of the user's own:

    @fxstream.register_rule("mylib::soft_threshold")
    def _(call):
        return fxstream.rules.pointwise(call)

The families are `pointwise`, `windowed`, `resampled`, `shuffled`, `channelwise`, `classes` (looked up per pixel),
`reduction` (over space, combined from tiles) and `contraction` (sums of products); `map-wide` operators are listed
with the reason why they are not local. An operator without a row is never assumed local.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxstream.rules import (
    channelwise,
    mapwide,
    reductions,
    resampled,
    shuffled,
    windowed,
)
from fxstream.rules import pointwise as _pointwise
from fxstream.rules.access import Average, Border, OutputSpan, Read, Value
from fxstream.rules.patterns import (
    AccessPattern,
    Averaged,
    Bordered,
    Cropped,
    Item,
    Moved,
    Pointwise,
    Reduced,
    Resampled,
    Table,
    Windowed,
)
from fxstream.rules.pointwise import pointwise, random_draw
from fxstream.rules.reasons import NotTileable, Reason, Tileability
from fxstream.rules.rule import Call, OpRule, Rule, RuleTable

__all__ = [
    "AccessPattern",
    "Average",
    "Averaged",
    "Border",
    "Bordered",
    "Call",
    "Cropped",
    "Item",
    "Moved",
    "NotTileable",
    "OpRule",
    "OutputSpan",
    "Pointwise",
    "Read",
    "Reason",
    "Reduced",
    "Resampled",
    "Table",
    "Tileability",
    "Value",
    "Windowed",
    "pointwise",
    "register_rule",
    "rule_of",
    "rules",
    "unregister_rule",
]

_TABLE = RuleTable()
FAMILIES = (
    _pointwise,
    windowed,
    resampled,
    shuffled,
    channelwise,
    reductions,
    mapwide,
)
for _family in FAMILIES:
    _family.add_rules(_TABLE)


def register_rule(operator: str, family: str = "user") -> Callable[[Rule], Rule]:
    """A decorator that adds the rule of an operator ``"namespace::name"``, for all of its overloads.

    The rule gets a `Call`, the operator's arguments with the shapes of its tensors, and returns an
    `AccessPattern`, what a box of the result reads, or a `NotTileable`, the reason why it has none. Raises
    `RuleError` where the operator has a rule already.
    """

    def add(rule: Rule) -> Rule:
        _TABLE.add(operator, family, rule)
        return rule

    return add


def unregister_rule(operator: str) -> None:
    """Take a rule added by `register_rule` out again. Raises `KeyError` where there is none."""
    _TABLE.remove(operator)


def rule_of(target: object) -> OpRule | None:
    """The row for an operator overload, or None.

    Random operators come first (their draw is one for the whole image), then the table, then torch's own
    pointwise tag.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = target._schema.name
    row = _TABLE.get(name)
    if row is not None:
        return row
    if torch.Tag.nondeterministic_seeded in target.tags:
        return OpRule(name, "random", random_draw)
    if _pointwise.is_tagged(target):
        return OpRule(name, "pointwise", pointwise)
    return None


def rules() -> tuple[OpRule, ...]:
    """All rows of the table; operators found by torch's pointwise tag have none."""
    return _TABLE.rows()
