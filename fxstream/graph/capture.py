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
5. A model whose own code reads sizes may still branch on them: at each new size one more export confirms that
   path and constants are the captured ones (`still_holds`), or else this size gets a capture of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError, InputError
from fxstream.graph.export import SizeReads, export
from fxstream.graph.functionalize import (
    UNSTREAMED,
    make_factories,
    make_functional,
    mutated_inputs,
    remove_dead_nodes,
    subgraphs,
    updates_statistics,
)
from fxstream.graph.shapes import Meta, explain_sizes, fold_integers, moving_constants, shapes_at

__all__ = ["Captured", "capture", "module_path", "still_holds"]

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
    reads_sizes: bool

    @property
    def graph(self) -> fx.Graph:
        """The captured graph."""
        return self.module.graph

    @property
    def results(self) -> tuple[str | None, ...]:
        """The nodes that the flat outputs come from; None where one is a constant."""
        (outputs,) = self.graph.output_node().args
        return tuple(given.name if isinstance(given, fx.Node) else None for given in outputs)  # type: ignore[union-attr]

    def model_tensors(self, model: nn.Module) -> list[torch.Tensor]:
        """The model's own parameters and buffers, and the constants, in the order of the graph."""
        found = []
        for path in self.tensors:
            constant = self.constants.get(path)
            found.append(operator.attrgetter(path)(model) if constant is None else constant)
        return found


def module_path(node: fx.Node) -> str:
    """The user's module that the node belongs to, as in ``layer1.0.conv1``; empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0].split("@")[0] if stack else ""


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """The graph of `model` for inputs like these (only their shapes and types are looked at).

    Raises `CaptureError` with the user's line where the model cannot be captured.
    """
    with SizeReads() as reads:
        program = export(model, args, kwargs, None)
    graph, bound = _normalised(program), True
    for shift in SHIFTS:
        try:
            other = export(model, args, kwargs, shift)
        except CaptureError:
            continue
        independent = _made_independent(model, args, kwargs, graph, _normalised(other), shift)
        bound = not (independent and _same_constants(program.constants, other.constants))
        break
    return _captured(program, graph, bound, reads.found)


def _same_constants(known: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the tensors that the model makes from numbers have the same values."""
    return known.keys() == other.keys() and all(
        type(known[name]) is type(other[name])
        and (not isinstance(known[name], torch.Tensor) or torch.equal(known[name], other[name]))
        for name in known
    )


def still_holds(
    captured: Captured,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
) -> bool:
    """Whether the model takes the captured path, with the captured constants, for these inputs too (rule 5).

    Only a model that reads sizes has to be asked; the answer costs one export. Raises `CaptureError` where the
    model itself cannot take the inputs.
    """
    program = export(model, args, kwargs, None)
    fresh = _normalised(program)
    if not _same_constants({n: program.constants.get(n) for n in captured.constants}, captured.constants):
        return False
    try:
        metas = shapes_at(captured.module, [*captured.model_tensors(model), *tensors]).metas
    except InputError:
        return False
    return _calls(captured.graph, metas) == _calls(fresh, {})


def _calls(graph: fx.Graph, metas: Mapping[str, Meta]) -> list[tuple[Any, ...]]:
    """Every operator call with integers folded and inputs named by their place among the calls."""
    names: dict[str, object] = {}
    calls: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "call_function" and not isinstance(metas.get(node.name), int):
            leaves = pytree.tree_leaves(fold_integers(node, metas), is_leaf=lambda x: x is None)
            calls.append((node.target, [names[x.name] if isinstance(x, fx.Node) else x for x in leaves]))
            calls += [("in a subgraph", _calls(graph, {})) for graph in subgraphs(node)]
            names[node.name] = ("call", len(calls))
        else:
            names[node.name] = node.name
    return calls


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
        third = export(model, args, kwargs, tuple(3 * pixels for pixels in shift))
    except CaptureError:
        return False
    return explain_sizes([graph, second, _normalised(third)])


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
    make_factories(graph)
    remove_dead_nodes(graph)
    for node in graph.nodes:
        if node.op == "call_function" and mutated_inputs(node) and not updates_statistics(node):
            node.meta.setdefault(UNSTREAMED, "changes a tensor in place")
    graph.lint()
    return graph


def _captured(program: ExportedProgram, graph: fx.Graph, bound: bool, reads_sizes: bool) -> Captured:
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
    return Captured(program.graph_module, tuple(tensors), constants, tuple(inputs), out_spec, bound, reads_sizes)
