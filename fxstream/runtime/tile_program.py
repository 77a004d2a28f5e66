"""The FX program of a tile class: what one tile of a segment computes, with crops and pads as nodes.

Tiles whose steps agree along every axis share a program. It takes the tile's cut of every leaf, the small tensors
whole and what it looks up in tables, and returns the tile's rectangle of every output, its partial result of a
reduction. It is an ordinary `fx.GraphModule`: it can be printed, linted, and compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxstream.errors import StreamError
from fxstream.graph.shapes import Shape, fold_integers
from fxstream.graph.typed_graph import Locality
from fxstream.rules import Border, Footprint, Read, TileSize
from fxstream.rules.resample_table import Lookup, resampled_tile
from fxstream.tiling.autograd_saves import Saved
from fxstream.tiling.bounds import AxisStep, AxisTile, Cut, ReadStep, Segment, lookups
from fxstream.tiling.fold import names_of
from fxstream.tiling.own_padding import OwnPadding, own_padding
from fxstream.tiling.reuse import reuse_inputs, without_unneeded

__all__ = ["TileProgram", "tile_program", "whole_program"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class TileProgram:
    """The program of a tile class, an `fx.GraphModule`, or that compiled.

    `recomputation` is what runs again for its backward, often the same.
    """

    forward: Callable[..., tuple[torch.Tensor, ...]]
    recomputation: Callable[..., tuple[torch.Tensor, ...]]

    def run(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results of a tile; not as a call of a module, whose hooks are about the user's modules."""
        return _bare(self.forward)(*tensors)

    def run_again(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results for a backward, some of them without values."""
        return _bare(self.recomputation)(*tensors)

    def compiled(self) -> TileProgram:
        """The same program through `torch.compile`, for its fixed shapes; compiled when it first runs."""
        forward = torch.compile(self.forward, dynamic=False)
        same = self.recomputation is self.forward
        return TileProgram(forward, forward if same else torch.compile(self.recomputation, dynamic=False))


def _bare(program: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    return program.forward if isinstance(program, fx.GraphModule) else program


def tile_program(
    locality: Locality,
    segment: Segment,
    tiles: Sequence[AxisTile],
    saved: Mapping[str, Saved] | None = None,
) -> TileProgram:
    """The program of the class that `tiles` (one per axis) belongs to.

    With `saved`, what autograd keeps of each operator, it reuses memory and computes nothing in vain (`economy`).
    """
    builder = _Builder(locality, segment, lookups(segment, tiles), _folds(segment, saved))
    for position, name in enumerate(segment.nodes):
        steps = [step for tile in tiles if (step := tile.steps[position]) is not None]
        if len(steps) == len(tiles):
            builder.add(name, steps)
    results = [builder.result(name, [tile.crops[i] for tile in tiles]) for i, name in enumerate(segment.outputs)]
    builder.graph.output(tuple(results))
    builder.graph.eliminate_dead_code()
    builder.graph.lint()
    origin = {node: name for node, name in builder.origin.items() if node.users}
    return _economic(builder.graph, origin, locality, segment, saved)


def whole_program(locality: Locality, segment: Segment, saved: Mapping[str, Saved] | None = None) -> TileProgram:
    """The program of a segment that runs whole: its operators as they are, with all integers folded."""
    graph = fx.Graph()
    env = {name: graph.placeholder(name) for name in segment.inputs}
    origin: dict[fx.Node, str] = {}
    folds = _folds(segment, saved)
    folded = {made: name for name, made in folds.items()}
    for name in segment.nodes:
        if name in folds:
            env[name] = env[folds[name]]
            origin[env[name]] = name
            continue
        node = locality.nodes[name]
        args, kwargs = fold_integers(node, locality.metas)
        if name in folded:
            args = (args[0], *(env[small] for small in names_of(folded[name])), *args[3:])
        given = map_arg((args, kwargs), lambda n: env[n.name])
        env[name] = graph.create_node(node.op, node.target, *given)
        env[name].meta = {k: v for k, v in node.meta.items() if k in TRACED}
        origin[env[name]] = name
    graph.output(tuple(env[name] for name in segment.outputs))
    graph.lint()
    return _economic(graph, origin, locality, segment, saved)


def _folds(segment: Segment, saved: Mapping[str, Saved] | None) -> dict[str, str]:
    """The BatchNorms of a segment that are folded, each with its convolution; their weights are small tensors."""
    return {} if saved is None else {name: saved[name].folded for name in segment.nodes if saved[name].folded}


def _economic(
    graph: fx.Graph,
    origin: Mapping[fx.Node, str],
    locality: Locality,
    segment: Segment,
    saved: Mapping[str, Saved] | None,
) -> TileProgram:
    if saved is not None:
        reuse_inputs(graph, origin, locality, saved)
    program = fx.GraphModule({}, graph, f"{segment.name}_tile")
    recomputed = program if saved is None else without_unneeded(program, origin, segment.nodes, locality, saved)
    return TileProgram(program, recomputed)


class _Builder:
    """The graph under construction; `env` maps a node of the model to its value on the tile."""

    def __init__(
        self,
        locality: Locality,
        segment: Segment,
        tables: Mapping[tuple[str, int], Lookup],
        folds: Mapping[str, str],
    ) -> None:
        self.graph = fx.Graph()
        self.env: dict[str, fx.Node] = {}
        self.origin: dict[fx.Node, str] = {}
        """The operator of the model that each call evaluates."""
        self._locality = locality
        self._original = locality.nodes
        self._served: dict[tuple[object, ...], fx.Node] = {}
        self._leaves = {name: self.graph.placeholder(f"{name}_tile") for name, _ in segment.leaves}
        self._smalls = {name: self.graph.placeholder(name) for name in segment.smalls}
        self._folds, self._folded = folds, {made: name for name, made in folds.items()}
        self._tables = {
            (name, axis): [self.graph.placeholder(f"{name}_{part}_{axis}") for part in lookup.parts]
            for (name, axis), lookup in tables.items()
        }

    def add(self, name: str, steps: Sequence[AxisStep]) -> None:
        """The call of one node on its crops and pads, cropped to the box that the tile holds."""
        footprint = self._locality.footprint(name)
        before = len(self.graph.nodes)
        own = [own_padding(self._locality, name, axis, step) for axis, step in enumerate(steps)]
        served = [
            self._serve(footprint, read, [_unpadded(step.reads[i], p) for step, p in zip(steps, own, strict=True)])
            for i, read in enumerate(footprint.reads)
        ]
        if footprint.target is None or name in self._folds:
            (result,) = served
        elif footprint.reduction is not None:
            result = self.graph.call_function(footprint.target, (*served, *footprint.reduction.arguments))
        elif footprint.resample is not None:
            result = self._resample(name, footprint, served[0])
        elif footprint.average is not None and any(_is_ragged(footprint, steps)):
            result = self._average(footprint, served[0], steps)
        else:
            replaced = {**_padding_argument(footprint, own), **self._weights(name)}
            result = self._call(name, footprint, served, steps, **replaced)
        if footprint.target is not None and (name not in self._folds or result in self.origin):
            self.origin[result] = name
        cuts = [p.result if p else step.result for step, p in zip(steps, own, strict=True)]
        self.env[name] = self.cut(result, footprint.dims, cuts)
        for node in itertools.islice(reversed(self.graph.nodes), len(self.graph.nodes) - before):
            node.meta = {k: v for k, v in self._original[name].meta.items() if k in TRACED}

    def result(self, name: str, cuts: Sequence[Cut]) -> fx.Node | None:
        """The rectangle of an output that the tile owns; None where it owns no pixel of it."""
        if not all(cut.length for cut in cuts):
            return None
        return self.cut(self.env[name], self._locality.footprint(name).dims, cuts)

    def cut(self, node: fx.Node, dims: tuple[int, ...], cuts: Sequence[Cut]) -> fx.Node:
        """`node` cut along each stream dim; itself where nothing is cut away."""
        parts = tuple((d, c.start, c.length) for d, c in zip(dims, cuts, strict=True) if not c.is_whole)
        return self.graph.call_function(crop, (node, *parts)) if parts else node

    def _serve(self, footprint: Footprint, read: Read, steps: Sequence[ReadStep]) -> fx.Node:
        """The pixels of one read: cut from what the tile holds, padded where they lie outside the image."""
        key = (read.value.name, tuple(steps), read.dims, footprint.fill, read.border)
        if key not in self._served:
            name = read.value.name
            held = self.env[name] if name in self.env else self._leaves[name]
            node = self.cut(held, read.dims, [step.cut for step in steps])
            self._served[key] = self._pad(node, footprint, read, steps)
        return self._served[key]

    def _pad(self, node: fx.Node, footprint: Footprint, read: Read, steps: Sequence[ReadStep]) -> fx.Node:
        if not any(step.before or step.after for step in steps):
            return node
        if footprint.fill is None and read.border is Border.FILLED:
            raise StreamError(f"the rule of {footprint.target} reads outside the image and gives no fill value")
        rank = len(read.value.shape)
        pads = [0] * (2 * rank)
        for dim, step in zip(read.dims, steps, strict=True):
            pads[2 * (rank - 1 - dim) : 2 * (rank - dim)] = [step.before, step.after]
        pads = pads[: 2 * (rank - min(read.dims))]
        if read.border is not Border.FILLED:
            return self.graph.call_function(aten.pad.default, (node, pads, read.border.value))
        return self.graph.call_function(aten.constant_pad_nd.default, (node, pads, footprint.fill))

    def _call(
        self,
        name: str,
        footprint: Footprint,
        served: Sequence[fx.Node],
        steps: Sequence[AxisStep],
        **replaced: Any,
    ) -> fx.Node:
        """The operator on the served inputs, with the arguments that a tile replaces."""
        target = footprint.target
        assert target is not None
        original = self._original[name]
        if not isinstance(target, torch._ops.OpOverload):
            return self.graph.call_function(target, (served[0], *original.args[1:]))
        arguments = self._arguments(original)
        for read, node in zip(footprint.reads, served, strict=True):
            if read.index is None:
                arguments[read.argument] = node
            else:
                arguments[read.argument][read.index] = node
        shape = self._tile_shape(name, footprint, steps)
        for argument, value in {**footprint.overrides, **replaced}.items():
            arguments[argument] = _sized(value, shape, footprint.dims)
        return self._schema_call(target, arguments)

    def _weights(self, name: str) -> dict[str, fx.Node]:
        """The arguments of a convolution that a BatchNorm is folded into; none of any other operator."""
        if name not in self._folded:
            return {}
        weight, bias = names_of(self._folded[name])
        return {"weight": self._smalls[weight], "bias": self._smalls[bias]}

    def _arguments(self, original: fx.Node) -> dict[str, Any]:
        """The node's arguments by schema name, small tensors as this program's own, reads left to fill in."""
        assert isinstance(original.target, torch._ops.OpOverload)
        args, kwargs = fold_integers(original, self._locality.metas)
        names = [argument.name for argument in original.target._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        smalls = {k: map_arg(v, lambda n: self._smalls.get(n.name, n)) for k, v in given.items()}
        return {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in smalls.items()}

    def _tile_shape(self, name: str, footprint: Footprint, steps: Sequence[AxisStep]) -> list[int]:
        meta = self._locality.metas[name]
        shape = list(meta.shape) if isinstance(meta, Shape) else []
        for dim, step in zip(footprint.dims, steps, strict=True):
            if shape:
                shape[dim] = step.result.held
        return shape

    def _schema_call(self, target: torch._ops.OpOverload, arguments: Mapping[str, Any]) -> fx.Node:
        positional, kwargs = [], {}
        for argument in target._schema.arguments:
            if argument.kwarg_only:
                if argument.name in arguments:
                    kwargs[argument.name] = arguments[argument.name]
            else:
                positional.append(arguments.get(argument.name, argument.default_value))
        return self.graph.call_function(target, tuple(positional), kwargs)

    def _resample(self, name: str, footprint: Footprint, served: fx.Node) -> fx.Node:
        """Interpolation by table, first along the axes that shrink most, so that the least is computed."""
        assert footprint.resample is not None
        meta = self._locality.metas[name]
        assert isinstance(meta, Shape)
        order = sorted(enumerate(footprint.resample), key=lambda pair: pair[1].extent_out / pair[1].extent)
        axes = [(footprint.dims[axis], self._tables[name, axis]) for axis, _ in order]
        return self.graph.call_function(resampled_tile, (served, axes, meta.dtype))

    def _average(self, footprint: Footprint, served: fx.Node, steps: Sequence[AxisStep]) -> fx.Node:
        """An average pooling at the border: the sums of the windows over the counts of their real pixels."""
        assert footprint.average is not None
        axes = sorted(zip(footprint.dims, footprint.average, (s.counts for s in steps), strict=True))
        windows = tuple((average.kernel, average.stride, counts) for _, average, counts in axes)
        return self.graph.call_function(average_windows, (served, windows))


def _unpadded(step: ReadStep, own: OwnPadding | None) -> ReadStep:
    return ReadStep(step.cut, 0, 0) if own else step


def _padding_argument(footprint: Footprint, own: Sequence[OwnPadding | None]) -> dict[str, list[int]]:
    """The padding of the call, in the order of the operator's dims; nothing where it has none of its own."""
    if not any(own):
        return {}
    widths = list(footprint.overrides["padding"])
    first = len(footprint.reads[0].value.shape) - len(widths)
    for dim, padding in zip(footprint.dims, own, strict=True):
        widths[dim - first] = padding.width if padding else 0
    return {"padding": widths}


TRACED = ("nn_module_stack", "stack_trace")


def _is_ragged(footprint: Footprint, steps: Sequence[AxisStep]) -> list[bool]:
    """Per axis, whether some window has fewer pixels than the kernel."""
    assert footprint.average is not None
    pairs = zip(footprint.average, steps, strict=True)
    return [any(count != average.kernel for count in step.counts or ()) for average, step in pairs]


def crop(tensor: torch.Tensor, *parts: tuple[int, int, int]) -> torch.Tensor:
    """`length` pixels from `start` on along `dim`, for each (dim, start, length); a view.

    >>> crop(torch.arange(6).view(2, 3), (0, 1, 1), (1, 0, 2))
    tensor([[3, 4]])
    """
    for dim, start, length in parts:
        tensor = tensor.narrow(dim, start, length)
    return tensor


def average_windows(tensor: torch.Tensor, windows: Sequence[tuple[int, int, Sequence[int]]]) -> torch.Tensor:
    """The sums of windows over the last dims, each divided by the product of its counts of pixels.

    `windows` has, per dim, the kernel, the stride and the count of each window.

    >>> average_windows(torch.tensor([[[1.0, 3.0, 5.0, 0.0]]]), ((2, 2, (2, 1)),))
    tensor([[[2., 5.]]])
    """
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    kernel, stride = [k for k, _, _ in windows], [s for _, s, _ in windows]
    if len(windows) == 1:
        sums = aten.avg_pool2d(wide.unsqueeze(-2), [1, *kernel], [1, *stride], divisor_override=1).squeeze(-2)
    else:
        pool = aten.avg_pool2d if len(windows) == 2 else aten.avg_pool3d
        sums = pool(wide, kernel, stride, divisor_override=1)
    divisor = sums.new_ones(())
    for _, _, counts in windows:
        divisor = divisor.unsqueeze(-1) * sums.new_tensor(counts)
    averages: torch.Tensor = sums / divisor
    return averages.to(tensor.dtype)


def _sized(value: Any, shape: Sequence[int], dims: Sequence[int]) -> Any:
    """A size argument of a tile; anything else unchanged."""
    if value is TileSize.RESULT:
        return list(shape)
    if value is TileSize.STREAM:
        return [shape[dim] for dim in sorted(dims)]
    return value
