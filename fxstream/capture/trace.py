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
import operator
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import config, convert_frame, mark_static
from torch._dynamo.functional_export import ExportTracerOutput
from torch._dynamo.hooks import Hooks
from torch._dynamo.trace_rules import get_mod_inlinelist
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._dynamo.variables.torch import tracing_state_functions
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, _pop_mode, _push_mode

from fxstream.capture.constants import ModelValues, constants_folded
from fxstream.capture.refusals import explained, refuse
from fxstream.capture.spellings import spellings_traced
from fxstream.capture.traced_graph import TracedGraph
from fxstream.graph.captured import CUMULATIVE, Results
from fxstream.graph.user_code import is_library_file

__all__ = ["FakeInputs", "Trace", "Tracer", "is_capturing", "unwatched"]

SIZE_READERS = frozenset({
    "shape", "size", "numel", "nelement", "len", "unbind", "split", "chunk", "tensor_split", "nbytes",
    "untyped_storage", "storage", "hsplit", "vsplit", "dsplit", "split_with_sizes", "tolist", "itemsize",
})  # fmt: skip
"""Names in code that may read the size of a tensor, or do as many things as a tensor has rows."""
FORMAT_READERS = frozenset({"is_contiguous", "stride", "as_strided", "data_ptr", "suggest_memory_format"})
"""Names in code that may read how a tensor lies in memory."""
OBSERVERS = "torch.ao.quantization"
"""Modules of fake quantisation, which dynamo does not look into of itself."""
UNGUARDED = frozenset({"AUTOGRAD_SAVED_TENSORS_HOOKS"})
"""Guards on what no trace depends on."""
ASKS = (torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling, torch.compiler.is_exporting)
GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_forward_hooks,
)
_CALLS = threading.local()
_CAPTURES = threading.local()


def is_capturing() -> bool:
    """Whether this thread traces a model."""
    return getattr(_CAPTURES, "depth", 0) > 0


def _call(model: Any, args: Any, kwargs: Any) -> Any:
    return model(*args, **kwargs)


def _flat_call(model: Any, args: Any, kwargs: Any) -> Any:
    flat, spec = pytree.tree_flatten(model(*args, **kwargs))
    return ExportTracerOutput(flat, spec)


@dataclass(frozen=True, slots=True)
class Trace:
    """One traced call: its graph, and the code around it.

    `reads_sizes` says that the model's code may have read sizes: another size may take another path;
    `reads_formats` the same of how tensors lie in memory. `graph` is None where the call computes nothing with
    tensors.
    """

    graph: TracedGraph | None
    reads_sizes: bool
    reads_formats: bool
    results: Results | None
    _guards: Any
    _code: Callable[..., Any]
    _values: ModelValues

    def holds(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call would be traced the same way, but for the tensors of the call."""
        local = {"model": model, "args": args, "kwargs": dict(kwargs)}
        with _without_modes(), _without_watchers():  # under which tensors, and modules, look different
            return bool(self._guards.guard_manager.check(local)) and self._values.hold(model)

    def changed(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """The first guard that does not hold for a call."""
        local = {"model": model, "args": args, "kwargs": dict(kwargs)}
        if not self._values.hold(model):
            return "a tensor of the model, or a context variable, whose value its code has asked for"
        return "; ".join(map(str, self._guards.guard_manager.check_verbose(local).verbose_code_parts))

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


def _compute(*values: Any) -> Any:
    """What dynamo's code calls for the graph: the computation of the innermost call of this thread."""
    return _CALLS.stack[-1](*values)


class Tracer:
    """Traces calls of one model. What dynamo learns of it (numbers that change) is kept from trace to trace."""

    def __init__(self) -> None:
        self._functions = {function: _copy(function, id(self)) for function in (_call, _flat_call)}

    def trace(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], flat: bool = False
    ) -> Trace:
        """Trace a call; only shapes and types of its tensors matter. With `flat` the results are known.

        One thread traces at a time. Raises `GraphBreakError` where the model is not one graph, and `CaptureError`
        where it cannot run on such inputs, with the user's line.
        """
        refuse(model)
        function = self._functions[_flat_call if flat else _call]
        fakes = FakeInputs(args, kwargs)
        hooks = Hooks(guard_filter_fn=lambda entries: [_is_guarded(entry, fakes.ids) for entry in entries])
        with convert_frame.compile_lock, _tracing(model, flat), explained(model, args, kwargs):
            _bind(model, args, kwargs)
            with constants_folded(model) as values:
                output = convert_frame.fullgraph_capture(function, (model, fakes.args, fakes.kwargs))
            captured = output.graph_capture_output
            guards = captured.build_guards(function.__code__, hooks=hooks)
        traced = output.backend_input
        graph = None if traced is None else TracedGraph(traced.graph_module, _parameters(model))
        names = frozenset().union(*map(_names, captured.traced_code[1:]))
        reads_sizes = bool(names & SIZE_READERS) or (graph is not None and _takes_rows(graph))
        code = (
            (lambda *call: function(*call))
            if traced is None
            else output.forward_callable(compiled_fn=_compute, extra_globals=function.__globals__)
        )
        reads_formats = any(_reads_formats(code) for code in captured.traced_code[1:])
        return Trace(
            graph, reads_sizes, reads_formats, _results(captured) if flat else None, guards, code, values()
        )


