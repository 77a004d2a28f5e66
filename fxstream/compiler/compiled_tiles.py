"""Tile programs through `torch.compile`: one compilation for all programs that are the same."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxstream.runtime.tile_program import TILED
from fxstream.tiling.reuse import uncomputed_convolution

__all__ = ["TileCompiler", "replays_in_inductor"]

logger = logging.getLogger("fxstream")
Program = Callable[..., Any]

GRAPHED = {"reduce-overhead", "max-autotune"}
"""Modes of torch.compile."""
MOST = 256
"""Compilations that are remembered."""


class TileCompiler:
    """Compiles tile programs, with these options of `torch.compile`, when they first run.

    Weights are inputs of a program. So the blocks of a stage are one program with other inputs: programs of equal
    operators, given tensors of equal shapes, types and formats, share what was compiled. With the option `dynamic`
    the pixels of a tile may be others. Results are copied where Inductor would overwrite them.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._overwrites, self._is_dynamic = replays_in_inductor(options), bool(options.get("dynamic"))
        self._structures: dict[Hashable, int] = {}
        self._compiled: OrderedDict[Hashable, Program] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[TileCompiler], tuple[dict[str, Any]]]:
        return TileCompiler, (self._options,)

    @property
    def count(self) -> int:
        """How many programs were compiled that are remembered."""
        return len(self._compiled)

    def __call__(self, program: fx.GraphModule) -> Program:
        """The program, compiled for the tensors that it is given; a first run, which takes long, is announced."""
        with self._lock:  # a number, for a structure takes long to compare at every tile
            structure = self._structures.setdefault(_structure(program.graph), len(self._structures))
        tiled = program.meta[TILED] if self._is_dynamic else ()

        def run(*tensors: torch.Tensor) -> Any:
            for tensor, dims in zip(tensors, tiled, strict=False):
                torch._dynamo.maybe_mark_dynamic(tensor, dims)  # type: ignore[no-untyped-call]
            key = structure, tuple(itertools.starmap(_form, itertools.zip_longest(tensors, tiled, fillvalue=())))
            with self._lock:
                if key not in self._compiled:
                    logger.info("compilation of the program of a tile of %s", list(tensors[0].shape))
                    self._compiled[key] = self._made(program)
                self._compiled.move_to_end(key)
                while len(self._compiled) > MOST:
                    self._compiled.popitem(last=False)
                compiled = self._compiled[key]
            results = compiled(*tensors)
            return results if not self._overwrites else tuple(None if r is None else r.clone() for r in results)

        return run

    def _made(self, program: fx.GraphModule) -> Program:
        """A program of its own to torch: each is compiled for one form of inputs."""
        torch.compiler.allow_in_graph(uncomputed_convolution)  # type: ignore[no-untyped-call]
        return torch.compile(fx.GraphModule(program, program.graph), **self._options | {"dynamic": False})


def replays_in_inductor(options: Mapping[str, Any]) -> bool:
    """Whether Inductor, with these options, makes CUDA graphs, whose results the next call overwrites."""
    return options.get("mode") in GRAPHED or bool((options.get("options") or {}).get("triton.cudagraphs"))


def _structure(graph: fx.Graph) -> Hashable:
    """What programs that compute the same have in common; the graph itself where it has things of its module."""
    if any(node.op == "get_attr" for node in graph.nodes):
        return graph
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    arguments = (repr(map_arg((node.args, node.kwargs), number.get)) for node in graph.nodes)
    targets = (node.target if node.op == "call_function" else node.op for node in graph.nodes)
    return tuple(zip(targets, arguments, strict=True))


def _form(tensor: torch.Tensor, tiled: tuple[int, ...]) -> Hashable:
    """What a program is compiled for; any number of pixels along the dims that are `tiled`."""
    shape = tuple(-1 if dim in tiled else size for dim, size in enumerate(tensor.shape))
    strides = tensor.dim_order() if tiled else tensor.stride()
    return shape, strides, tensor.dtype, tensor.device, tensor.requires_grad
