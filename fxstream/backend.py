"""`torch.compile(model, backend="fxstream", options={"tile": 2048})`: dynamo captures, fxstream streams.

`options` are those of `fxstream.compile`; any other raises `InputError` at the first call. Dynamo splits a program
at what it cannot trace and hands over each part as a graph: every part with an image among its inputs is streamed
by itself, every other part runs as it is. `logging.getLogger("fxstream")` tells the plan of each at level INFO.

Prefer `fxstream.compile` where it can capture the model: it plans the whole network within one memory, where a
graph break is a boundary that is kept whole and each part has the memory to itself; and one capture serves all
sizes, where dynamo traces again at the second size (not with `dynamic=True`). The first call traces twice, by
dynamo and then by fxstream. The backend is for programs that are written around `torch.compile`, for functions
that call several modules, and for models whose control flow depends on values, which dynamo follows and a whole
graph cannot.

The name is an entry point, found where the package is installed. `register` makes it known otherwise; importing
fxstream does so only where dynamo is loaded already, since loading dynamo takes longer than loading fxstream.

NOTE [dynamo's graphs]
1. Parameters and buffers are inputs of the graph, next to the image. They are bound to a module, so that no weight
   is taken for an image. Dynamo marks them; what a convolution takes as its weight is one in any case.
2. They are bound anew at every call, since one graph may serve two modules of a kind, or a replaced parameter.
3. A size that dynamo keeps symbolic is an input too. It is read from the tensor that has it, which leaves the
   graph independent of sizes. Any other number is a constant: another value is captured anew.
4. Nothing is captured while dynamo compiles, under its modes and with its fake tensors, but at the first call.
"""

from __future__ import annotations

import inspect
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from keyword import iskeyword
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback

from fxstream.compiler.compile import compile
from fxstream.errors import CaptureError, InputError
from fxstream.graph.shapes import is_image

__all__ = ["NAME", "BoundGraph", "backend", "register"]

NAME = "fxstream"
OPTIONS = tuple(inspect.signature(compile).parameters)[1:]
CONVOLUTIONS = tuple(getattr(torch, f"conv{kind}{rank}d") for kind in ("", "_transpose") for rank in (1, 2, 3))
PART = re.compile(r"\['?(.+?)'?\]|([^.\[\]]+)")
REGISTRIES = ("_modules", "_parameters", "_buffers")
Compiled = Callable[..., Any]
Path = tuple[str, ...]


def register() -> None:
    """Make the backend known to `torch.compile` by its name; does nothing where it is known."""
    if NAME not in torch.compiler.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(backend, name=NAME)


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Dynamo's graph as a function that streams; what `torch.compile` calls.

    A mistake in the options is raised when that function is called: dynamo would wrap what is raised here.
    """
    bound = BoundGraph(graph_module, example_inputs)
    try:
        streamed = compile(bound, **_checked_options(options or {}, mode))
    except InputError as error:
        return _refusal(error)
    # Dynamo traces each size that it does not keep symbolic: that such a graph is bound to it is no news.
    streamed.pipeline.warned.add("bound")
    run = streamed if bound.has_image else bound
    return lambda *values: run(**bound.bind(values))


def _checked_options(options: Mapping[str, Any], mode: str | None) -> Mapping[str, Any]:
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise InputError(
            f"the backend {NAME!r} has no option {', '.join(map(repr, unknown))}; it has {', '.join(OPTIONS)}"
        )
    if mode is not None:
        raise InputError(f"the backend {NAME!r} has no modes; found mode={mode!r}: give options")
    return options


def _refusal(error: InputError) -> Compiled:
    def refuse(*_: Any) -> Any:
        raise error

    return refuse


class BoundGraph(nn.Module):
    """A graph of dynamo as a module that takes the graph's real inputs; the rest is bound to it (rules 1 to 3).

    Model tensors have the names that they have in the user's module: they are found by `named_parameters`, and in
    messages, once `bind` has been called.
    """

    _traced: fx.GraphModule

    def __init__(self, traced: fx.GraphModule, examples: Sequence[Any]) -> None:
        super().__init__()
        nodes = [node for node in traced.graph.nodes if node.op == "placeholder"]
        paths = _paths(nodes)
        self._tensors = {i: paths[i] for i, node in enumerate(nodes) if _is_model_tensor(node, examples[i])}
        others = [i for i in range(len(nodes)) if i not in self._tensors]
        self._sizes = {i: size for i in others if (size := _size_of(examples[i], others, examples)) is not None}
        self._inputs = {i: _argument(paths[i], nodes[i]) for i in others if i not in self._sizes}
        self._numbers = {i for i in self._inputs if _takes_number(nodes[i])}
        self.has_image = any(isinstance(examples[i], torch.Tensor) and is_image(examples[i]) for i in self._inputs)
        _name_modules(traced.graph)
        traced.recompile()
        self._traced = traced

    def bind(self, values: Sequence[Any]) -> dict[str, Any]:
        """Take the model tensors among all inputs of the graph, the same objects; the real inputs are returned."""
        for i, (*parents, name) in self._tensors.items():
            owner: nn.Module = self
            for parent in parents:
                owner = owner._modules.setdefault(parent, nn.Module())  # type: ignore[assignment]
            registries = owner._parameters, owner._buffers
            kept, left = registries if isinstance(values[i], nn.Parameter) else registries[::-1]
            left.pop(name, None)
            kept[name] = values[i]
        return {name: values[i].item() if i in self._numbers else values[i] for i, name in self._inputs.items()}

    def forward(self, **inputs: Any) -> Any:
        """What the graph returns. While it is captured, its nodes keep the user's lines and module names."""
        values = {i: inputs[name] for i, name in self._inputs.items()}
        values |= {i: operator.attrgetter(".".join(path))(self) for i, path in self._tensors.items()}
        values |= {i: values[source].shape[dim] for i, (source, dim) in self._sizes.items()}
        ordered = [value for _, value in sorted(values.items())]
        if torch.compiler.is_exporting():
            with traceback.preserve_node_meta():
                return _Interpreter(self._traced).run(*ordered)
        return self._traced(*ordered)


