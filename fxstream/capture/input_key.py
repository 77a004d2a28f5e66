"""The tensors of a call as a trace sees them: stand-ins for them, and what it depends on in them.

Where sizes were symbols while a model was traced, dynamo notes each comparison that its code, or an operator on
shapes, makes of them. Sizes for which all of these come out as in the trace take the same path (`SizeGuards`). A
number of the model that changes is a symbol too.

The key has all but batch and image size. It takes the place of dynamo's guards on these tensors: types, devices,
channels, whether gradients are asked for, and which of them are the same tensor. How they lie in memory matters
only to a model that asks for it (`input_formats`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo import mark_static, maybe_mark_dynamic
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from fxstream.graph.shapes import stream_dims

__all__ = ["FakeInputs", "SizeGuards", "input_formats", "input_key", "size_guards", "source_name"]

NAMES = {"math": math, "torch": torch}
"""What the text of a guard may name, besides the sizes."""
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def input_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of the tensors of a call, and of what autograd does around it."""
    tensors = _tensors(args, kwargs)
    first = {id(tensor): i for i, tensor in reversed(list(enumerate(tensors)))}
    dims = stream_dims([tensor.shape for tensor in tensors])
    keys = (_tensor_key(*pair) for pair in zip(tensors, dims, strict=True))
    return torch.is_inference_mode_enabled(), *((first[id(t)], key) for t, key in zip(tensors, keys, strict=True))


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]


def _tensor_key(tensor: torch.Tensor, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """What a trace depends on in a tensor with these tiled dims: everything but batch and image size."""
    fixed = tuple(size for dim, size in enumerate(tensor.shape) if dim > 0 and dim not in dims)
    return (
        type(tensor),
        tensor.ndim,
        dims,
        fixed,
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        tensor.layout,
        tensor.is_inference(),
    )


def input_formats(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """How the tensors of a call lie in memory: which of torch's formats each has."""
    return tuple(
        tuple(tensor.is_contiguous(memory_format=one) for one in (torch.contiguous_format, FORMATS[tensor.ndim]))
        if tensor.ndim in FORMATS and tensor.layout == torch.strided and 0 not in tensor.stride()
        else tensor.is_contiguous() or 0 in tensor.stride()
        for tensor in tensors
    )


class FakeInputs:
    """Arguments with fake tensors in the place of tensors; `ids` are those of the fake ones.

    A tensor of a class of the user's stays, and with it the guards on its size. With `symbols` the sizes that
    differ from call to call, batch and pixels, are symbols for the trace, but for those of 0 and 1, by which
    operators on shapes do other things: these are `fixed`, as (index of the tensor, dim, size).
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], symbols: bool = False) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fakes: dict[int, torch.Tensor] = {}
        self.args, self.kwargs = pytree.tree_map(self._fake, (args, dict(kwargs)))
        fakes = list(self._fakes.values())
        self.ids = frozenset(map(id, fakes))
        self.fixed: list[tuple[int, int, int]] = []
        index = {id(leaf): i for i, leaf in reversed(list(enumerate(_tensors(self.args, self.kwargs))))}
        for fake, dims in zip(fakes, stream_dims([fake.shape for fake in fakes]), strict=True):
            mark_static(fake)
            for dim in sorted({0, *dims}) if symbols and fake.ndim else ():
                if fake.shape[dim] > 1:
                    fake._dynamo_static_indices.discard(dim)  # type: ignore[attr-defined]
                    maybe_mark_dynamic(fake, dim)
                else:
                    self.fixed.append((index[id(fake)], dim, fake.shape[dim]))

    def call(self, model: nn.Module) -> None:
        """Call the model with them, so that nothing is computed but shapes."""
        with self._mode, torch.no_grad():
            model(*self.args, **self.kwargs)

    def _fake(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, nn.Parameter, FakeTensor) or value.layout != torch.strided:
            return value
        if id(value) not in self._fakes:
            stands_in = 0 in value.stride() and value.numel() > 1
            strides = torch.empty(value.shape, device="meta").stride() if stands_in else value.stride()
            with self._mode:
                fake = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
            self._fakes[id(value)] = fake.requires_grad_(value.requires_grad)
        return self._fakes[id(value)]


@dataclass(frozen=True, slots=True)
class SizeGuards:
    """The comparisons of a trace, as a function of its symbols; the expression of each symbol in the call.

    `fixed` are those of its `FakeInputs`.
    """

    _check: Callable[..., bool]
    _sizes: tuple[Any, ...]
    _fixed: tuple[tuple[int, int, int], ...]

    def hold(self, local: Mapping[str, Any]) -> bool:
        """Whether a call takes the path of the trace; `local` has its `args`, `kwargs` and `model`."""
        tensors = _tensors(local["args"], local["kwargs"])
        if any(tensors[i].shape[dim] != size for i, dim, size in self._fixed):
            return False
        try:
            return self._check(*(eval(size, {"L": local}) for size in self._sizes))
        except ZeroDivisionError:
            return False


def size_guards(shapes: ShapeEnv, inputs: FakeInputs) -> SizeGuards | None:
    """The guards of a trace on its symbols; None where a size is fixed, or one is no part of call or model."""
    conditions = [guard.expr for guard in shapes.guards]
    places = {symbol: _place(shapes, symbol) for symbol in shapes.var_to_sources}
    sizes = {symbol for symbol, place in places.items() if ".size()[" in place}
    symbols = sorted(sizes.union(*(condition.free_symbols for condition in conditions)), key=str)
    names = [places.get(symbol, "") for symbol in symbols]
    fixed = {symbol for symbol, value in shapes.replacements.items() if value.is_Integer}
    if not all(name.startswith("L[") for name in names) or not fixed.isdisjoint(sizes):
        return None
    conditions += [symbol >= 2 for symbol in sizes]
    printed = PythonPrinter().doprint
    text = " and ".join(f"({printed(condition)})" for condition in conditions) or "True"
    check = eval(f"lambda {', '.join(map(str, symbols))}: {text}", dict(NAMES))
    return SizeGuards(check, tuple(compile(name, "<size>", "eval") for name in names), tuple(inputs.fixed))


def _place(shapes: ShapeEnv, symbol: Any) -> str:
    """Where the call or the model has a symbol, as an expression of the traced function's locals; else empty."""
    sources = shapes.var_to_sources[symbol]
    return source_name(sources[0]) if sources else ""


def source_name(source: Any) -> str:
    """Where dynamo has something from, as an expression of the traced function's locals, `L`, and globals, `G`."""
    return source.name if isinstance(source.name, str) else str(source.name())
