"""Values of tensors that depend on no tensor of the call, which Python asks for while a model is traced.

``int(stride.max())``, ``x.permute(*order)``, ``if scale > 1``: dynamo has no value for them. What such a tensor is
made of is computed here, on copies of the model's tensors, and its value is a constant of the trace.

NOTE [constants]
1. Dynamo's graph is replayed up to the place where the value is asked for: all that reads tensors of the model and
   constants alone, writes in place included. A tensor that anything else may write to is no constant; neither is a
   random draw, nor what has more than a few thousand entries.
2. An entry of an array of numpy, ``order[0]``, is a number of its own, though torch's stand-in for numpy makes it
   a view, which changes when the array is written to (`numpy_entries_copied`).
3. An array or a scalar of numpy among the model's attributes, as of ``self.doubles = i >= numpy.log2(factor)``,
   which dynamo makes a tensor, is one of the model's tensors.
4. The trace holds as long as the tensors of the model that were read have the same values (`ModelValues`), and so
   do context variables.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.source import NumpyTensorSource, RandomValueSource
from torch._dynamo.symbolic_convert import InliningInstructionTranslator, InstructionTranslator
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.tensor import TensorVariable
from torch._numpy._ndarray import ndarray
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxstream.capture.context_values import ContextValues, context_values_traced
from fxstream.capture.input_key import source_name

__all__ = ["ModelValues", "constants_folded", "numpy_entries_copied"]

MOST_ENTRIES = 2**14
"""Of a tensor that may be a constant."""
BY_SIZE = frozenset({
    "expand", "flatten", "movedim", "narrow", "permute", "repeat", "repeat_interleave", "reshape", "roll",
    "select", "transpose", "unflatten", "view",
})  # fmt: skip
"""Methods whose arguments are numbers, also where they are given as tensors."""
WRITING = frozenset({
    "setitem", "__setitem__", "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow",
    "irshift", "isub", "itruediv", "ixor", "fill", "put", "sort", "partition", "resize",
})  # fmt: skip
"""Functions that write in place, though their names do not end so; some of them do only in numpy."""
ORIGINAL = re.compile(r"<original (?:wrapped_)?(\w+)>")
RANDOM = ("rand", "drop", "bernoulli", "multinomial", "normal", "poisson", "exponential")
MISSING = object()
"""In place of a value that is not known."""
JUMPS = tuple(name for name in dis.opmap if name.startswith("POP_JUMP") and name.endswith(("TRUE", "FALSE")))


@dataclass(frozen=True, slots=True)
class ModelValues:
    """What a trace has the values of: tensors of the model, by path or as such, arrays, and context variables."""

    tensors: tuple[tuple[str | torch.Tensor, torch.Tensor], ...]
    contexts: ContextValues

    def hold(self, model: nn.Module) -> bool:
        """Whether they have these values now."""
        return self.contexts.hold() and all(_is_equal(_now(model, one), value) for one, value in self.tensors)


def _now(model: nn.Module, one: str | torch.Tensor) -> Any:
    if isinstance(one, torch.Tensor):
        return one
    return _array(model, one) if one.startswith("L[") else _tensors(model).get(one)


def _array(model: nn.Module, name: str) -> torch.Tensor | None:
    """What numpy has for a number or an array of the model, by dynamo's name of it; None for anything else."""
    try:
        value = eval(name, {"L": {"model": model}})
    except Exception:  # whatever the model's objects raise
        return None
    return torch.as_tensor(value) if type(value).__module__ == "numpy" else None


def _is_equal(one: Any, value: torch.Tensor) -> bool:
    is_like = isinstance(one, torch.Tensor) and one.shape == value.shape and one.dtype == value.dtype
    return is_like and torch.equal(one.detach().to(value.device), value)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters())}


