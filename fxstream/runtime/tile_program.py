"""The FX program of a tile class: what one tile of a segment computes, with crops and pads as nodes.

Tiles whose steps agree along every axis share a program. It takes the tile's crop of every spatial input, the
whole inputs, and what it looks up in tables, and returns the tile's rectangle of every output, its partial result
of a reduction. It is an ordinary `fx.GraphModule`: it can be printed, linted, and compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxstream.errors import StreamError
from fxstream.graph.autograd_saves import in_place_variant
from fxstream.graph.nodes import attributes_of, bind_to, call_with, trace_of
from fxstream.graph.typed_graph import TypedGraph, TypedNode
from fxstream.lowering.whole import Whole, result_of, runs_whole
from fxstream.machine.kernels.volumes import VOLUME_CONVOLUTION
from fxstream.rules import Border, Read, Table
from fxstream.tiling.axes.bounds import AxisStep, AxisTile, Crop, CropPad, lookups
from fxstream.tiling.own_padding import own_padding
from fxstream.tiling.reuse import uncomputed_convolution
from fxstream.tiling.segment import Segment

__all__ = [
    "TILED",
    "Compiler",
    "Program",
    "TileProgram",
    "constants_of",
    "crop",
    "tile_program",
    "whole_in_segment",
    "whole_program",
]

aten = torch.ops.aten
Program = Callable[..., tuple[torch.Tensor, ...]]
Compiler = Callable[[Any], Program]
"""Makes a program of an `fx.GraphModule`."""
TILED = "tiled"
"""Key of the metadata of a program: the tiled dims of its first inputs, the boxes."""
OF_PATTERNS = ("replaced", "target", "arguments", "index", "size", "kept")
"""What access patterns write into programs besides what a tile is."""


@dataclass(frozen=True, slots=True)
class TileProgram:
    """The program of a tile class, an `fx.GraphModule`, or that compiled.

    `recomputation` is what runs again for its backward, often the same.
    """

    forward: Program
    recomputation: Program

    def run(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results of a tile; not as a call of a module, whose hooks are about the user's modules."""
        return _without_hooks(self.forward)(*tensors)

    def run_again(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results for a backward, some of them without values."""
        return _without_hooks(self.recomputation)(*tensors)

    def through(self, compiler: Compiler) -> TileProgram:
        """The same program, compiled when it first runs."""
        forward = compiler(self.forward)
        same = self.recomputation is self.forward
        return TileProgram(forward, forward if same else compiler(self.recomputation))


def _without_hooks(program: Program) -> Program:
    return program.forward if isinstance(program, fx.GraphModule) else program


def tile_program(segment: Segment, tiles: Sequence[AxisTile]) -> TileProgram:
    """The program of the class that `tiles` (one per axis) belongs to."""
    writer = _Writer(segment, tiles)
    for index, name in enumerate(segment.nodes):
        steps = [step for tile in tiles if (step := tile.steps[index]) is not None]
        if len(steps) == len(tiles):
            writer.add(segment.graph[name], steps)
    results = [writer.result(name, [tile.crops[i] for tile in tiles]) for i, name in enumerate(segment.outputs)]
    writer.graph.output(tuple(results))
    writer.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return _finished(segment, writer.graph, {n: name for n, name in writer.origin.items() if n.users})


def whole_program(segment: Segment) -> TileProgram:
    """The program of a segment that runs whole: its operators as they are, with all integers folded.

    Normalisations that were taken apart are the model's own operators again.
    """
    graph, wholes = fx.Graph(), runs_whole(segment.graph, segment.nodes)
    inside = {name for whole in wholes.values() for name in whole.inside}
    env = {name: graph.placeholder(name) for name in segment.inputs}
    for typed in segment.graph.nodes.values():
        if typed.is_attribute:
            env[typed.name] = graph.create_node("get_attr", typed.node.target)
    for name in segment.nodes:
        node = segment.graph[name].node
        if name in wholes:
            whole_in_segment(wholes[name], segment.outputs, graph, env, segment.graph, name)
        elif name not in inside:
            args, kwargs = segment.graph.arguments(node)
            arguments = map_arg((args, kwargs), lambda n: env[n.name])
            env[name] = graph.create_node(node.op, node.target, *arguments)
            env[name].meta = trace_of(node)
    graph.output(tuple(env[name] for name in segment.outputs))
    return _finished(segment, graph, {env[name]: name for name in segment.nodes if name in env})


def whole_in_segment(
    whole: Whole,
    outputs: Collection[str],
    graph: fx.Graph,
    env: dict[str, fx.Node],
    typed: TypedGraph,
    name: str,
) -> None:
    """Write a normalisation, whose moments are `name`, as the model has it, and these if they are an output."""
    if name in outputs:
        env[whole.result], env[name] = whole.write_with_statistics(graph, env, typed)
    else:
        env[whole.result] = whole.write(graph, env, running_mean=None, running_var=None)


def _finished(segment: Segment, graph: fx.Graph, origin: Mapping[fx.Node, str]) -> TileProgram:
    """The program and its recomputation; `origin` names the operator of the segment that each call evaluates."""
    for node, name in origin.items():
        typed, source = segment.graph[name], node.args[0] if node.args else None
        # A pad or crop may do nothing on this tile: then the operator reads what its producer made.
        is_direct = isinstance(source, fx.Node) and origin.get(source) in typed.inputs and len(source.users) == 1
        if typed.reuses and is_direct:
            node.target = in_place_variant(node.target) or node.target
        elif typed.halves and node.target is aten.conv3d.default:
            node.target = VOLUME_CONVOLUTION
    graph.lint()
    attributes = attributes_of(graph, segment.graph.graph.owning_module)
    program = fx.GraphModule(attributes, graph, f"{segment.name}_tile")
    program.meta[TILED] = tuple(dims for _, dims in segment.spatial)
    skipped = {node.name for node, name in origin.items() if segment.graph[name].skips}
    if not skipped:
        return TileProgram(program, program)
    again = fx.Graph()
    again.output(again.graph_copy(graph, {}))
    for node in again.nodes:
        if node.name in skipped:
            node.target = uncomputed_convolution
    recomputation = fx.GraphModule(attributes, again, f"{segment.name}_tile")
    recomputation.meta |= program.meta
    return TileProgram(program, recomputation)


class _Writer:
    """The graph under construction; `env` maps a node of the segment to its value on the tile."""

    def __init__(self, segment: Segment, tiles: Sequence[AxisTile]) -> None:
        self.graph = fx.Graph()
        self.origin: dict[fx.Node, str] = {}
        """The operator of the segment that each call evaluates."""
        self._segment = segment
        self._shared: dict[tuple[object, ...], fx.Node] = {}
        self._env = {name: self.graph.placeholder(f"{name}_tile") for name, _ in segment.spatial}
        self._whole = {name: self.graph.placeholder(name) for name in segment.whole}
        self._tables = {
            (name, axis): [self.graph.placeholder(f"{name}_{part}_{axis}") for part in lookup.parts]
            for (name, axis), lookup in lookups(segment, tiles).items()
        }

    def add(self, node: TypedNode, steps: Sequence[AxisStep]) -> None:
        """The call of one node on its crops and pads, cropped to the box that the tile holds."""
        pattern, before = node.pattern, len(self.graph.nodes)
        pads = [own_padding(node, axis, step) for axis, step in enumerate(steps)]
        inputs = []
        for i, read in enumerate(pattern.reads):
            reads = [CropPad(s.reads[i].crop, 0, 0) if p else s.reads[i] for s, p in zip(steps, pads, strict=True)]
            inputs.append(self._serve(pattern.fill, read, reads))
        call = _Call(
            self.graph,
            node,
            self._segment,
            inputs,
            self._whole,
            [step.result.full for step in steps],
            [step.counts for step in steps],
            [self._tables.get((node.name, axis), ()) for axis in range(len(steps))],
            {dim: p.width for dim, p in zip(pattern.dims, pads, strict=True) if p},
        )
        result = pattern.emit(call)
        if result not in inputs:
            self.origin[result] = node.name
        crops = [p.result if p else step.result for step, p in zip(steps, pads, strict=True)]
        self._env[node.name] = self._crop(result, pattern.dims, crops)
        for new in itertools.islice(reversed(self.graph.nodes), len(self.graph.nodes) - before):
            new.meta = trace_of(node.node)

    def result(self, name: str, crops: Sequence[Crop]) -> fx.Node | None:
        """The rectangle of an output that the tile owns; None where it owns no pixel of it."""
        if not all(crop.length for crop in crops):
            return None
        return self._crop(self._env[name], self._segment.graph.pattern(name).dims, crops)

    def _crop(self, node: fx.Node, dims: tuple[int, ...], crops: Sequence[Crop]) -> fx.Node:
        """`node` cropped along each tiled dim; itself where nothing is cut away."""
        parts = tuple((d, c.start, c.length) for d, c in zip(dims, crops, strict=True) if not c.is_whole)
        return self.graph.call_function(crop, (node, *parts)) if parts else node

    def _serve(self, fill: float | None, read: Read, steps: Sequence[CropPad]) -> fx.Node:
        """The pixels of one read: cropped from what the tile holds, padded where they lie outside the image."""
        key = (read.value.name, tuple(steps), read.dims, fill, read.border)
        if key not in self._shared:
            node = self._crop(self._env[read.value.name], read.dims, [step.crop for step in steps])
            self._shared[key] = self._pad(node, fill, read, steps)
        return self._shared[key]

    def _pad(self, node: fx.Node, fill: float | None, read: Read, steps: Sequence[CropPad]) -> fx.Node:
        if not any(step.before or step.after for step in steps):
            return node
        if fill is None and read.border is Border.FILLED:
            raise StreamError(f"a rule reads `{read.value.name}` outside the image and gives no fill value")
        rank = len(read.value.shape)
        pads = [0] * (2 * rank)
        for dim, step in zip(read.dims, steps, strict=True):
            pads[2 * (rank - 1 - dim) : 2 * (rank - dim)] = [step.before, step.after]
        if read.border is not Border.FILLED:  # which torch pads along all dims behind the channels
            pads = pads[: 2 * (rank - min(2, *read.dims))]
            return self.graph.call_function(aten.pad.default, (node, pads, read.border.value))
        pads = pads[: 2 * (rank - min(read.dims))]
        return self.graph.call_function(aten.constant_pad_nd.default, (node, pads, fill))


@dataclass(frozen=True, slots=True)
class _Call:
    """One operator of the tile as its access pattern sees it (`rules.patterns.TileWriter`)."""

    graph: fx.Graph
    node: TypedNode
    segment: Segment
    inputs: Sequence[fx.Node]
    whole: Mapping[str, fx.Node]
    lengths: Sequence[int]
    counts: Sequence[Sequence[int] | None]
    tables: Sequence[Sequence[fx.Node]]
    padding: Mapping[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result on this tile, before it is cropped."""
        shape = list(self.node.values[0].shape)
        for dim, length in zip(self.node.pattern.dims, self.lengths, strict=True):
            shape[dim] = length
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the result."""
        return self.node.values[0].dtype

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of a function."""
        return self.graph.call_function(target, args)

    def operator(self, replaced: Mapping[str, Any], target: torch._ops.OpOverload | None = None) -> fx.Node:
        """The segment's operator, or another, on the inputs, with the arguments that a tile replaces."""
        original = self.node.node
        if not isinstance(original.target, torch._ops.OpOverload):
            return self._function(original)
        arguments = bind_to(original.target, *self.segment.graph.arguments(original))
        reads = {(read.argument, read.index): node for read, node in zip(self.node.pattern.reads, self.inputs)}
        for name, argument in arguments.items():
            if isinstance(argument, (list, tuple)):
                arguments[name] = [reads.get((name, i), leaf) for i, leaf in enumerate(argument)]
            elif (name, None) in reads:
                arguments[name] = reads[name, None]
        inputs = set(self.inputs)
        arguments = map_arg({**arguments, **replaced}, lambda n: n if n in inputs else self.whole[n.name])
        return call_with(self.graph, target or original.target, arguments)

    def _function(self, original: fx.Node) -> fx.Node:
        """A function of the user, whose arguments have no names, on the inputs."""
        reads = {read.argument: node for read, node in zip(self.node.pattern.reads, self.inputs, strict=True)}
        arguments = [reads.get(str(i)) or self.whole[one.name] for i, one in enumerate(original.all_input_nodes)]
        assert callable(original.target)
        return self.graph.call_function(original.target, tuple(arguments))


def crop(tensor: torch.Tensor, *parts: tuple[int, int, int]) -> torch.Tensor:
    """`length` pixels from `start` on along `dim`, for each (dim, start, length); a view.

    >>> crop(torch.arange(6).view(2, 3), (0, 1, 1), (1, 0, 2))
    tensor([[3, 4]])
    """
    for dim, start, length in parts:
        tensor = tensor.narrow(dim, start, length)
    return tensor


def constants_of(segment: Segment) -> Hashable:
    """What programs of a segment have in them besides what a tile is: integers, arguments that rules replace.

    Where it runs whole, the shapes of moments too.
    """
    fixed = []
    for node in segment.graph.nodes.values():
        pattern = node.verdict.answer if node.verdict is not None else None
        if pattern is not None:
            parts = (getattr(pattern, part, None) for part in OF_PATTERNS)
            fixed.append((node.integer, *map(repr, parts), _order(pattern)))
        elif node.integer is not None:
            fixed.append((node.integer,))
        if result_of(node.node) is not None:
            fixed.append((*node.values[0].shape,))
    return tuple(fixed)


def _order(pattern: object) -> tuple[int, ...]:
    """The order in which a table's axes are resampled."""
    if not isinstance(pattern, Table):
        return ()
    return tuple(
        sorted(range(len(pattern.axes)), key=lambda k: pattern.axes[k].extent_out / pattern.axes[k].extent)
    )
