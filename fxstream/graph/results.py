"""What an operator returns for arguments of given shapes, and its arithmetic, without running it.

An operator runs on fake tensors, and what it returned is remembered by its arguments. Where there is a formula
(`geometry.formulas`) that agreed with torch the first time that an operator had such arguments, the formula is
asked from then on, whatever the sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fxstream.geometry.formulas import FORMULAS, broadcast, work

__all__ = ["Flops", "Shape", "result_of_call", "value_of"]

MOST_RESULTS = 2**14
"""Results of operators that are remembered, by their arguments."""
RESULTS: dict[Any, tuple[Any, int]] = {}
AGREED: dict[Any, torch.dtype | None] = {}
"""The type of the result by the kind of the arguments, where the formula was right; None where it was not."""
SIZED = {f"aten::{name}" for name in ("view", "reshape", "_unsafe_view", "expand")}
"""Operators that are told the size of their result."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape and type of a tensor of the graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size of the elements in bytes."""
        return self.elements * self.dtype.itemsize

    @property
    def has_gradient(self) -> bool:
        """Whether a tensor of this type can have a gradient."""
        return self.dtype.is_floating_point or self.dtype.is_complex


def result_of_call(
    target: torch._ops.OpOverload,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    state: Hashable,
) -> tuple[Any, int]:
    """What an operator returns, with a `Shape` for every tensor, and its multiply-accumulates.

    By its formula, or as torch finds them. `args` have a `Shape` for every tensor and tuples for lists; `state` is
    what else the result depends on.
    """
    formula = _formula(target)
    kind = (state, target, *_kinds(target, args), *kwargs.items())
    dtype = AGREED.get(kind) if formula is not None else None
    if dtype is not None:
        shapes = _shapes_in(args)
        shape = formula(*shapes)
        if shape is not None and min(shape, default=1) > 0:  # else torch may refuse it
            return Shape(shape, dtype), work(target._schema.name, shape, shapes)
    exact = (state, target, args, *kwargs.items())
    if exact not in RESULTS:
        _make_room(RESULTS)
        RESULTS[exact] = _run(target, args, kwargs, device)
    value, macs = RESULTS[exact]
    if formula is not None and kind not in AGREED:
        _make_room(AGREED)
        shapes = _shapes_in(args)
        shape = formula(*shapes)
        agrees = isinstance(value, Shape) and shape == value.shape
        agrees = agrees and work(target._schema.name, shape, shapes) == macs
        AGREED[kind] = value.dtype if agrees else None
    return value, macs


def _make_room(results: dict[Any, Any]) -> None:
    if len(results) >= MOST_RESULTS:
        results.clear()


@functools.cache
def _formula(target: torch._ops.OpOverload) -> Any:
    formula = FORMULAS.get(target._schema.name)
    if formula is not None:
        return None if target._overloadname == "dtype" else formula  # a view as another type
    tensors = [one for one in target._schema.arguments if isinstance(one.type, torch.TensorType)]
    return _of_pointwise if torch.Tag.pointwise in target.tags and tensors else None


def _of_pointwise(*args: Any) -> Any:
    shapes = [one for one in args if isinstance(one, _Dims)]
    return broadcast(*shapes) if shapes else None


class _Dims(tuple[int, ...]):
    """The shape of a tensor among arguments that may be tuples too."""


def _shapes_in(args: Any) -> Any:
    """The arguments with shapes alone in place of tensors."""
    return tuple(
        _Dims(one.shape) if isinstance(one, Shape) else _shapes_in(one) if isinstance(one, tuple) else one
        for one in args
    )


def _kinds(target: torch._ops.OpOverload, args: Any) -> Any:
    """What the type of the result depends on, and whether the formula holds: not the sizes of tensors."""
    if target._schema.name in SIZED and isinstance(args[1], (tuple, list)):
        return args[0].dtype, len(args[0].shape), len(args[1])
    return tuple(
        (one.dtype, len(one.shape))
        if isinstance(one, Shape)
        else _kinds_in(one)
        if isinstance(one, tuple)
        else (type(one), one)
        for one in args
    )


def _kinds_in(args: tuple[Any, ...]) -> Any:
    return tuple((one.dtype, len(one.shape)) if isinstance(one, Shape) else one for one in args)


def _run(target: Any, args: Any, kwargs: Mapping[str, Any], device: torch.device) -> tuple[Any, int]:
    """What an operator returns on fake tensors, and its multiply-accumulates; a FLOP of torch's is half of one."""
    with FakeTensorMode(), torch.no_grad():
        fakes = pytree.tree_map_only(
            Shape, lambda one: torch.empty(one.shape, dtype=one.dtype, device=device), (list(args), dict(kwargs))
        )
        with Flops() as counter:
            result = target(*fakes[0], **fakes[1])
    return value_of(result), counter.flops // 2


class Flops(TorchDispatchMode):
    """Counts FLOPs by torch's formulas. Torch's own counter hooks every module of the process, of all threads."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, formula = kwargs or {}, flop_registry.get(func._overloadpacket)
        result = NotImplemented
        if formula is None and func.namespace == "aten":
            with self:
                result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        self.flops += 0 if formula is None else formula(*args, **kwargs, out_val=result)
        return result


def value_of(value: Any) -> Any:
    """A shape in place of every tensor."""
    if isinstance(value, torch.Tensor):
        return Shape(tuple(value.shape), value.dtype)
    return tuple(map(value_of, value)) if isinstance(value, (list, tuple)) else value
