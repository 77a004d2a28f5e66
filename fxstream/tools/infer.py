"""Inference whose result does not fit into memory: written into arrays tile by tile, resumable."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxstream.compiler.module import StreamedModule
from fxstream.compiler.pipeline import Prepared
from fxstream.errors import InputError, StreamingWarning
from fxstream.graph.shapes import Shape
from fxstream.io.identity import values_of, weights_of
from fxstream.io.inputs import Inputs, inputs_of
from fxstream.io.journal import Journal
from fxstream.io.sharing import is_in_memory_only, share
from fxstream.io.sink import Sink
from fxstream.runtime.ranks import Ranks, digest
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
    with torch.no_grad():
        inputs = inputs_of(module.model, args, kwargs)
        prepared, arrays = _prepared(module, inputs, out)
        spec, ranks = prepared.analysis.captured.out_spec, module.pipeline.ranks
        with _together(ranks):
            shapes = _shapes(prepared)
            _refuse_shared(inputs, arrays)
            _refuse_copies(arrays, journal is not None, ranks)
            sinks = {i: Sink(arrays[i], shapes[i].shape, shapes[i].dtype, i, saturate) for i in arrays}
        with contextlib.ExitStack() as opened:
            if journal is not None:
                description = _description(module, inputs, shapes, arrays)
                log = opened.enter_context(_opened(journal, description, restart, ranks))
                for sink in sinks.values():
                    sink.resume(log, ranks)
            flat = _run(module, prepared, inputs, sinks)
    results = [arrays.get(i, tensor) for i, tensor in enumerate(flat)]
    return results[0] if len(results) == 1 and out is results[0] else pytree.tree_unflatten(results, spec)


def _prepared(module: StreamedModule, inputs: Inputs, out: Any) -> tuple[Prepared, dict[int, Any]]:
    """The model made ready for writing its results, and their arrays.

    How the model orders its results is known with its first plan, which is for the order of `out`: mostly the
    same.
    """
    leaves = pytree.tree_leaves(out, is_leaf=lambda leaf: leaf is None)
    written = [place for place, leaf in enumerate(leaves) if leaf is not None]
    prepared = module.pipeline.agreed(inputs, written)
    arrays = _paired(prepared.analysis.captured.out_spec, out)
    if sorted(arrays) != written:
        prepared = module.pipeline.agreed(inputs, sorted(arrays))
    return prepared, arrays


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


def _together(ranks: Ranks | None) -> contextlib.AbstractContextManager[None]:
    """A block that every rank runs; if it fails on one, all raise."""
    return contextlib.nullcontext() if ranks is None else ranks.raise_together()


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


def _shapes(prepared: Prepared) -> list[Shape]:
    """Shape and type of every result. Raises `InputError` for a model that returns something else."""
    analysis = prepared.analysis
    metas = [analysis.graph.metas.get(name or "") for name in analysis.captured.results]
    shapes = [meta for meta in metas if isinstance(meta, Shape)]
    if len(shapes) != len(metas):
        raise InputError("infer needs a model that returns tensors only")
    return shapes


def _run(
    module: StreamedModule, prepared: Prepared, inputs: Inputs, sinks: dict[int, Sink]
) -> Sequence[torch.Tensor]:
    """The flat results. Outputs with a sink are written tile by tile where the segment has no other reader."""
    if prepared.streamed is None:
        args, kwargs = inputs.plain()
        flat = pytree.tree_leaves(module.model(*args, **kwargs))
        streamed: set[int] = set()
    else:
        graph, streamed = with_sinks(prepared.streamed, sinks)
        flat = pytree.tree_leaves(replace(prepared, streamed=graph).run(module.model, inputs))
    ranks = module.pipeline.ranks
    with _together(ranks):
        for index in sinks.keys() - streamed:
            if ranks is None or not ranks.rank:
                sinks[index].write_whole(flat[index])
    return flat


def _description(
    module: StreamedModule, inputs: Inputs, shapes: Sequence[Shape], arrays: Mapping[int, Any]
) -> dict[str, Any]:
    """What a journal must agree with."""
    leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
    return {
        "images": [_form(image) for image in inputs.real],
        "pixels": [values_of(image) for image in inputs.real],
        "arguments": [repr(leaf) for leaf in leaves if isinstance(leaf, (bool, int, float, str))],
        "results": [_form(shape) for shape in shapes],
        "arrays": {str(i): _form(array) for i, array in arrays.items()},
        "weights": weights_of(module.model),
    }


def _form(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}"
