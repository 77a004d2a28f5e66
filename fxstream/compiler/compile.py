"""`compile` and `plan`: what the user asks for, checked, and handed to the pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxstream.compiler.analysis import analyze
from fxstream.compiler.module import StreamedModule
from fxstream.compiler.options import request_of
from fxstream.compiler.pipeline import Options
from fxstream.errors import InputError
from fxstream.planning.plan import Plan, make_plan

__all__ = ["compile", "plan"]


def compile(
    model: nn.Module,
    *,
    tile: int | tuple[int, ...] | None = None,
    memory: float | str | None = None,
    segments: int | tuple[str, ...] | None = None,
    cut: str | None = None,
    global_ops: str = "auto",
    verify: bool = True,
    compile_tiles: bool = False,
    offload: bool = False,
    mesh: Any = None,
    progress: bool = False,
) -> StreamedModule:
    """The model as a drop-in module that streams its large part tile by tile, with the same results.

    `memory` is what a call may allocate at its peak, with its backward where gradients are recorded: bytes,
    ``"8GiB"``, or a share of the device below one. It counts activations, boundaries and gradients; not the image,
    the parameters and what an optimiser holds. The plan is the fastest that is predicted to fit. By default it is
    what the device has free at the first call of a size.

    `tile` instead is the largest box of the model's input, overlap included, that a tile of the first segment
    reads: pixels, one number for all axes or one per axis. `segments` is the number of segments of each streamed
    region (at most, within a memory), or the names of the modules that each end one; by default the planner
    chooses. `cut` names the module after which nothing is streamed. `global_ops` says what is done about
    operators that need the whole feature map and are reductions over it (normalisations in training, squeeze and
    excitation, global pooling): "stream" them with the rest, "cut" the stream there, or "auto": as the planner
    finds best.

    With `verify` the probe measures once per capture, on the real operators, what the rules claim. `compile_tiles`
    passes what a tile computes through `torch.compile`: the first step of a size takes minutes, the others less
    time. With `offload` boundaries between segments, and their gradients, may lie in host memory: with a tile they
    do, within a memory where that is predicted to be faster. `mesh`, one dimension of a DeviceMesh, shares the
    tiles of each image among its ranks, which all get the same image and have the same results and gradients.
    `progress` shows a bar for each pass on a terminal. The model itself is not changed and its parameters are
    shared.

    Raises `InputError` for a tile that is not a positive integer or tuple of them, for a memory that is not a
    positive amount, for both at once, and for `offload` with a `mesh`; at the first call `CaptureError`,
    `PlanError` or `ProbeError`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"compile needs an nn.Module, found {type(model).__name__}")
    if offload and mesh is not None:
        raise InputError("offload and mesh exclude each other: ranks exchange boundaries on the device")
    request = request_of(
        tile=tile, memory=memory, segments=segments, cut=cut, global_ops=global_ops, offload=offload
    )
    return StreamedModule(model, Options(request, verify, compile_tiles, mesh, progress))


def plan(
    model: nn.Module,
    size: int | tuple[int, ...],
    *,
    tile: int | tuple[int, ...] | None = None,
    memory: float | str | None = None,
    segments: int | tuple[str, ...] | None = None,
    cut: str | None = None,
    global_ops: str = "auto",
    channels: int = 3,
    batch: int = 1,
    training: bool = True,
    offload: bool = False,
    device: torch.device | str | None = None,
) -> Plan:
    """How `compile` would stream the model for an image [batch, channels, *size]; runs nothing.

    `training` plans for a call with its backward. `device` is what to plan for, by default where the model is; it
    need not exist where the memory is given in bytes. Raises what `analyze` and the first call of a compiled
    module raise.
    """
    request = request_of(
        tile=tile, memory=memory, segments=segments, cut=cut, global_ops=global_ops, offload=offload
    )
    there = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    graph = analyze(model, size, channels=channels, batch=batch, global_ops=global_ops).graph
    return make_plan(graph, request, training=training, device=torch.device(device or there))
