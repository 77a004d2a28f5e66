"""A call of a model as dynamo traces it: one graph, the code around it, and guards on all that Python looked at.

Nothing runs while a call is traced: images and other tensors of the call are replaced by fake tensors, and what
the model's code does besides computing (counters, stored features, lists that grow) is written down as code, which
then runs in every call, on real tensors. A trace serves another call if its guards hold: they cover every
attribute, list, global and mode that the model's code has read. The one guard that is dropped is that on the
tensors of the call, since a graph shall serve all sizes; `input_key` takes its place.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import math
import operator
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import convert_frame
from torch._dynamo.functional_export import ExportTracerOutput
from torch._dynamo.hooks import Hooks
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from fxstream.capture.constants import ModelValues, constants_folded
from fxstream.capture.first_call import after_first_call
from fxstream.capture.input_key import FakeInputs, SizeGuards, size_guards, source_name
from fxstream.capture.refusals import explained, refuse
from fxstream.capture.traced_graph import TracedGraph
from fxstream.capture.tracing import nodes_limited, tracing, without_modes, without_watchers
from fxstream.errors import GraphBreakError
from fxstream.graph.captured import CUMULATIVE, Results
from fxstream.graph.shapes import fake_tensor_log_silenced
from fxstream.graph.user_code import is_library_file, names_in, names_in_calls

__all__ = ["Trace", "Tracer"]

SIZE_READERS = frozenset({
    "shape", "size", "numel", "nelement", "len", "unbind", "split", "chunk", "tensor_split", "nbytes",
    "untyped_storage", "storage", "hsplit", "vsplit", "dsplit", "split_with_sizes", "tolist", "itemsize",
    "squeeze", "squeeze_",
})  # fmt: skip
"""Names in code that may read a size of a tensor, do as many things as it has rows, or drop dims of one."""
FORMAT_READERS = frozenset({"is_contiguous", "stride", "as_strided", "data_ptr", "suggest_memory_format"})
"""Names in code that may read how a tensor lies in memory."""
UNGUARDED = frozenset({"AUTOGRAD_SAVED_TENSORS_HOOKS"})
"""Guards on what no trace depends on."""
OF_SYMBOLS = frozenset({"SHAPE_ENV"})
"""Guards on symbols, which `SizeGuards` has where sizes are among these."""
MOST_GUARDS = 64
"""Guards on one size beyond which the first trace with symbols ends: a trace with many takes very long."""
PATIENCE = 16
"""Traces at one size each after which one with symbols may take as long as it needs."""
MOST_WITH_SYMBOLS = 8
"""Traces of a model with symbols; a model whose code takes that many paths has others at other sizes."""
_CALLS = threading.local()


def _call(model: Any, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _flat_call(model: Any, args: Any, kwargs: Any) -> Any:
    flat, spec = pytree.tree_flatten(model(*args, **kwargs))
    return ExportTracerOutput(flat, spec)


@dataclass(frozen=True, slots=True)
class Trace:
    """One traced call: its graph, and the code around it.

    `reads_sizes` says that the model's code may have read sizes: another size may take another path, unless
    `sizes` are the guards on them. `reads_formats` says the same of how tensors lie in memory. `graph` is None
    where the call computes nothing with tensors.
    """

    graph: TracedGraph | None
    reads_sizes: bool
    sizes: SizeGuards | None
    reads_formats: bool
    results: Results | None
    _guards: Any
    _code: Callable[..., Any]
    _values: ModelValues

    def holds(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call would be traced the same way, but for the tensors of the call."""
        local = {"model": model, "args": args, "kwargs": dict(kwargs)}
        if self.sizes is not None and not self.sizes.hold(local):
            return False
        with without_modes(), without_watchers():  # under which tensors, and modules, look different
            return bool(self._guards.check(local)) and self._values.hold(model)

    def changed(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The first guard that does not hold for a call."""
        local = {"model": model, "args": args, "kwargs": dict(kwargs)}
        if self.sizes is not None and not self.sizes.hold(local):
            return "a size that its code, or an operator, compares"
        if not self._values.hold(model):
            return "a tensor of the model, or a context variable, whose value its code has asked for"
        return "; ".join(map(str, self._guards.check_verbose(local).verbose_code_parts))

    def run(
        self, compute: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What the model returns; `compute` takes the values of the graph's inputs and returns its outputs."""
        stack = _CALLS.__dict__.setdefault("stack", [])
        stack.append(compute)
        try:
            return self._code(model, args, dict(kwargs))
        finally:
            stack.pop()


def _compute(graph: TracedGraph) -> Callable[..., Any]:
    """What dynamo's code calls for a graph: the computation of the innermost call of this thread."""
    return lambda *values: _CALLS.stack[-1](*graph.taken(values))


class Tracer:
    """Traces calls of one model. What dynamo learns of it (numbers that change) is kept from trace to trace."""

    def __init__(self) -> None:
        self._functions = {function: _copy(function, id(self)) for function in (_call, _flat_call)}
        self._with_symbols, self._without = 0, 0

    def trace(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], flat: bool = False
    ) -> Trace:
        """Trace a call; only shapes and types of its tensors matter. With `flat` the results are known.

        Where the model's code reads sizes, it is traced with symbols for them, first or again; a trace with
        symbols has guards on them, and serves all sizes for which these hold. One thread traces at a time. Raises
        `GraphBreakError` where the model is not one graph, and `CaptureError` where it cannot run on such inputs,
        with the user's line.
        """
        try:
            return self._trace(model, args, kwargs, flat)
        except GraphBreakError as error:
            with after_first_call(model, FakeInputs(args, kwargs).call, str(error)) as has_changed:
                if has_changed:
                    return self._trace(model, args, kwargs, flat)
            raise

    def _trace(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], flat: bool) -> Trace:
        """The same of a model that has been called before, if its first call does more than others."""
        with _tracing(model, args, kwargs, flat):
            may_read_sizes = self._with_symbols > 0 or _names_sizes(model)
            trace = self._traced_with_symbols(model, args, kwargs, flat) if may_read_sizes else None
            if trace is not None:
                return trace
            run = _Run(self._function(flat), model, FakeInputs(args, kwargs), flat)
            if run.reads_sizes and not may_read_sizes:
                trace = self._traced_with_symbols(model, args, kwargs, flat)
            return trace or run.trace()

    def graph(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], most: float = math.inf
    ) -> TracedGraph | None:
        """The graph of a call at its size alone, without what is needed to run it.

        Raises what `trace` raises, and `LongerTraceError` once it has more than so many nodes.
        """
        with _tracing(model, args, kwargs, flat=False), nodes_limited(most):
            return _Run(self._function(flat=False), model, FakeInputs(args, kwargs), flat=False).graph

    def _function(self, flat: bool) -> types.FunctionType:
        return self._functions[_flat_call if flat else _call]

    def _traced_with_symbols(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], flat: bool
    ) -> Trace | None:
        """The trace of a call with symbols for its sizes, where it has one and is worth the time."""
        inputs, function = FakeInputs(args, kwargs, symbols=True), self._function(flat)
        if any(dim > 0 for _, dim, _ in inputs.fixed):  # an axis of one pixel, which is no axis to some operators
            return None
        is_tried = self._without in (0, PATIENCE) and self._with_symbols < MOST_WITH_SYMBOLS
        limit = MOST_GUARDS if self._without == 0 else None
        trace = _traced_with_symbols(function, model, inputs, flat, limit) if is_tried else None
        self._with_symbols += trace is not None
        self._without += trace is None
        return trace