class _Replay:
    """The values of the nodes of dynamo's graph that are constants (rule 1)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.read: list[tuple[str | torch.Tensor, torch.Tensor]] = []
        """The tensors of the model that values were made of, or the names of arrays, with copies."""
        self._values: dict[fx.Node, Any] = {}
        self._seen: set[fx.Node] = set()
        self._lost: set[int] = set()
        self._sources: dict[int, set[fx.Node]] = {}
        """By storage, the placeholders that it was made of."""
        self._originals: dict[fx.Node, tuple[str | torch.Tensor, torch.Tensor]] = {}

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a node; None where it is no constant."""
        for one in list(node.graph.nodes):
            if one not in self._seen:
                self._seen.add(one)
                if one.op == "placeholder":
                    self._take(one)
                else:
                    self._replay(one)
        value = self._values.get(node)
        if not isinstance(value, torch.Tensor) or self._is_lost(value):
            return None
        for source in self._sources_of(value):
            if (pair := self._originals.pop(source, None)) is not None:
                self.read.append(pair)
        return value

    def _take(self, node: fx.Node) -> None:
        """A small tensor of the model, or an array of numpy."""
        argument = node.meta.get("grapharg")
        if argument is None or isinstance(argument.source, RandomValueSource):
            return
        one: Any = argument.example
        if argument.pass_arg_as_tensor:  # also a number of Python, which may change
            one = source_name(argument.source.base) if isinstance(argument.source, NumpyTensorSource) else ""
        example = _array(self._model, one) if isinstance(one, str) else one
        if not isinstance(example, torch.Tensor) or isinstance(example, FakeTensor):
            return
        if example.numel() <= MOST_ENTRIES:
            self._values[node] = example.detach().clone()
            self._originals[node] = one, example.detach().clone()
            self._sources[_storage(self._values[node])] = {node}

    def _replay(self, node: fx.Node) -> None:
        """Compute a node where all that it reads is known; else what it may write to is lost."""
        inputs = [self._values.get(one, MISSING) for one in node.all_input_nodes]
        is_value = "example_value" in node.meta or _may_write(node)  # else it sets a mode
        if any(one is MISSING or self._is_lost(one) for one in inputs) or not is_value or _is_random(node):
            self._lose(node, inputs)
            return
        try:
            value = self._values[node] = self._computed(node)
        except Exception:  # it is no constant then, and the plain model raises what there is to raise
            self._lose(node, inputs)
            return
        sources = self._sources_of(inputs)
        for storage in _storages([value, *(inputs if _may_write(node) else ())]):
            self._sources[storage] = self._sources.get(storage, set()) | sources

    def _computed(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._values.__getitem__)
        if node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif node.op == "call_function" and callable(node.target):
            value = node.target(*args, **kwargs)
        else:
            raise TypeError(node.op)
        if any(one.numel() > MOST_ENTRIES for one in pytree.tree_leaves(value) if isinstance(one, torch.Tensor)):
            raise ValueError("too large")
        return value

    def _lose(self, node: fx.Node, inputs: Sequence[Any]) -> None:
        if _may_write(node):
            self._lost |= _storages([one for one in inputs if one is not MISSING])

    def _is_lost(self, value: Any) -> bool:
        return not self._lost.isdisjoint(_storages(value))

    def _sources_of(self, value: Any) -> set[fx.Node]:
        return {source for storage in _storages(value) for source in self._sources.get(storage, ())}


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _storages(value: Any) -> set[int]:
    leaves = pytree.tree_leaves(value)
    return {_storage(one) for one in leaves if isinstance(one, torch.Tensor)}


def _name(node: fx.Node) -> str:
    """The name of what a node calls, that of numpy's function for one that dynamo wrapped."""
    name = str(getattr(node.target, "__name__", node.target)).removeprefix("wrapped_")
    wrapped = ORIGINAL.search(name)
    return wrapped.group(1) if wrapped else name


def _is_random(node: fx.Node) -> bool:
    return any(word in _name(node) for word in RANDOM)


def _may_write(node: fx.Node) -> bool:
    """Whether a node writes in place, as far as its name says; a block of its own may."""
    name, is_block = _name(node), isinstance(node.target, torch._ops.HigherOrderOperator)
    is_named = name in WRITING or (name.endswith("_") and not name.endswith("__"))
    return bool(node.all_input_nodes) and (is_named or "out" in node.kwargs or is_block)


