"""Inference whose result does not fit into memory: written into arrays tile by tile, resumable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxstream.compiler.module import StreamedModule
from fxstream.compiler.pipeline import Prepared
from fxstream.errors import InputError
from fxstream.graph.shapes import Shape
from fxstream.io.inputs import Inputs, inputs_of
from fxstream.io.sink import Journal, Sink
from fxstream.runtime.rewrite import with_sinks

__all__ = ["infer"]


def infer(
    module: StreamedModule,
    *args: Any,
    out: Any,
    journal: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Run a compiled module without gradients, and write its results into `out` tile by tile.

    `out` is an array of the result's shape (numpy memmap, zarr, h5py). For several results it has the structure
    that the model returns, with None for those to be returned as tensors. The result of the last segment is never
    in memory as a whole. `journal` is the path of a file that lists the tiles that are written: a prediction that
    was killed continues when it is started again with the same arrays. (HDF5 files may themselves be broken by a
    kill; zarr stores and memory maps are not.)

    Returns `out`, with tensors in the place of None. Raises `InputError` for an `out` of the wrong shape, type or
    structure and for the journal of another prediction, `StreamError` where reading or writing fails.
    """
    if not isinstance(module, StreamedModule):
        raise InputError(f"infer needs a module made by fxstream.compile, found {type(module).__name__}")
    if module.pipeline.options.mesh is not None:
        raise InputError("infer cannot share tiles over a mesh: give every rank images, or arrays, of its own")
    arrays, spec = pytree.tree_flatten(out, is_leaf=lambda leaf: leaf is None)
    with torch.no_grad():
        inputs = inputs_of(module.model, args, kwargs)
        written = [index for index, array in enumerate(arrays) if array is not None]
        prepared = module.pipeline.prepared(inputs, written)
        shapes = _shapes(prepared)
        if len(arrays) != len(shapes):
            raise InputError(f"out has {len(arrays)} arrays and the model returns {len(shapes)} tensors")
        log = None if journal is None else Journal(journal, _description(module.model, inputs, shapes, arrays))
        sinks = {i: Sink(arrays[i], shapes[i].shape, shapes[i].dtype, i, log) for i in written}
        flat = _run(module, prepared, inputs, sinks)
    results = [tensor if array is None else array for tensor, array in zip(flat, arrays, strict=True)]
    return pytree.tree_unflatten(results, spec)


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
    for index in sinks.keys() - streamed:
        sinks[index].write_whole(flat[index])
    return flat


def _description(
    model: nn.Module, inputs: Inputs, shapes: Sequence[Shape], arrays: Sequence[Any]
) -> dict[str, Any]:
    """What a journal must agree with: images by shape and type, results, the values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    pairs = zip(inputs.tensors, inputs.real, strict=True)
    return {
        "inputs": [_form(tensor) if image is tensor else repr(image) for tensor, image in pairs],
        "results": [_form(shape) for shape in shapes],
        "arrays": [None if array is None else _form(array) for array in arrays],
        "weights": digest.hexdigest(),
    }


def _form(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}"
