"""The tile loop and its gradient as one differentiable function. Here are grad mode, autocast and autograd.

NOTE [the stream as one differentiable function]
1. Forward runs every tile without recording and writes its rectangle of every output. The rectangles
   partition the outputs, so each pixel is written once.
2. Backward recomputes one tile at a time with recording on, pulls back the tile's slice of the output
   gradient with ordinary autograd, and sums over tiles. Since the rectangles partition the outputs, the sum of
   the tiles' vector-Jacobian products is the whole one, for every parameter and for the input.
3. Parameters are inputs of the function and their summed gradients are returned once, so that hooks on them
   (DDP) fire once. Parameters of less than 32 bits are summed in float32.
4. Forward and recompute must agree: autocast is saved and restored, and its cache of cast weights is off, for
   a cast made without recording must not serve a recorded use later. Nothing in a tile draws random numbers.
5. Gradients are computed only for what asks for them; an output without gradient costs nothing.
6. The graphs of the tiles that the plan keeps are recorded in forward and pulled back first, which frees them.
7. A reduction over space is an output too: each tile yields a partial result, and what combines these is an
   ordinary function of them, whose gradient each tile pulls back.
8. Double backward and functional transforms are refused: the recorded tile is gone when they would need it.
9. Where memory runs out, kept graphs are given up first; then the tile is halved, and the halves run instead,
   now and in later calls. What a tile yields is added to the results in steps that happen or do not, after all
   of it is there, so that nothing is counted twice. A halved tile that had a partial result gets that of its
   halves in its place, and the gradients of these.
10. Where ranks share the tiles, each runs its own; maps, partial results and summed gradients are exchanged at the
   end of a pass (`ranks`), after all have reported that they came that far.
11. Offloaded outputs lie in host memory, and so do their gradients: tiles write their rectangles there, the reader
   brings boxes back, as of an image in host memory.
12. Tiles of one class that read the same constants are computed once (`equal_tiles`): forward copies the results,
   and backward pulls the sum of their gradients back through one of them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxstream.errors import StreamError
from fxstream.machine.operators import untraced
from fxstream.runtime.backward import Backward
from fxstream.runtime.forward import Forward
from fxstream.runtime.reading.prefetch import Image
from fxstream.runtime.stream import Stream
from fxstream.runtime.tile_run import Inputs

__all__ = ["refuse_transforms", "stream_map"]


def stream_map(stream: Stream, tensors: Sequence[Image]) -> tuple[torch.Tensor, ...]:
    """The outputs of the segment on the spatial and whole inputs `tensors`, differentiable in all of them.

    Raises `StreamError` under functional transforms.
    """
    refuse_transforms()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _StreamMap.apply(stream, *tensors)  # type: ignore[no-untyped-call, no-any-return]
    return _run_forward(Forward(stream, tensors), Inputs.of(stream, tensors).device)


def refuse_transforms() -> None:
    """Raise `StreamError` under functional transforms."""
    if torch._C._are_functorch_transforms_active():
        raise StreamError(
            "torch.func transforms (grad, vmap, jvp) cannot go through a stream: use loss.backward() or"
            " torch.autograd.grad, or call the plain model"
        )


@torch.no_grad()
def _run_forward(forward: Forward, device: torch.device) -> tuple[torch.Tensor, ...]:
    with _Autocast.now(device).restored():
        return forward.run()


@dataclass(frozen=True, slots=True)
class _Autocast:
    """The autocast state that forward ran under (rule 4)."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> _Autocast:
        return cls(device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        if not self.enabled and not torch.is_autocast_enabled(self.device):
            yield
            return
        with torch.autocast(self.device, enabled=self.enabled, dtype=self.dtype, cache_enabled=False):
            yield


class _StreamMap(torch.autograd.Function):
    """The segment as one function of its spatial and whole inputs."""

    @staticmethod
    def forward(ctx: Any, stream: Stream, *tensors: Image) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        device = Inputs.of(stream, tensors).device
        forward = Forward(stream, tensors, ctx.needs_input_grad[1:])
        outputs = _run_forward(forward, device)
        ctx.runs, ctx.others = forward.runs, forward.others
        inputs = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        ctx.save_for_backward(*inputs)
        ctx.arrays = {k: image for k, image in enumerate(tensors) if not isinstance(image, torch.Tensor)}
        ctx.stream = stream
        ctx.autocast = _Autocast.now(device)
        ctx.dtypes = tuple(output.dtype for output in outputs)
        ctx.states = [_State.of(tensor) for tensor in inputs]
        pairs = zip(outputs, stream.sources, strict=True)
        constant = (out for out, sources in pairs if not any(tensors[i].requires_grad for i in sources))
        ctx.mark_non_differentiable(*constant)
        return outputs

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise StreamError(
                "a stream has no double backward: its tiles are recomputed and released during backward, so"
                " create_graph=True is not possible; call the plain model for higher derivatives"
            )
        labels = [label for k, label in enumerate(ctx.stream.labels) if k not in ctx.arrays]
        for label, state in zip(labels, ctx.states, strict=True):
            state.check(label)
        saved = iter(ctx.saved_tensors)
        tensors = [ctx.arrays[k] if k in ctx.arrays else next(saved) for k in range(len(ctx.stream.labels))]
        with ctx.autocast.restored():
            backward = Backward(ctx.stream, tensors, ctx.needs_input_grad[1:], ctx.dtypes)
            return (None, *backward.run(ctx.runs, ctx.others, grads))


@dataclass(frozen=True, slots=True)
class _State:
    """What tells whether a saved tensor still holds the values of forward: its version, and where its data lies.

    While `storage` exists no other storage has its number, whether or not its data is still there.
    """

    tensor: weakref.ref[torch.Tensor]
    version: int | None
    storage: StorageWeakRef | None
    layout: tuple[object, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _State:
        """The state of a tensor now; one without a storage of its own has no place."""
        version = None if tensor.is_inference() else tensor._version
        try:
            storage = StorageWeakRef(tensor.untyped_storage())
        except (NotImplementedError, RuntimeError):  # a sparse tensor, a subclass that wraps others
            return cls(weakref.ref(tensor), version, None, ())
        layout = (tensor.storage_offset(), tensor.shape, tensor.stride())
        return cls(weakref.ref(tensor), version, storage, layout)

    def check(self, label: str) -> None:
        """Refuse where the tensor, which is called `label`, was changed since, if it still exists."""
        tensor = self.tensor()
        if tensor is None:
            return
        now, what = _State.of(tensor), ""
        if self.version is not None and now.version != self.version:
            what = "changed in place"
        elif (now.storage, now.layout) != (self.storage, self.layout):
            what = "given other data"
        if what:
            raise StreamError(
                f"`{label}` was {what} between forward and backward, and the stream must recompute with the values"
                " of forward: take the optimiser's step, and set or move weights, after backward"
            )
