"""From dynamo's graph of torch functions to a functional graph of ATen operators, at one size of its inputs.

NOTE [blocks]
1. A block under `no_grad` or `inference_mode` reads its inputs detached, and so has no gradient.
2. A block under autocast gets the casts that autocast would make (`casts`).
3. What is inside `torch.utils.checkpoint` stands by itself: a stream has checkpoints of its own.
4. An autograd function of the user stays one call (`OpaqueFunction`), and so keeps its backward; so does a hook on
   the gradient of what the model computes (`OpaqueHook`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_innermost_proxy_mode,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

from fxstream.capture.casts import AUTOCAST, write_casts
from fxstream.capture.constants import numpy_entries_copied
from fxstream.capture.functional.functionalize import CHANGED_TO, MODEL_TENSOR, make_factories, make_functional
from fxstream.capture.traced_graph import Kind, TracedGraph, checkpointed, hooked
from fxstream.errors import CaptureError
from fxstream.graph.captured import Captured
from fxstream.graph.effects import UNSTREAMED, mutated_inputs, remove_dead_nodes, returns_storage
from fxstream.graph.shapes import fake_tensor_log_silenced

__all__ = ["OpaqueFunction", "to_aten"]

ENTER_INFERENCE, EXIT_INFERENCE = (
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
)
ENTER_AUTOCAST, EXIT_AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
SET_GRADIENTS = torch._C._set_grad_enabled
READ_DATA = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
"""`.data`, which no trace before dispatch sees."""


def _labelled(name: str, code: str) -> str:
    """A name with a digest of the code, by which the functions of two captures are compared."""
    return f"{name} #{hashlib.sha256(code.encode()).hexdigest()[:8]}"


class OpaqueFunction:
    """An autograd function of the user as dynamo traced it: its forward and its backward, as one function."""

    def __init__(self, name: str, forward: fx.GraphModule, backward: fx.GraphModule, options: Any) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = __name__
        self.forward, self.backward, self._options = forward, backward, options

    def __repr__(self) -> str:
        return _labelled(self.__name__, self.forward.code + self.backward.code)

    @property
    def outputs(self) -> int:
        """How many tensors it returns."""
        returned = self.forward.graph.output_node().args[0]
        return len(returned[0])  # type: ignore[index,arg-type]

    def joint(self, *tensors: Any) -> list[Any]:
        """What it returns for its arguments, then their gradients for the gradients of what it returns."""
        arguments, gradients = tensors[: -self.outputs], tensors[-self.outputs :]
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            results, saved = fx.Interpreter(self.forward).run(*arguments)
            return [*results, *fx.Interpreter(self.backward).run(*gradients, *saved)]

    def __call__(self, *args: Any) -> Any:
        """What the function returns; the flat results as a tuple."""
        return torch.ops.higher_order.autograd_function_apply(self.forward, self.backward, *args, **self._options)


class OpaqueHook:
    """A hook of the user on the gradient of a tensor that the model computes, as a function of that tensor."""

    def __init__(self, name: str, body: fx.GraphModule) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__, self.body = __name__, body

    def __repr__(self) -> str:
        return _labelled(self.__name__, self.body.code)

    def __call__(self, tensor: torch.Tensor) -> Any:
        """The tensor, whose gradient goes through the hook."""
        return hooked(tensor, self.body)


class _Interpreter(fx.Interpreter):
    """Runs dynamo's graph while it is traced, by the rules of the NOTE."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._detached: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._outside: list[Any] = []
        self._autocast: list[tuple[Any, ...]] = []
        self._functions = 0

    def run_node(self, n: fx.Node) -> Any:
        n.meta["custom"] = {**n.meta.get("custom", {}), AUTOCAST: tuple(self._autocast)}
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if self._detached is None or n.op == "output":
            return args, kwargs
        detached: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(self._detach, (args, kwargs))
        return detached

    def _detach(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.requires_grad or self._detached is None:
            return value
        if id(value) not in self._detached:
            self._detached[id(value)] = value, value.detach()
        return self._detached[id(value)][1]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is READ_DATA:
            return args[0].detach()
        if target is SET_GRADIENTS:
            self._set_gradients(args[0])
        elif target is ENTER_INFERENCE:
            self._outside.append(self._detached)
            self._set_gradients(not args[0])
        elif target is EXIT_INFERENCE:
            self._detached = self._outside.pop()
        elif target is ENTER_AUTOCAST:
            device, dtype, enabled, *_ = args
            self._outside.append((device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)))
            self._autocast.append((device, dtype, enabled))
            _set_autocast(*self._autocast[-1])
        elif target is EXIT_AUTOCAST:
            self._autocast.pop()
            _set_autocast(*self._outside.pop())
        else:
            return self._called(target, args, kwargs)
        return None

    def _set_gradients(self, enabled: bool) -> None:
        if not enabled:
            self._detached = {} if self._detached is None else self._detached
        elif torch.is_grad_enabled():
            self._detached = None
        else:
            raise CaptureError("it records gradients (enable_grad) where the call itself does not")

    def _called(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is checkpointed:
            body, *inputs = args
            return self._inner(body, inputs)
        if target is torch.ops.higher_order.autograd_function_apply:
            return self._opaque(args, kwargs)
        if target is hooked:
            return self._hooked(*args)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in ("register_hook", "retain_grad"):
            raise CaptureError(f"{target} on a tensor that the model computes would be lost in a stream")
        return super().call_method(target, args, kwargs)

    def _hooked(self, tensor: torch.Tensor, body: fx.GraphModule) -> Any:
        if not tensor.requires_grad:
            return tensor
        self._functions += 1
        return _as_one_node(OpaqueHook(f"hook_{self._functions}", body), [tensor])

    def _inner(self, body: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        inner = _Interpreter(body)
        inner._detached, inner._autocast = self._detached, list(self._autocast)
        return inner.run(*inputs)

    def _opaque(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """An autograd function of the user, as one node."""
        forward, backward, *inputs = args
        if not torch.is_grad_enabled() or self._detached is not None:
            return self._inner(forward, inputs)
        self._functions += 1
        return _as_one_node(
            OpaqueFunction(f"autograd_function_{self._functions}", forward, backward, options), inputs
        )


def _set_autocast(device: str, dtype: torch.dtype | None, enabled: bool) -> None:
    """Set autocast; the context manager would write itself into the graph that is being traced."""
    torch.set_autocast_enabled(device, enabled)
    if dtype is not None:
        torch.set_autocast_dtype(device, dtype)


def _as_one_node(function: OpaqueFunction | OpaqueHook, inputs: Sequence[Any]) -> Any:
    """The results of a function, which is called by one node of the graph that is being traced."""
    mode = get_innermost_proxy_mode() or get_proxy_mode()
    assert mode is not None
    tracer: Any = mode.tracer
    with _untraced():
        results = function(*inputs)
    proxies = pytree.tree_map(
        lambda value: tracer.unwrap_proxy(value) if isinstance(value, torch.Tensor) else value, tuple(inputs)
    )
    proxy = tracer.create_proxy("call_function", function, proxies, {}, name=function.__name__)
    return track_tensor_tree(results, proxy, constant=None, tracer=tracer)


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """What runs within is not written into the graph."""
    include = torch._C._dispatch_tls_local_include_set().remove(torch._C.DispatchKey.PreDispatch)
    exclude = torch._C._dispatch_tls_local_exclude_set() | torch._C.DispatchKeySet(
        torch._C.DispatchKey.PreDispatch
    )
    with torch._C._ForceDispatchKeyGuard(include, exclude), disable_proxy_modes_tracing():
        yield


def to_aten(traced: TracedGraph, fakes: Sequence[Any], autocast: Sequence[tuple[Any, ...]] = ()) -> Captured:
    """The ATen graph of a traced graph for these values of its inputs: fake tensors, and numbers.

    `autocast` is what is on around the call: device, type and whether it is enabled.

    Raises what the operators raise that refuse such values.
    """
    indices = [i for i, one in enumerate(traced.inputs) if one.kind in (Kind.WEIGHT, Kind.ARGUMENT)]

    def run(*tensors: Any) -> list[Any]:
        values = [*fakes]
        for i, tensor in zip(indices, tensors, strict=True):
            values[i] = tensor
        with traceback.preserve_node_meta():
            results = _Interpreter(traced.module).run(*values)
        return list(results) if isinstance(results, (list, tuple)) else [results]

    # What traces before dispatch is one for all threads.
    with compile_lock, traced.fake_mode, fake_tensor_log_silenced(), _saved_as_they_are(), numpy_entries_copied():
        module = make_fx(run, pre_dispatch=True, tracing_mode="real")(*(fakes[i] for i in indices))
    return _captured(module, traced, indices, autocast)


@contextlib.contextmanager
def _saved_as_they_are() -> Iterator[None]:
    """What a trace saves for backward must not reach the hooks of a checkpoint around the call.

    An operator that saves its own result would hold itself, and all that was computed before, for good, if the
    hook returned the tensor; so it returns a number.
    """
    saved: list[torch.Tensor] = []

    def number(tensor: torch.Tensor) -> int:
        saved.append(tensor)
        return len(saved) - 1

    try:
        with torch.autograd.graph.saved_tensors_hooks(number, saved.__getitem__):
            yield
    finally:
        saved.clear()


def _captured(
    module: fx.GraphModule, traced: TracedGraph, indices: Sequence[int], autocast: Sequence[tuple[Any, ...]]
) -> Captured:
    """The functional graph, with the model's tensors and its constants before the tensors of the call."""
    graph: fx.Graph = module.graph
    placeholders = dict(zip(graph.find_nodes(op="placeholder"), indices, strict=True))
    for node, i in placeholders.items():
        node.meta[MODEL_TENSOR] = traced.inputs[i].kind is Kind.WEIGHT
        node._rename(traced.inputs[i].name.replace(".", "_"))
        node.target = node.name
    is_cast = write_casts(graph, autocast)
    constants = _lifted_constants(module)
    _make_simple(graph)
    places: dict[fx.Node, int | str] = {node: i for node, i in placeholders.items() if _is_needed(node)}
    for node in set(placeholders) - set(places):
        graph.erase_node(node)
    places |= {node: name for name, (node, _) in constants.items()}
    ordered = sorted(places, key=lambda node: node.meta[MODEL_TENSOR] is False)
    for node in reversed(ordered):
        graph._root.append(node)
    graph.lint()
    module.recompile()
    weights = [node for node in ordered if node.meta[MODEL_TENSOR]]
    return Captured(
        module,
        tuple(place if isinstance(place := places[n], str) else traced.inputs[place].name for n in weights),
        tuple(node.name for node in ordered[len(weights) :]),
        tuple(places[node] for node in ordered),
        {name: value for name, (_, value) in constants.items()},
        tuple(i for node, i in placeholders.items() if CHANGED_TO in node.meta),
        is_cast=is_cast,
    )


def _is_needed(node: fx.Node) -> bool:
    """Whether a placeholder stays: every tensor of the call, and the tensors of the model that are read."""
    return bool(node.users) or not node.meta[MODEL_TENSOR]


def _lifted_constants(module: fx.GraphModule) -> dict[str, tuple[fx.Node, torch.Tensor]]:
    """Make the tensors that the graph owns placeholders; their names are those of the attributes."""
    graph, constants = module.graph, {}
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(module, node.target)
        if not isinstance(value, torch.Tensor):
            continue
        if isinstance(value, FakeTensor):
            raise CaptureError(
                "it hides a tensor that it computes from capture, as operators that do not dispatch do"
            )
        name = str(node.target)
        if name not in constants:
            with graph.inserting_before(next(iter(graph.nodes))):
                placeholder = graph.placeholder(f"constant{name}")
            placeholder.meta |= {"val": node.meta.get("val", value), MODEL_TENSOR: True}
            constants[name] = placeholder, value
        node.replace_all_uses_with(constants[name][0])
        graph.erase_node(node)
    return constants


def _make_simple(graph: fx.Graph) -> None:
    """Make the graph functional, in place, and remove what nothing reads."""
    for node in list(graph.nodes):
        if node.op == "call_function" and "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)
    make_functional(graph)
    make_factories(graph)
    remove_dead_nodes(graph)
    for node in graph.nodes:
        if node.op == "call_function" and mutated_inputs(node) and returns_storage(node):
            node.meta.setdefault(UNSTREAMED, "changes a tensor in place")
