"""Inference whose result does not fit into memory: written into arrays tile by tile, resumable."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxstream.compiler.module import StreamedModule, inspect
from fxstream.compiler.pipeline import Pipeline
from fxstream.compiler.prepared import Prepared
from fxstream.compiler.sharded import gathered
from fxstream.compiler.streaming import Streaming
from fxstream.errors import InputError, StreamingWarning
from fxstream.graph.captured import Results
from fxstream.graph.shapes import Shape
from fxstream.io.identity import values_of, weights_of
from fxstream.io.inputs import Inputs, inputs_of
from fxstream.io.journal import Journal
from fxstream.io.sharing import is_in_memory_only, share
from fxstream.io.sink import Sink
from fxstream.runtime.ranks import Ranks, digest, together
from fxstream.runtime.rewrite import with_sinks

__all__ = ["infer"]


def infer(
    module: StreamedModule,
    *args: Any,
    out: Any,
    journal: str | os.PathLike[str] | None = None,
    restart: bool = False,
    saturate: bool = False,
    **kwargs: Any,
) -> Any:
    """Run a compiled module without gradients, and write its results into `out` tile by tile.

    `out` is an array of the result's shape (numpy memmap, zarr, h5py), or a part of one by `fxstream.target`:
    a slice of a zarr or HDF5 array is a copy. For several results it has the structure that the model returns,
    with the same keys, and None for those to be returned as tensors. The result of the last segment is never
    in memory as a whole. With `saturate`, integers outside of the range of the array's type become its limits;
    without it such a type is refused.

    `journal` is the path of a file that lists the tiles that are written: a prediction that was killed
    continues when it is started again with the same arrays. What the arrays no longer hold is written again.
    (HDF5 files may themselves be broken by a kill; zarr stores and memory maps are not.) The journal of
    another prediction (weights, images, arguments, shapes, types) is refused, or begun anew with `restart`, as
    the validation in a training loop needs. Images above 256 MiB are compared by samples. One process writes a
    journal at a time.

    Of a module that was compiled with a `mesh` every rank calls `infer`, with the same image, array and journal;
    each writes tiles of its own, no two into one chunk at the same time. What is returned as a tensor every rank
    has whole.

    Returns what the model returns, with arrays in the place of the tensors that were written. Raises
    `InputError` for an `out` of the wrong shape, type or structure, for one that is the memory or the file of
    an image, and for the journal of another prediction, `StreamError` where reading or writing fails.
    """
    if not isinstance(module, StreamedModule):
        raise InputError(f"infer needs a module made by fxstream.compile, found {type(module).__name__}")
    modules = (module, *inspect(module).model.modules())
    with torch.no_grad():
        return gathered(modules, lambda: _written(inspect(module), args, kwargs, out, journal, restart, saturate))


def _written(
    streaming: Streaming,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    out: Any,
    journal: str | os.PathLike[str] | None,
    restart: bool,
    saturate: bool,
) -> Any:
    """What `infer` returns."""
    inputs = inputs_of(streaming.model, args, kwargs)
    call = streaming.call(inputs, flat=True)
    results = call.trace.results
    assert results is not None
    arrays = _paired(results.spec, out)
    writing = _Writing(results, arrays, saturate, streaming.shared.ranks)
    with together(writing.ranks):
        _refuse_shared(inputs, arrays)
        _refuse_copies(arrays, journal is not None, writing.ranks)
    with contextlib.ExitStack() as opened:
        if journal is not None:

            def log(shapes: Sequence[Shape]) -> Journal:
                description = _description(streaming.model, inputs, shapes, arrays)
                return opened.enter_context(_opened(journal, description, restart, writing.ranks))

            writing.journal = log
        flat = call.run(streaming.model, inputs, writing.run).flat_args
    written = [arrays.get(i, tensor) for i, tensor in enumerate(flat)]
    return written[0] if len(written) == 1 and out is written[0] else pytree.tree_unflatten(written, results.spec)


class _Writing:
    """The computation of a graph whose outputs are written into the arrays of the results that they are."""

    def __init__(self, results: Results, arrays: Mapping[int, Any], saturate: bool, ranks: Ranks | None) -> None:
        self.ranks = ranks
        self.journal: Callable[[Sequence[Shape]], Journal | None] = lambda shapes: None
        self._results, self._arrays, self._saturate = results, arrays, saturate

    def run(self, pipeline: Pipeline, values: Sequence[Any], outside: Mapping[int, Any]) -> Sequence[Any]:
        """The outputs of the graph; those with an array are written tile by tile where nothing else reads them."""
        outputs = self._results.outputs
        written = sorted({outputs[i] for i in self._arrays if outputs[i] is not None})  # type: ignore[type-var]
        prepared = pipeline.agreed(values, outside, written)  # type: ignore[arg-type]
        sinks = self._sinks(prepared)
        streamed: set[int] = set()
        if prepared.streamed is None:
            flat = pipeline.plain(values, outside)
        else:
            once = {outputs[i]: sink for i, sink in sinks.items() if outputs.count(outputs[i]) == 1}
            graph, streamed = with_sinks(prepared.streamed, once)  # type: ignore[arg-type]
            flat = replace(prepared, streamed=graph).run(values, outside)
        with together(self.ranks):
            for i, sink in sinks.items():
                if outputs[i] not in streamed and (self.ranks is None or not self.ranks.rank):
                    sink.write_whole(flat[outputs[i]])  # type: ignore[index]
        return flat

    def _sinks(self, prepared: Prepared) -> dict[int, Sink]:
        """What writes each result that has an array, resumed where there is a journal."""
        with together(self.ranks):
            shapes = self._shapes(prepared)
            sinks = {
                i: Sink(array, shapes[i].shape, shapes[i].dtype, i, self._saturate)
                for i, array in self._arrays.items()
            }
        log = self.journal(shapes)
        if log is not None:
            for sink in sinks.values():
                sink.resume(log, self.ranks)
        return sinks

    def _shapes(self, prepared: Prepared) -> list[Shape]:
        """Shape and type of every result. Raises `InputError` for a model that returns something else."""
        names, metas = prepared.analysis.captured.outputs, prepared.analysis.graph.metas
        of_results = [metas.get(names[k] or "") if k is not None else None for k in self._results.outputs]
        shapes = [meta for meta in of_results if isinstance(meta, Shape)]
        if len(shapes) != len(of_results):
            raise InputError("infer needs a model that returns tensors only")
        return shapes


def _paired(spec: pytree.TreeSpec, out: Any) -> dict[int, Any]:
    """The array of each result that has one, by the place of the result. Raises `InputError` for another `out`."""
    if spec.num_leaves == 1 and not isinstance(out, (Mapping, tuple, list)):
        return {0: out} if out is not None else {}
    return dict(_pairs(pytree.tree_unflatten(range(spec.num_leaves), spec), out, "out"))


def _pairs(results: Any, out: Any, path: str) -> Iterator[tuple[int, Any]]:
    """The places of results with their arrays; `results` has a place where the model returns a tensor."""
    if out is None:
        return
    if isinstance(results, int):
        if isinstance(out, (Mapping, tuple, list)):
            raise InputError(f"{path} is a {type(out).__name__}, and the model returns a tensor: give an array")
        yield results, out
        return
    mine, theirs = _members(out), _members(results)
    if mine.keys() != theirs.keys():
        keys = [", ".join(map(repr, members)) or "no members" for members in (mine, theirs)]
        raise InputError(
            f"{path} has {keys[0]}, and the model returns {keys[1]}: give all of them, None for those to be"
            " returned"
        )
    for key in theirs:
        yield from _pairs(theirs[key], mine[key], f"{path}[{key!r}]")


def _members(container: Any) -> dict[Any, Any]:
    """What a container of the model's results has, by key or by place."""
    if isinstance(container, Mapping):
        return dict(container)
    if isinstance(container, (tuple, list)):
        return dict(enumerate(container))
    return dict(enumerate(pytree.tree_leaves(container)))