@contextlib.contextmanager
def _tracing(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], flat: bool) -> Iterator[None]:
    """What holds while a call is traced: its errors are explained, and no other thread traces."""
    refuse(model)
    with convert_frame.compile_lock, tracing(model, flat), explained(model, args, kwargs):
        _bind(model, args, kwargs)
        yield


def _traced_with_symbols(
    function: types.FunctionType, model: nn.Module, inputs: FakeInputs, flat: bool, most_guards: int | None
) -> Trace | None:
    """The trace of a call with symbols for its sizes; None where it has blocks, or needs a size as a number."""
    options = {
        "use_duck_shape": False,
        "symbol_guard_limit_before_specialize": most_guards,
    }
    try:
        with _config.patch(options), fake_tensor_log_silenced():  # type: ignore[attr-defined]
            run = _Run(function, model, inputs, flat)
            sizes = None if run.has_blocks else size_guards(run.shapes, inputs)
            return None if sizes is None else run.trace(sizes)
    except Exception:  # whatever dynamo raises where it needs a number
        return None


class _Run:
    """One run of dynamo over a call, before its guards are built."""

    def __init__(self, function: types.FunctionType, model: nn.Module, inputs: FakeInputs, flat: bool) -> None:
        self._function, self._model, self._inputs, self._flat = function, model, inputs, flat
        with constants_folded(model) as values:
            self._output = convert_frame.fullgraph_capture(function, (model, inputs.args, inputs.kwargs))
        self._values = values()
        traced = self._output.backend_input
        self.graph = None if traced is None else TracedGraph(traced.graph_module, _parameters(model))
        self._code = self._output.graph_capture_output.traced_code[1:]
        names = frozenset().union(*map(names_in, self._code))
        self.reads_formats = any(map(_reads_formats, self._code))
        takes_rows = self.graph is not None and _takes_rows(self.graph)
        self.reads_sizes = bool(names & SIZE_READERS) or self.reads_formats or takes_rows

    @property
    def has_blocks(self) -> bool:
        """Whether there are graphs within the graph: what is in a checkpoint, functions with a backward."""
        return self.graph is not None and any(isinstance(m, fx.GraphModule) for m in self.graph.module.children())

    @property
    def shapes(self) -> ShapeEnv:
        """Where dynamo notes what it assumes of sizes."""
        shapes: ShapeEnv = self._output.graph_capture_output.output_graph.shape_env
        return shapes

    def trace(self, sizes: SizeGuards | None = None) -> Trace:
        """The trace, with guards on everything but the tensors of the call, and these on their sizes."""
        function, captured, graph = self._function, self._output.graph_capture_output, self.graph
        dropped = UNGUARDED if sizes is None else UNGUARDED | OF_SYMBOLS
        _drop_guards(captured.output_graph, self._inputs.ids, dropped)
        guards = _held_by_nothing(captured.build_guards(function.__code__, hooks=Hooks()))
        code = (
            (lambda *call: function(*call))
            if graph is None
            else self._output.forward_callable(compiled_fn=_compute(graph), extra_globals=function.__globals__)
        )
        results = _results(captured) if self._flat else None
        return Trace(graph, self.reads_sizes, sizes, self.reads_formats, results, guards, code, self._values)


