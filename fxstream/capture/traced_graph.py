"""A graph as dynamo hands it over: torch functions, with the model's tensors among its inputs.

NOTE [inputs of the graph]
1. Parameters and buffers are inputs, next to the images. Where a graph is traced from a call of the model, an
   input belongs to the call if its source is an argument; in a part of a program, dynamo marks the model's
   tensors, and what a convolution takes as its weight is one in any case.
2. A size that dynamo keeps as a symbol is an input of its graph. Here it is read from the tensor that has it.
3. Any other number is an input too, if it was seen to change (a counter, an argument). What is computed of numbers
   alone is computed in every call; where it enters an operator on tensors it is a constant: another value is
   captured anew.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg
from torch.utils.checkpoint import checkpoint

from fxstream.capture.input_key import source_name

__all__ = ["GraphInput", "Kind", "TracedGraph", "checkpointed", "hooked", "user_path"]

CONVOLUTIONS = tuple(getattr(torch, f"conv{kind}{rank}d") for kind in ("", "_transpose") for rank in (1, 2, 3))
ARGUMENTS = re.compile(r"L\['(args|kwargs)'\]")
PART = re.compile(r"\['?(.+?)'?\]|([^.\[\]]+)")
REGISTRIES = ("__dict__", "_modules", "_parameters", "_buffers")
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
NUMBERS = (int, float, *SYMBOLS)


class Kind(Enum):
    """What an input of a graph is."""

    ARGUMENT = "a tensor of the call"
    WEIGHT = "a tensor of the model"
    NUMBER = "a number"


@dataclass(frozen=True, slots=True)
class GraphInput:
    """An input of a traced graph: its kind, and its name for the user."""

    kind: Kind
    name: str


class TracedGraph:
    """A graph of dynamo; `module` takes the values of its inputs in order, of which no size is one (`taken`).

    `parameters` are the names of the model's positional parameters, where the graph is that of a call of the
    model; without them it is a part of a program.
    """

    def __init__(self, module: fx.GraphModule, parameters: Sequence[str] | None = None) -> None:
        self.module = module
        self._taken, nodes = _read_sizes(module.graph, parameters is not None)
        self.fake_mode, self.examples = _examples(nodes)
        """For each input a fake tensor of this mode, or a number, as it was when the graph was traced."""
        kinds = [_kind(node, parameters is not None) for node in nodes]
        names = _names(nodes, parameters or ())
        self.inputs = tuple(map(GraphInput, kinds, names))
        self._sources = list(map(_source, nodes))
        self.computes_sizes = _computes_sizes(module.graph)
        """Whether operators get sizes that the model's code computes, and not only sizes as they are."""
        for node in nodes:
            _take_number(node)
        self._placeholders = nodes
        self._numbers = _numbers(module.graph, [nodes[i] for i in self.indices(Kind.NUMBER)])
        _run_in_eager(module)
        _name_modules(module.graph)
        module.recompile()

    def __call__(self, values: Sequence[Any]) -> Any:
        """What the graph returns for the values of a call, run as it is."""
        numbers = set(self.indices(Kind.NUMBER))
        return self.module(*(_number(value) if i in numbers else value for i, value in enumerate(values)))

    def taken(self, values: Sequence[Any]) -> list[Any]:
        """Of what dynamo's code has for the graph, the values of its inputs."""
        return [values[i] for i in self._taken]

    def indices(self, kind: Kind) -> list[int]:
        """The inputs of a kind."""
        return [i for i, one in enumerate(self.inputs) if one.kind is kind]

    def tensors_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, torch.Tensor]:
        """By input, the tensors of a call with these arguments."""
        local = {"L": {"args": args, "kwargs": dict(kwargs)}}
        return {i: eval(self._sources[i], local) for i in self.indices(Kind.ARGUMENT)}

    def numbers(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The numbers that enter operators on tensors, each with its type."""
        computed = self._computed(values)
        numbers = (computed[node] for node in computed if any(user not in computed for user in _readers(node)))
        return tuple((type(number), number) for number in numbers)

    def with_numbers(self, outputs: Sequence[Any], values: Sequence[Any]) -> Sequence[Any]:
        """The outputs of the graph, those that are computed of numbers alone as they are in this call."""
        returned: Any = self.module.graph.output_node().args[0]
        if not any(node in self._numbers for node in returned if isinstance(node, fx.Node)):
            return outputs
        computed = self._computed(values)
        pairs = zip(returned, outputs, strict=True)
        return [computed.get(node, output) if isinstance(node, fx.Node) else output for node, output in pairs]

    def _computed(self, values: Sequence[Any]) -> dict[fx.Node, Any]:
        """What is computed of numbers alone, for the values of a call."""
        computed: dict[fx.Node, Any] = {}
        places = {self._placeholders[i]: i for i in self.indices(Kind.NUMBER)}
        for node in self._numbers:
            if node in places:
                computed[node] = _number(values[places[node]])
            else:
                args, kwargs = map_arg((node.args, dict(node.kwargs)), computed.__getitem__)
                computed[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return computed

    def values_at(self, values: Sequence[Any], shapes: Mapping[int, Sequence[int]]) -> list[Any]:
        """Fake tensors like the values of a call, those of the call with other shapes."""
        with self.fake_mode:
            fakes = [_fake_like(value, shapes.get(i)) for i, value in enumerate(values)]
        for i in self.indices(Kind.NUMBER):
            fakes[i] = _number(values[i])
        return fakes


def _example(node: fx.Node) -> Any:
    return node.meta["example_value"]


def _number(value: Any) -> Any:
    """The number that a value is; of a symbolic one the number that it was traced with."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return value.node.hint if isinstance(value, SYMBOLS) else value


def _numbers(graph: fx.Graph, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The inputs that are numbers, and what is computed of them alone, in order."""
    numbers = dict.fromkeys(inputs)
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op != "call_function" or not sources or any(source not in numbers for source in sources):
            continue
        if isinstance(node.meta.get("example_value"), NUMBERS) or _is_returned_number(node):
            numbers[node] = None
    return list(numbers)


def _is_returned_number(node: fx.Node) -> bool:
    """Whether a number becomes a tensor only in order to be returned."""
    return node.target is torch.scalar_tensor and all(user.op == "output" for user in node.users)


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.op != "output"]


def _fake_like(value: Any, shape: Sequence[int] | None) -> Any:
    """A tensor without memory; one that holds fewer elements than it shows becomes contiguous."""
    if not isinstance(value, torch.Tensor):
        return value
    options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    if shape is not None or 0 in value.stride() or value.layout != torch.strided:
        fake = torch.empty(tuple(value.shape if shape is None else shape), **options)
        if shape is not None and value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
            fake = fake.to(memory_format=torch.channels_last)
    else:
        fake = torch.empty_strided(value.shape, value.stride(), **options)
    return fake.requires_grad_(value.requires_grad)


def _kind(node: fx.Node, is_call: bool) -> Kind:
    example = _example(node)
    if not isinstance(example, torch.Tensor) or _is_number(node):
        return Kind.NUMBER
    if is_call:
        return Kind.ARGUMENT if ARGUMENTS.match(_source(node)) else Kind.WEIGHT
    is_weight = any(
        user.target in CONVOLUTIONS and (user.args[1:2] == (node,) or user.kwargs.get("weight") is node)
        for user in node.users
    )
    is_static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    is_parameter = isinstance(example, nn.Parameter) or getattr(example, "_is_param", False)
    return Kind.WEIGHT if is_static or is_weight or is_parameter else Kind.ARGUMENT


def _source(node: fx.Node) -> str:
    """Where dynamo found an input, as an expression of the traced function's locals."""
    return source_name(node._dynamo_source)  # type: ignore[attr-defined]


def _is_number(node: fx.Node) -> bool:
    """Whether an input is a number, which dynamo passes as a tensor to take `item` of it."""
    example = _example(node)
    is_scalar = isinstance(example, torch.Tensor) and example.ndim == 0 and "tensor_dict" not in node.meta
    return is_scalar and all(user.op == "call_method" and user.target == "item" for user in node.users)


def _take_number(node: fx.Node) -> None:
    """Make an input that is a number take the number."""
    for user in list(node.users) if _is_number(node) else ():
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)


def _read_sizes(graph: fx.Graph, is_call: bool) -> tuple[list[int], list[fx.Node]]:
    """Read the inputs of a graph that are sizes from the tensors that have them, in place.

    Returns the other inputs, and their indices.
    """
    inputs = graph.find_nodes(op="placeholder")
    images = [node for node in inputs if _kind(node, is_call) is Kind.ARGUMENT]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    taken = []
    for i, node in enumerate(inputs):
        size = _size_of(_example(node), images)
        if size is None:
            taken.append(i)
            continue
        with graph.inserting_before(first):
            read = graph.call_method("size", size)
        read.meta = {"example_value": _example(node)}
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op != "placeholder" and _is_symbol(node) and not node.users:
            graph.erase_node(node)
    return taken, [inputs[i] for i in taken]


def _size_of(example: Any, images: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """The image and the dim of it that a size is of."""
    if not isinstance(example, torch.SymInt):
        return None
    for node in images:
        for dim, size in enumerate(_example(node).shape):
            if isinstance(size, torch.SymInt) and size.node.expr == example.node.expr:
                return node, dim
    return None


def _computes_sizes(graph: fx.Graph) -> bool:
    return any(node.op == "call_function" and _is_symbol(node) for node in graph.nodes)


def _is_symbol(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), SYMBOLS)


def _examples(inputs: Sequence[fx.Node]) -> tuple[FakeTensorMode, list[Any]]:
    """The examples of inputs, and the mode of them; with the sizes that they had where these were symbols."""
    examples = [_example(node) for node in inputs]
    tensors = [one for one in examples if isinstance(one, FakeTensor)]
    symbols = (size for tensor in tensors for size in tensor.shape if isinstance(size, torch.SymInt))
    mode = tensors[0].fake_mode if tensors else FakeTensorMode(allow_non_fake_inputs=True)
    if next(symbols, None) is None:
        return mode, examples
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return mode, [_example(node) if _is_number(node) else _without_symbols(_example(node)) for node in inputs]


def _without_symbols(tensor: Any) -> Any:
    """A fake tensor like one, with the sizes that its symbols had; anything else as it is."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    shape, stride = ([_number(size) for size in sizes] for sizes in (tensor.shape, tensor.stride()))
    like = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
    return like.requires_grad_(tensor.requires_grad)


def user_path(source: str) -> tuple[str, ...]:
    """The path of a module or tensor in the user's model, from where dynamo found it.

    >>> user_path("L['model'].__dict__['_modules']['layer1']._modules['0']._parameters['weight']")
    ('layer1', '0', 'weight')
    >>> user_path("L['self'].layer1.0.conv1")
    ('layer1', '0', 'conv1')
    >>> user_path("L['x']")
    ('x',)
    """
    scope, *parts = (bracketed or plain for bracketed, plain in PART.findall(source))
    path = parts[1:] or parts or [scope]
    return tuple(name for part in path if part not in REGISTRIES for name in part.split("."))


def _names(inputs: Sequence[fx.Node], parameters: Sequence[str]) -> list[str]:
    """A name for each input: the user's path, or the name in the graph where that is taken."""
    names: list[str] = []
    for node in inputs:
        source = _source(node)
        first, *rest = user_path(source)
        if source.startswith("L['args'][") and int(first) < len(parameters):
            first = parameters[int(first)]
        name = ".".join((first, *rest))
        names.append(node.name if name in names else name)
    return names


def checkpointed(body: fx.GraphModule, *inputs: Any, **_: Any) -> Any:
    """A part of the model under `torch.utils.checkpoint`; dynamo's operator for it would draw anew."""
    return checkpoint(body, *inputs, use_reentrant=False)


def hooked(tensor: torch.Tensor, body: fx.GraphModule) -> torch.Tensor:
    """A tensor whose gradient goes through a hook of the user; dynamo's operator for it would drop the hook."""

    def hook(gradient: torch.Tensor) -> Any:
        result = body(gradient)
        return result[0] if isinstance(result, (list, tuple)) else result

    if tensor.requires_grad:
        tensor.register_hook(hook)
    return tensor


def _run_in_eager(module: fx.GraphModule) -> None:
    """Replace what only a compiler of dynamo's graph gives its meaning, in place.

    A power is a call, for FX writes that of a negative number as ``-1 ** x``, which Python reads as ``-(1 ** x)``.
    """
    operators: dict[Any, Any] = {torch.ops.higher_order.tag_activation_checkpoint: checkpointed, operator.pow: pow}
    if hasattr(torch.ops.higher_order, "register_hook"):
        operators[torch.ops.higher_order.register_hook] = hooked
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            node.target = operators.get(node.target, node.target)
        if isinstance(part, fx.GraphModule):
            part.recompile()


def _name_modules(graph: fx.Graph) -> None:
    """Give the nodes the paths of the user's modules."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        named = {key: (".".join(user_path(name)), kind) for key, (name, kind) in stack.items()}
        node.meta["nn_module_stack"] = {
            key: ("" if path == "model" else path, kind) for key, (path, kind) in named.items()
        }