@contextlib.contextmanager
def numpy_entries_copied() -> Iterator[None]:
    """Rule 2, while a graph is traced or its operators are written down."""
    original = ndarray.__getitem__

    def entry(self: ndarray, index: Any) -> Any:
        result = original(self, index)
        parts = index if isinstance(index, tuple) else (index,)
        is_view = result.ndim or any(part is Ellipsis for part in parts)
        return result if is_view else ndarray(result.tensor.clone())

    ndarray.__getitem__ = entry  # type: ignore[method-assign]
    try:
        yield
    finally:
        ndarray.__getitem__ = original  # type: ignore[method-assign]


Folded = Callable[[TensorVariable], torch.Tensor | None]


@contextlib.contextmanager
def constants_folded(model: nn.Module) -> Iterator[Callable[[], ModelValues]]:
    """Python gets values of constants while a model is traced; yields what tells which were read so far."""
    replays: dict[fx.Graph, _Replay] = {}

    def folded(variable: TensorVariable) -> torch.Tensor | None:
        node = variable.as_proxy().node
        with _disable_current_modes(), torch.no_grad():
            return replays.setdefault(node.graph, _Replay(model)).value(node)

    def values() -> ModelValues:
        names = {id(tensor): name for name, tensor in _tensors(model).items()}
        read = [pair for replay in replays.values() for pair in replay.read]
        return ModelValues(tuple((names.get(id(one), one), value) for one, value in read), contexts())

    methods, tables = _methods(folded), [InstructionTranslator.dispatch_table]
    tables.append(InliningInstructionTranslator.dispatch_table)
    before = {name: getattr(TensorVariable, name) for name in methods}, [list(table) for table in tables]
    try:
        for name, method in methods.items():
            setattr(TensorVariable, name, method)
        for table in tables:
            for name in JUMPS:
                table[dis.opmap[name]] = _jump(folded, table[dis.opmap[name]])
        with numpy_entries_copied(), context_values_traced() as contexts:
            yield values
    finally:
        for name, method in before[0].items():
            setattr(TensorVariable, name, method)
        for table, entries in zip(tables, before[1], strict=True):
            table[:] = entries


def _methods(folded: Folded) -> dict[str, Callable[..., Any]]:
    """Methods of dynamo's tensors that ask for a value, and answer with a constant where there is one."""

    def answering(name: str, convert: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
        original = getattr(TensorVariable, name)

        @functools.wraps(original)
        def method(self: TensorVariable, tx: Any, *args: Any, **kwargs: Any) -> Any:
            value = folded(self)
            if value is None or (value.numel() != 1 and convert is not torch.Tensor.tolist):
                return original(self, tx, *args, **kwargs)
            return VariableTracker.build(tx, convert(value))

        return method

    original = TensorVariable.call_method

    @functools.wraps(original)
    def call_method(self: TensorVariable, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        numbers = [_as_number(tx, one, folded) for one in args] if name in BY_SIZE else args
        return original(self, tx, name, numbers, kwargs)

    conversions: dict[str, Callable[[torch.Tensor], Any]] = {
        "method_item": torch.Tensor.item,
        "method_tolist": torch.Tensor.tolist,
    }
    conversions |= {"nb_int_impl": int, "nb_index_impl": operator.index, "nb_float_impl": float}
    # Before torch 2.13 a conversion asks for the item.
    existing = {name: one for name, one in conversions.items() if hasattr(TensorVariable, name)}
    return {**{name: answering(name, one) for name, one in existing.items()}, "call_method": call_method}


def _as_number(tx: Any, variable: Any, folded: Folded) -> Any:
    """A constant tensor of one whole number as that number; anything else as it is."""
    value = folded(variable) if isinstance(variable, TensorVariable) else None
    is_number = value is not None and value.ndim == 0 and not (value.is_floating_point() or value.is_complex())
    return VariableTracker.build(tx, int(value)) if value is not None and is_number else variable


def _jump(folded: Folded, original: Any) -> Callable[..., None]:
    """A jump that depends on the value of a tensor, taken where that is a constant."""

    def jump(self: Any, instruction: Any) -> None:
        condition = self.stack[-1].realize()
        if isinstance(condition, TensorVariable):
            value = folded(condition)
            if value is not None and value.numel() == 1:
                self.stack[-1] = VariableTracker.build(self, bool(value))
        original(self, instruction)

    return jump
