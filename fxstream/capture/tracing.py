"""The state of torch and dynamo while a model is traced, and while what is not the model's runs.

Each is a block that leaves everything as it was.

NOTE [spellings]
``torch.jit.isinstance(x, torch.Tensor)``, in code that is scripted too, is traced as `isinstance`;
``ctx.saved_variables``, in autograd functions from before torch 0.4, as ``ctx.saved_tensors``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import config
from torch._dynamo.output_graph import SubgraphTracer
from torch._dynamo.trace_rules import get_mod_inlinelist
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.functions import SkipFunctionVariable
from torch._dynamo.variables.misc import AutogradFunctionContextVariable
from torch._dynamo.variables.torch import tracing_state_functions
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes, _pop_mode, _push_mode

from fxstream.graph.captured import CUMULATIVE

__all__ = [
    "LongerTraceError",
    "is_capturing",
    "nodes_limited",
    "tracing",
    "unwatched",
    "without_modes",
    "without_watchers",
]

OBSERVERS = "torch.ao.quantization"
"""Modules of fake quantisation, which dynamo does not look into of itself."""
ASKS = (torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling, torch.compiler.is_exporting)
GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_forward_hooks,
)
_CAPTURES = threading.local()
call_skipped = SkipFunctionVariable.call_function
node_of_trace = SubgraphTracer.create_node
attribute_of_context = AutogradFunctionContextVariable.var_getattr


def is_capturing() -> bool:
    """Whether this thread traces a model."""
    return getattr(_CAPTURES, "depth", 0) > 0


@contextlib.contextmanager
def tracing(model: nn.Module, flat: bool) -> Iterator[None]:
    """What dynamo needs around it to trace a call of the model as in eager; with `flat` it notes the results."""
    options = {
        "allow_rnn": True,
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
            _spellings_traced(),
            _looking_into_observers(model),
            without_watchers(),
        ):
            yield
    finally:
        _CAPTURES.depth -= 1


class LongerTraceError(Exception):
    """A trace has more nodes than it may have."""


@contextlib.contextmanager
def nodes_limited(most: float) -> Iterator[None]:
    """A trace of dynamo's ends with `LongerTraceError` where its graph gets more than so many nodes."""

    @functools.wraps(node_of_trace)
    def create_node(self: SubgraphTracer, *args: Any, **kwargs: Any) -> fx.Node:
        if len(self.graph.nodes) >= most:
            raise LongerTraceError(f"the trace has more than {most} nodes")
        return node_of_trace(self, *args, **kwargs)

    SubgraphTracer.create_node = create_node  # type: ignore[method-assign]
    try:
        yield
    finally:
        SubgraphTracer.create_node = node_of_trace  # type: ignore[method-assign]


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Without the modes of this thread. (Torch's function for that takes those of other threads too.)"""
    has_modes = torch._C._len_torch_dispatch_stack() > 0
    with torch._C._DisableTorchDispatch() if has_modes else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Without what looks on at operators and calls of modules, as counters do: what runs is not the model's."""
    modes = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    try:
        with without_watchers():
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


@contextlib.contextmanager
def without_watchers() -> Iterator[None]:
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
def _spellings_traced() -> Iterator[None]:
    """Dynamo takes these spellings for those that it traces."""
    SkipFunctionVariable.call_function = _call_function  # type: ignore[method-assign]
    AutogradFunctionContextVariable.var_getattr = _var_getattr  # type: ignore[method-assign]
    try:
        yield
    finally:
        SkipFunctionVariable.call_function = call_skipped  # type: ignore[method-assign]
        AutogradFunctionContextVariable.var_getattr = attribute_of_context  # type: ignore[method-assign]
