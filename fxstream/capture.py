"""From any `nn.Module` to one functional ATen FX graph that holds for every image and batch size.

The graph is the static, non-strict `torch.export` of the model on fake tensors, in its lifted form:
parameters, buffers and constants are placeholders next to the inputs, so the graph owns no tensor and always
runs on the model's own, whatever object they are at that moment. In-place operators are removed
(`functional`), constants that depend on the size are replaced by size arithmetic (`sizes`).

NOTE [size independence]
1. The first capture is at the size of the call, so that it is right for this call whatever happens next.
2. A second capture, at another batch size and at spatial sizes of other residues, shows what moves.
3. Only if something moves, a third capture confirms the explanation.
4. Where no other size can be captured, or something moves without explanation, the capture is `bound`: it
   serves this size only, and another size is captured anew.

The limit: a branch on the size that none of the captured sizes takes is not seen.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError
from fxstream.functional import UNSTREAMED, make_functional, mutated_inputs, remove_dead_nodes
from fxstream.sizes import Shape, explain_sizes, is_library_file, moving_constants

__all__ = ["Captured", "capture", "is_image", "module_path"]

SHIFTS = ((33, 97, 161), (32, 64, 96), (224, 448, 672))
"""Pixels added per axis for another capture, in order of preference: odd first, else multiples of a stride.

They differ by so much that two axes of an image do not have the same size at stride 32 either.
"""


@dataclass(frozen=True, slots=True)
class Captured:
    """A model's graph for one mode, input structure and type.

    `module` takes, in order, the model tensors named in `tensors` (parameters and buffers by their path in
    the model, constants by their name in `constants`) and then the tensor leaves of the call; it returns the
    flat outputs, which `out_spec` puts back into the model's structure.
    """

    module: fx.GraphModule
    tensors: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[str, ...]
    out_spec: pytree.TreeSpec
    bound: bool

    @property
    def graph(self) -> fx.Graph:
        """The captured graph."""
        return self.module.graph

    def model_tensors(self, model: nn.Module) -> list[torch.Tensor]:
        """The model's own parameters and buffers, and the constants, in the order of the graph."""
        found = []
        for path in self.tensors:
            constant = self.constants.get(path)
            found.append(operator.attrgetter(path)(model) if constant is None else constant)
        return found


def is_image(tensor: torch.Tensor | Shape) -> bool:
    """Whether an input has stream axes: batch, channels, and at least one spatial dim."""
    return len(tensor.shape) >= 3


def module_path(node: fx.Node) -> str:
    """The user's module that the node belongs to, as in ``layer1.0.conv1``; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0].split("@")[0] if stack else ""


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """The graph of `model` for inputs like these (only their shapes and types are looked at).

    Raises `CaptureError` with the user's line where the model cannot be captured.
    """
    program = _export(model, args, kwargs, None)
    graphs, bound = [_normalised(program)], True
    for shift in SHIFTS:
        try:
            other = _export(model, args, kwargs, shift)
        except CaptureError:
            continue
        bound = not _made_independent(model, args, kwargs, graphs[0], _normalised(other), shift)
        break
    return _captured(program, graphs[0], bound)


def _made_independent(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    graph: fx.Graph,
    second: fx.Graph,
    shift: tuple[int, ...],
) -> bool:
    """Rules 2 and 3 of the NOTE: replace what moves between the captures; False where that fails."""
    moving = moving_constants([graph, second])
    if not moving:
        return moving is not None
    try:
        third = _export(model, args, kwargs, tuple(3 * pixels for pixels in shift))
    except CaptureError:
        return False
    return explain_sizes([graph, second, _normalised(third)])


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    """No autocast, no inference mode, gradients on: the graph must not depend on where it is captured.

    Nothing that capture saves for backward may reach the hooks of a surrounding checkpoint either.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_quiet("torch._subclasses.fake_tensor"))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Nothing from one logger: a capture that fails at another size is an answer, not an error."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger(name)
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], shift: Sequence[int] | None
) -> ExportedProgram:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    largest = max((t for t in tensors if is_image(t)), key=torch.Tensor.numel, default=None)

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        shape = leaf.shape if shift is None or largest is None else _shifted(leaf, largest, shift)
        with mode:
            return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)

    fake_args, fake_kwargs = pytree.tree_map(fake, (tuple(args), dict(kwargs)))
    try:
        with _neutral():
            return torch.export.export(model, fake_args, fake_kwargs, strict=False)
    except Exception as error:
        raise CaptureError(_explanation(model, error)) from error


def _shifted(tensor: torch.Tensor, largest: torch.Tensor, shift: Sequence[int]) -> list[int]:
    """The shape at another size: one more image, and as many more pixels as the resolution asks for."""
    shape = list(tensor.shape)
    if shape and shape[0] == largest.shape[0]:
        shape[0] += 1
    if tensor.ndim == largest.ndim:
        for axis in range(2, len(shape)):
            shape[axis] += shift[axis - 2] * shape[axis] // largest.shape[axis]
    return shape


def _explanation(model: nn.Module, error: Exception) -> str:
    """The user's line and the reason in words."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library_file(frame.filename)]
    place = f" at {own[-1].filename}:{own[-1].lineno} (`{own[-1].line}`)" if own else ""
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
    kind = type(error).__name__
    if "DataDependent" in kind or "GuardOnData" in kind:
        reason = f"control flow depends on the values of a tensor: {reason}"
    return f"{type(model).__name__} cannot run on inputs of these shapes and types{place}: {reason}"


def _normalised(program: ExportedProgram) -> fx.Graph:
    """The program's graph, made functional, in place."""
    graph: fx.Graph = program.graph_module.graph
    names = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    for node in list(graph.nodes):
        if node.op == "placeholder":
            node.meta["fxstream_model_tensor"] = node.name in names
        if node.op == "call_function" and "_assert_tensor_metadata" in str(node.target):
            graph.erase_node(node)
    make_functional(graph)
    remove_dead_nodes(graph)
    for node in graph.nodes:
        if node.op == "call_function" and mutated_inputs(node):
            node.meta.setdefault(UNSTREAMED, "changes a tensor in place")
    graph.lint()
    return graph


def _captured(program: ExportedProgram, graph: fx.Graph, bound: bool) -> Captured:
    """The lifted graph with the roles of its placeholders."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tensors, inputs, constants = [], [], {}
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                graph.erase_node(node)
            else:
                inputs.append(node.name)
        elif not node.users:
            graph.erase_node(node)
        else:
            tensors.append(str(spec.target))
            if spec.kind == InputKind.CONSTANT_TENSOR:
                constants[str(spec.target)] = program.constants[str(spec.target)]
    program.graph_module.recompile()
    out_spec = program.call_spec.out_spec
    return Captured(program.graph_module, tuple(tensors), constants, tuple(inputs), out_spec, bound)