def _copy(function: Any, identity: int) -> types.FunctionType:
    """A function of its own for a tracer: dynamo keeps what it learns per code, and names in its globals."""
    code = function.__code__.replace(co_filename=f"<fxstream {identity}>")
    names = {"pytree": pytree, "ExportTracerOutput": ExportTracerOutput}
    return types.FunctionType(code, {"__builtins__": builtins, "__name__": "fxstream", **names})


class FakeInputs:
    """Arguments with fake tensors in the place of tensors; `ids` are those of the fake ones.

    A tensor of a class of the user's stays, and with it the guards on its size.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._fakes: dict[int, torch.Tensor] = {}
        self.args, self.kwargs = pytree.tree_map(self._fake, (args, dict(kwargs)))
        self.ids = frozenset(map(id, self._fakes.values()))

    def _fake(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, nn.Parameter, FakeTensor) or value.layout != torch.strided:
            return value
        if id(value) not in self._fakes:
            stands_in = 0 in value.stride() and value.numel() > 1
            strides = torch.empty(value.shape, device="meta").stride() if stands_in else value.stride()
            with self._mode:
                fake = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
            mark_static(fake)
            self._fakes[id(value)] = fake.requires_grad_(value.requires_grad)
        return self._fakes[id(value)]


@contextlib.contextmanager
def _tracing(model: nn.Module, flat: bool) -> Iterator[None]:
    options = {
        "allow_unspec_int_on_nn_module": True,
        "skip_nnmodule_hook_guards": False,
        "log_graph_in_out_metadata": flat,
    }
    _CAPTURES.depth = getattr(_CAPTURES, "depth", 0) + 1
    try:
        with (
            config.patch(options),
            _disable_current_modes(),
            get_metrics_context(),
            dynamo_timed("fxstream"),
            torch_function_mode_stack_state_mgr,
            _cumulative_averages(model),
            _as_in_eager(),
            spellings_traced(),
            _looking_into_observers(model),
            _without_watchers(),
        ):
            yield
    finally:
        _CAPTURES.depth -= 1


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    """Without the modes of this thread. (Torch's function for that takes those of other threads too.)"""
    has_modes = torch._C._len_torch_dispatch_stack() > 0
    with torch._C._DisableTorchDispatch() if has_modes else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Without what looks on at operators and calls of modules, as counters do: what runs is not the model's."""
    modes = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    try:
        with _without_watchers():
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


@contextlib.contextmanager
def _without_watchers() -> Iterator[None]:
    """Without the hooks on all modules by which torch itself looks on, as for a count of operations."""
    removed = []
    for hooks in GLOBAL_HOOKS:
        for key, hook in list(hooks.items()) if hooks else ():
            if getattr(hook, "__module__", "").startswith("torch."):
                removed.append((hooks, key, hooks.pop(key)))
    try:
        yield
    finally:
        for hooks, key, hook in removed:
            hooks[key] = hook


@contextlib.contextmanager
def _as_in_eager() -> Iterator[None]:
    """The model's code, which may ask whether it is compiled, is told that it is not."""
    answers = tracing_state_functions()
    before = dict(answers)
    try:
        answers.update({function: False for function in ASKS if function in answers})
        yield
    finally:
        answers.update(before)


@contextlib.contextmanager
def _looking_into_observers(model: nn.Module) -> Iterator[None]:
    """Dynamo traces the code of observers and fake quantisation, where the model has any."""
    has_observers = any(type(m).__module__.startswith(OBSERVERS) for m in model.modules())
    folder = Path(torch.__file__).parent.joinpath(*OBSERVERS.split(".")[1:]).as_posix()
    traced = get_mod_inlinelist()
    added = {folder} - traced if has_observers else set()
    try:
        traced |= added
        yield
    finally:
        traced -= added


@contextlib.contextmanager
def _cumulative_averages(model: nn.Module) -> Iterator[None]:
    """`CUMULATIVE` as the momentum of every BatchNorm that has None.

    With None it would read the number of batches so far, which has no value while a model is traced.
    """
    modules = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is None]
    try:
        for module in modules:
            module.momentum = CUMULATIVE
        yield
    finally:
        for module in modules:
            module.momentum = None


def _is_guarded(entry: Any, fakes: frozenset[int]) -> bool:
    """Whether a guard of dynamo is kept: all but those on tensors of the call, and on `CUMULATIVE`."""
    is_replaced = entry.name.endswith(".momentum") and entry.value == CUMULATIVE
    return id(entry.value) not in fakes and entry.guard_type not in UNGUARDED and not is_replaced


def _names(code: types.CodeType) -> frozenset[str]:
    """The names of attributes and globals in code, and the texts, which may be names too.

    Torch's own code calls `len` for arguments and hooks, not for tensors.
    """
    names = frozenset(code.co_names).union(constant for constant in code.co_consts if isinstance(constant, str))
    return names - {"len"} if is_library_file(code.co_filename) else names


def _reads_formats(code: types.CodeType) -> bool:
    """Whether code of the user's reads how a tensor lies in memory; torch's modules have a `stride` too."""
    return not is_library_file(code.co_filename) and not FORMAT_READERS.isdisjoint(_names(code))


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