def _held_by_nothing(built: Any) -> Any:
    """The guards that torch has built, which no longer refers to them.

    Classes and functions that are guarded hold what built them, for as long as they live, to invalidate an entry
    of a cache that guards of ours are not in: with it they would hold every model's graph.
    """
    guards = built.guard_manager
    vars(built).clear()
    return guards


def _copy(function: Any, identity: int) -> types.FunctionType:
    """A function of its own for a tracer: dynamo keeps what it learns per code, and names in its globals."""
    code = function.__code__.replace(co_filename=f"<fxstream {identity}>")
    names = {"pytree": pytree, "ExportTracerOutput": ExportTracerOutput}
    return types.FunctionType(code, {"__builtins__": builtins, "__name__": "fxstream", **names})


def _drop_guards(output_graph: Any, fakes: frozenset[int], dropped: frozenset[str]) -> None:
    """Remove guards of some types, those on tensors of the call, and those on `CUMULATIVE`.

    (A filter of dynamo's does the same once all guards were built, which are then built again.)
    """
    guards, local = output_graph.guards, {"L": output_graph.local_scope}

    def is_kept(guard: Any) -> bool:
        name = source_name(guard.originating_source)
        if guard.create_fn_name() in dropped:
            return False
        if name.startswith(("L['args']", "L['kwargs']")):
            return id(_value(name, local)) not in fakes
        return not (name.endswith(".momentum") and _value(name, local) == CUMULATIVE)

    guards.inner = type(guards.inner)(filter(is_kept, guards.inner))


def _value(name: str, scope: Mapping[str, Any]) -> Any:
    """What a guard is on; None where that does not exist, as in "has no such attribute"."""
    try:
        return eval(name, dict(scope))
    except Exception:  # whatever the model's objects raise
        return None


def _names_sizes(model: nn.Module) -> bool:
    """Whether names in the model's code may read sizes; `len` is mostly that of a list of modules."""
    return not names_in_calls(model).isdisjoint(SIZE_READERS - {"len"})


def _reads_formats(code: types.CodeType) -> bool:
    """Whether code of the user's reads how a tensor lies in memory; torch's modules have a `stride` too."""
    return not is_library_file(code.co_filename) and not FORMAT_READERS.isdisjoint(names_in(code))


def _takes_rows(graph: TracedGraph) -> bool:
    """Whether single entries of a tensor are taken, as a loop over its rows does."""
    return any(
        node.target is operator.getitem
        and isinstance(node.args[1], int)
        and isinstance(node.args[0].meta.get("example_value"), torch.Tensor)
        for node in graph.module.graph.nodes
    )


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise `TypeError` for arguments that the model's forward does not take."""
    signature = _signature(model)
    if signature is not None and not model._forward_pre_hooks:  # which may add arguments
        signature.bind(*args, **kwargs)


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # a callable without a signature
        return None


def _parameters(model: nn.Module) -> list[str]:
    """The names of the positional parameters of a model's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = _signature(model)
    parameters = () if signature is None else signature.parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _results(captured: Any) -> Results:
    metadata = captured.output_graph.export_metadata
    kinds = [metadata.output_return_type[i] for i in range(metadata.out_spec.num_leaves)]
    return Results(tuple(index if kind == "graph_out" else None for kind, index in kinds), metadata.out_spec)