def _refuse_shared(inputs: Inputs, arrays: Mapping[int, Any]) -> None:
    """Raise `InputError` for an array that tiles would be written into and read from, or written twice."""
    for array in arrays.values():
        if any(share(image, array) for image in inputs.real):
            raise InputError(
                "out is the memory, file or store of an image that the prediction reads: tiles would read what"
                " others wrote, so give an array of its own"
            )
    if any(share(one, other) for one, other in itertools.combinations(arrays.values(), 2)):
        raise InputError("two results would be written into the same memory, file or store: give each an array")


def _refuse_copies(arrays: Mapping[int, Any], is_resumable: bool, ranks: Ranks | None) -> None:
    """Raise `InputError` for arrays that other ranks cannot see, warn of those that a journal outlives."""
    if not any(is_in_memory_only(array) for array in arrays.values()):
        return
    if ranks is not None:
        raise InputError(
            "out is in the memory of one process, and the ranks of the mesh write one result together: give an"
            " array that is stored and that every rank has opened, as zarr or numpy.memmap"
        )
    if is_resumable:
        warnings.warn(
            "out is in memory only, and its journal outlives it: nothing is left of it after a kill. Give an array"
            " that is stored; a slice of a zarr or HDF5 array is a copy, fxstream.target(array, index) is none",
            StreamingWarning,
            stacklevel=3,
        )


def _opened(
    path: str | os.PathLike[str], prediction: dict[str, Any], restart: bool, ranks: Ranks | None
) -> Journal:
    """The journal of this process; of ranks the first one opens its own before the others."""
    if ranks is None:
        return Journal(path, prediction, restart)
    ranks.require_equal({"prediction": digest(repr(prediction).encode()), "journal": str(path)})
    with ranks.raise_together():
        first = Journal(path, prediction, restart) if not ranks.rank else None
    with ranks.raise_together():
        return first or Journal(path, prediction, restart, ranks.rank)


def _description(
    model: nn.Module, inputs: Inputs, shapes: Sequence[Shape], arrays: Mapping[int, Any]
) -> dict[str, Any]:
    """What a journal must agree with."""
    leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
    return {
        "images": [_form(image) for image in inputs.real],
        "pixels": [values_of(image) for image in inputs.real],
        "arguments": [repr(leaf) for leaf in leaves if isinstance(leaf, (bool, int, float, str))],
        "results": [_form(shape) for shape in shapes],
        "arrays": {str(i): _form(array) for i, array in arrays.items()},
        "weights": weights_of(model),
    }


def _form(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}"
