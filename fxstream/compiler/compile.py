"""`compile` and `plan`: what the user asks for, checked, and handed to the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxstream.compiler.analysis import analyze
from fxstream.compiler.compiled_tiles import replays_in_inductor
from fxstream.compiler.module import StreamedModule
from fxstream.compiler.options import RequestOptions, request_of
from fxstream.compiler.shared import Options
from fxstream.errors import InputError
from fxstream.machine import heap
from fxstream.planning.decision import Decision
from fxstream.planning.plan import Plan, make_plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["compile", "options_of", "plan"]

REPLICATED = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
"""Wrappers that exchange between processes, or copy, in a forward of their own."""


def compile(
    model: nn.Module,
    *,
    tile: int | tuple[int, ...] | None = None,
    memory: float | str | None = None,
    segments: int | tuple[str, ...] | None = None,
    cut: str | None = None,
    global_ops: str = "auto",
    verify: bool = True,
    compile_tiles: bool | Mapping[str, Any] = False,
    cuda_graphs: bool = False,
    offload: bool = False,
    mesh: Any = None,
    progress: bool = False,
    return_freed: bool = False,
    plan: Decision | None = None,
) -> StreamedModule:
    """Wrap a model so that its large part runs tile by tile, with the same results and gradients.

    The compiled module is a drop-in: it shares the model's parameters and buffers, and the model is not changed.
    The first call captures the model, probes the rules and plans. What it decides holds at other image sizes too:
    a call at a new one only follows from it, unless it does not fit there or costs more than the best.

    - `memory`: what one call may allocate at its peak, with its backward where gradients are recorded: ``"8GiB"``,
      a number of bytes, or ``"50%"`` or ``0.5``, a share of all memory that the device has (of the machine, or its
      container, on a CPU). Activations, boundaries and gradients count; the image, the parameters and the state of
      an optimiser do not. The plan is the fastest that is predicted to fit.
      By default, with no `tile` either, it is what the device has free at the first call of a size.
    - `tile`, instead of `memory`: the largest box of the model's input, overlap included, that a tile of the first
      segment reads, in pixels: one number for all axes or one per axis. Deeper operators that need more run whole,
      with a warning.
    - `segments`: the number of segments of each streamed region (at most, within a memory), or the names of the
      modules that each end one. By default the planner chooses.
    - `cut`: the name of the module after which nothing is streamed.
    - `global_ops`: what to do with operators that reduce the whole feature map (normalisations in training,
      squeeze and excitation, global pooling): ``"stream"`` them, ``"cut"`` the stream there, or ``"auto"``, the
      planner's choice.
    - `verify`: whether the probe measures the rules on the real operators, once per capture.
    - `compile_tiles`: whether tile programs go through `torch.compile`, or its options, as
      ``{"mode": "max-autotune"}``. The first step of a size then takes minutes, and the others less time. With
      ``{"dynamic": True}`` programs are made for tiles of any number of pixels.
    - `cuda_graphs`: whether the tiles of a class, but for its first, are replayed as a CUDA graph, so that small
      tiles cost little more per pixel than large ones. Their memory, and static copies of the weights, stay
      allocated until the module is deleted; within a memory they are counted.
    - `offload`: whether boundaries between segments, and their gradients, may lie in host memory: always with a
      tile, within a memory where that is predicted to be faster.
    - `mesh`: one dimension of a DeviceMesh, or a process group, whose ranks share the tiles of each image. All
      ranks get the same image, and have the same results and gradients.
    - `return_freed`: whether the memory of a freed tensor goes back to the operating system at once, in the whole
      process and from now on, so that the process stays within `memory` and not only its tensors (on a CPU, with
      the C library of Linux). Without it freed memory stays for the next tile, which is faster.
    - `plan`: what a plan decided elsewhere, ``compiled.plan.decision``, which can be written as text. It is taken
      at every image size at which it fits, without a search; elsewhere the planner searches.
    - `progress`: whether a bar is shown on a terminal for each sweep over the tiles.

    Raises `InputError` for a tile that is not a positive integer or a tuple of them, for a memory that is not a
    positive amount, for both at once, for `offload` with a `mesh`, and for `cuda_graphs` where Inductor makes them
    too. The first call raises `CaptureError`, `PlanError` or `ProbeError`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"compile needs an nn.Module, found {type(model).__name__}")
    if type(model).__name__ in REPLICATED:
        raise InputError(
            f"compile({type(model).__name__}(...)) is the wrong order, since a stream does not run the wrapper:"
            " wrap the compiled module: DistributedDataParallel(fxstream.compile(model, ...))"
        )
    options = options_of(
        verify=verify,
        compile_tiles=compile_tiles,
        mesh=mesh,
        progress=progress,
        return_freed=return_freed,
        plan=plan,
        tile=tile,
        memory=memory,
        segments=segments,
        cut=cut,
        global_ops=global_ops,
        offload=offload,
        cuda_graphs=cuda_graphs,
    )
    return StreamedModule(model, options)


