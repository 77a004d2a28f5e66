"""From any `nn.Module` to one functional ATen FX graph that holds for every image and batch size.

The graph is the static, non-strict `torch.export` of the model on fake tensors, in its lifted form:
parameters, buffers and constants are placeholders beside the inputs, so the graph owns no tensor and always
runs on the model's tensors, whichever they are at that moment. In-place operators are removed
(`functionalize`), constants that depend on the size are replaced by size arithmetic (`size_symbols`).

NOTE [size independence]
1. The first capture is at the size of the call, so that it is right for this call whatever follows.
2. A second capture, at another batch size and at spatial sizes of other residues, shows which constants differ.
3. Only if some differ, a third capture confirms their explanation.
4. If no other size can be captured, or a difference cannot be explained, the capture is `bound`, that is
   specialised to its size: another size is captured again.
5. A model whose code reads sizes may branch on them: at each new size one more export confirms that path and
   constants are the captured ones (`still_holds`), or else this size gets a capture of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError, InputError
from fxstream.graph.effects import UNSTREAMED, mutated_inputs, remove_dead_nodes, subgraphs, updates_statistics
from fxstream.graph.export import SizeReads, export
from fxstream.graph.functionalize import MODEL_TENSOR, make_factories, make_functional
from fxstream.graph.shapes import Meta, fold_integers, shapes_at
from fxstream.graph.size_symbols import explain_sizes, size_dependent_constants

__all__ = ["Captured", "capture", "still_holds"]

SHIFTS = ((33, 97, 161), (32, 64, 96), (224, 448, 672))
"""Pixels added per axis for the second capture, in order of preference: odd first, then multiples of a stride.

They differ by so much that two axes of an image do not have the same size at stride 32 either.
"""
MODEL_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True, slots=True)
class Captured:
    """A model's graph for one mode, input structure and type.

    `module` takes, in order, the model tensors named in `tensors` (parameters and buffers by their path in
    the model, constants by their name in `constants`) and then the tensors of the call, whose placeholders are
    `inputs`; it returns the flat outputs, which `out_spec` puts back into the model's structure. With `bound` it
    is specialised to its size; with `reads_sizes` the model's code may branch on sizes (rules 4 and 5).
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
        """The nodes of the flat outputs; None for an output that is a constant."""
        (outputs,) = self.graph.output_node().args
        return tuple(output.name if isinstance(output, fx.Node) else None for output in outputs)  # type: ignore[union-attr]

    def model_tensors(self, model: nn.Module) -> list[torch.Tensor]:
        """The parameters and buffers of `model`, and the constants, in the order of the graph."""
        return [
            self.constants[path] if path in self.constants else operator.attrgetter(path)(model)
            for path in self.tensors
        ]


def capture(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """The graph of `model` for inputs like these; only their shapes and types are looked at.

    Raises `CaptureError`, with the user's line, if the model cannot be captured.
    """
    with SizeReads() as reads:
        program = export(model, args, kwargs, None)
    graph = _functional_graph(program)
    independent = _make_independent(model, args, kwargs, program, graph)
    return _captured(program, graph, not independent, reads.by_user)


def _make_independent(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], program: ExportedProgram, graph: fx.Graph
) -> bool:
    """Rules 2 to 4 of the NOTE for the first program and its functional graph; False if it is specialised."""
    for shift in SHIFTS:
        try:
            second = export(model, args, kwargs, shift)
        except CaptureError:
            continue
        if not _same_constants(program.constants, second.constants):
            return False
        graphs = [graph, _functional_graph(second)]
        constants = size_dependent_constants(graphs)
        if not constants:
            return constants is not None
        try:
            third = export(model, args, kwargs, tuple(3 * pixels for pixels in shift))
        except CaptureError:
            return False
        return explain_sizes([*graphs, _functional_graph(third)])
    return False


def _same_constants(constants: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether the tensors that the model makes from numbers have the same values in two captures."""
    return constants.keys() == others.keys() and all(
        type(constants[name]) is type(others[name])
        and (not isinstance(constants[name], torch.Tensor) or torch.equal(constants[name], others[name]))
        for name in constants
    )


def still_holds(
    captured: Captured,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensors: Sequence[torch.Tensor],
) -> bool:
    """Whether the model takes the captured path, with the captured constants, for these inputs too (rule 5).

    Only a model that reads sizes has to be asked; the answer costs one export. Raises `CaptureError` if the
    model itself cannot take the inputs.
    """
    program = export(model, args, kwargs, None)
    graph = _functional_graph(program)
    if not _same_constants({n: program.constants.get(n) for n in captured.constants}, captured.constants):
        return False
    try:
        metas = shapes_at(captured.module, [*captured.model_tensors(model), *tensors]).metas
    except InputError:
        return False
    return _calls(captured.graph, metas) == _calls(graph, {})


def _calls(graph: fx.Graph, metas: Mapping[str, Meta]) -> list[tuple[Any, ...]]:
    """Every operator call with integers folded and inputs named by their index among the calls."""
    names: dict[str, object] = {}
    calls: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        if node.op == "call_function" and not isinstance(metas.get(node.name), int):
            leaves = pytree.tree_leaves(fold_integers(node, metas), is_leaf=lambda x: x is None)
            calls.append((node.target, [names[x.name] if isinstance(x, fx.Node) else x for x in leaves]))
            calls += [("in a subgraph", _calls(inner, {})) for inner in subgraphs(node)]
            names[node.name] = ("call", len(calls))
        else:
            names[node.name] = node.name
    return calls


def _functional_graph(program: ExportedProgram) -> fx.Graph:
    """The graph of the program, made functional in place."""
    graph: fx.Graph = program.graph_module.graph
    specs = program.graph_signature.input_specs
    model_tensors = {spec.arg.name for spec in specs if spec.kind in MODEL_TENSORS}
    for node in list(graph.nodes):
        if node.op == "placeholder":
            node.meta[MODEL_TENSOR] = node.name in model_tensors
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
    """The lifted graph without the placeholders that it does not need, and the roles of the others."""
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    for node in graph.find_nodes(op="placeholder"):
        if not _is_needed(node, specs[node.name]):
            graph.erase_node(node)
    program.graph_module.recompile()
    kept = [specs[node.name] for node in graph.find_nodes(op="placeholder")]
    model_tensors = [spec for spec in kept if spec.kind != InputKind.USER_INPUT]
    constants = [str(spec.target) for spec in model_tensors if spec.kind == InputKind.CONSTANT_TENSOR]
    return Captured(
        program.graph_module,
        tuple(str(spec.target) for spec in model_tensors),
        {name: program.constants[name] for name in constants},
        tuple(spec.arg.name for spec in kept if spec.kind == InputKind.USER_INPUT),
        program.call_spec.out_spec,
        bound,
        reads_sizes,
    )


def _is_needed(node: fx.Node, spec: InputSpec) -> bool:
    """Whether a placeholder stays: every tensor of the call, and the model tensors that are read."""
    if spec.kind == InputKind.USER_INPUT:
        return not isinstance(spec.arg, ConstantArgument)
    return bool(node.users)