class _Interpreter(fx.Interpreter):
    """Runs what is inside `torch.utils.checkpoint` as it stands: a stream has checkpoints of its own.

    An autograd function, which dynamo takes apart, is refused: its operators alone have not its backward.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.autograd_function_apply:
            raise CaptureError(
                "it calls an autograd function of yours: put torch.compiler.disable around the call, which then"
                " runs between two graphs, or use fxstream.compile"
            )
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *inputs = args
            return _Interpreter(body).run(*inputs)
        return super().call_function(target, args, kwargs)


def _is_model_tensor(node: fx.Node, example: Any) -> bool:
    """Whether an input is a module's tensor, a parameter from anywhere, or the weight of a convolution."""
    if not isinstance(example, torch.Tensor):
        return False
    is_weight = any(
        user.target in CONVOLUTIONS and (user.args[1:2] == (node,) or user.kwargs.get("weight") is node)
        for user in node.users
    )
    is_static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    return is_static or is_weight or isinstance(example, nn.Parameter)


def _takes_number(node: fx.Node) -> bool:
    """Make an input that is a number, which dynamo passes as a tensor to take `item` of it, take the number."""
    if not getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False):
        return False
    users = list(node.users)
    if any(user.op != "call_method" or user.target != "item" for user in users):
        return False
    for user in users:
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)
    return True


def _size_of(example: Any, others: Sequence[int], examples: Sequence[Any]) -> tuple[int, int] | None:
    """The input and the dim of it that a symbolic size is of."""
    if not isinstance(example, torch.SymInt):
        return None
    for i in others:
        if isinstance(examples[i], torch.Tensor):
            for dim, size in enumerate(examples[i].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == example.node.expr:
                    return i, dim
    return None


def _user_path(source: str) -> Path:
    """The path of a module or tensor in what the user compiled, from where dynamo found it.

    >>> _user_path("L['self']._modules['layer1']._modules['0']._parameters['weight']")
    ('layer1', '0', 'weight')
    >>> _user_path("L['self'].layer1.0.conv1")
    ('layer1', '0', 'conv1')
    >>> _user_path("L['x']")
    ('x',)
    """
    scope, *parts = (bracketed or plain for bracketed, plain in PART.findall(source))
    path = parts[1:] or parts or [scope]
    return tuple(name for part in path if part not in REGISTRIES for name in part.split("."))


def _paths(inputs: Sequence[fx.Node]) -> list[Path]:
    """A path for each input: the user's, or the name in the graph where that is taken or no name."""
    paths: list[Path] = []
    for node in inputs:
        path = _user_path(node._dynamo_source.name)  # type: ignore[attr-defined]
        taken = any(path[: len(other)] == other[: len(path)] for other in paths)
        if taken or not "_".join(("", *path)).isidentifier():
            path = (node.name,)
        paths.append(path)
    return paths


def _argument(path: Path, node: fx.Node) -> str:
    """The name of a real input as an argument."""
    return path[0] if len(path) == 1 and path[0].isidentifier() and not iskeyword(path[0]) else node.name


def _name_modules(graph: fx.Graph) -> None:
    """Give the nodes the names of the user's modules as `fxstream.compile` knows them."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = {
            key: (".".join(_user_path(name)), kind) for key, (name, kind) in stack.items()
        }


if "torch._dynamo" in sys.modules:
    register()