def options_of(
    *,
    verify: bool = True,
    mesh: Any = None,
    progress: bool = False,
    return_freed: bool = False,
    plan: Decision | None = None,
    **options: Unpack[RequestOptions],
) -> Options:
    """The options of `compile`, checked. Raises `InputError` for those that make no sense."""
    if options.get("offload") and mesh is not None:
        raise InputError("offload and mesh exclude each other: ranks exchange boundaries on the device")
    if plan is not None and not isinstance(plan, Decision):
        raise InputError(
            f"plan must be the decision of a plan, compiled.plan.decision; found {type(plan).__name__}"
        )
    request, compile_tiles = request_of(**options), options.get("compile_tiles", False)
    if request.cuda_graphs and isinstance(compile_tiles, Mapping) and replays_in_inductor(compile_tiles):
        raise InputError(
            f"cuda_graphs and compile_tiles={dict(compile_tiles)} exclude each other: both make CUDA graphs of"
            ' tiles. For both, give the mode "default" or "max-autotune-no-cudagraphs"'
        )
    if return_freed:
        heap.return_freed()
    return Options(request, verify, compile_tiles, mesh, progress, plan)


def plan(
    model: nn.Module,
    size: int | tuple[int, ...] | None = None,
    *,
    tile: int | tuple[int, ...] | None = None,
    memory: float | str | None = None,
    segments: int | tuple[str, ...] | None = None,
    cut: str | None = None,
    global_ops: str = "auto",
    channels: int = 3,
    batch: int = 1,
    inputs: Sequence[torch.Tensor | tuple[int, ...]] | None = None,
    training: bool = True,
    offload: bool = False,
    cuda_graphs: bool = False,
    compile_tiles: bool | Mapping[str, Any] = False,
    device: torch.device | str | None = None,
) -> Plan:
    """Plan how `compile` would stream the model for an image [batch, channels, *size], without running it.

    `size` is in pixels, one number for a square 2-D image or one per axis; a model of several inputs gets `inputs`
    instead, as in `analyze`. `tile`, `memory`, `segments`, `cut`, `global_ops`, `offload`, `cuda_graphs` and
    `compile_tiles` are those of `compile`. `training` plans for a call with its backward, in the mode in which
    the model is: in training mode with batch statistics. `device` is the device to plan for, by default the
    model's; it need not exist where the memory is given in bytes.

    The plan prints as a table of segments with predicted time and memory. Raises what `analyze` and the first call
    of a compiled module raise.
    """
    request = request_of(
        tile=tile,
        memory=memory,
        segments=segments,
        cut=cut,
        global_ops=global_ops,
        offload=offload,
        cuda_graphs=cuda_graphs,
        compile_tiles=compile_tiles,
    )
    default = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    graph = analyze(model, size, channels=channels, batch=batch, inputs=inputs, global_ops=global_ops).graph
    return make_plan(graph, request, training=training, device=torch.device(device or default))
