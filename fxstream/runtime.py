"""The tile loop and its gradient. The only file with grad mode, autocast and autograd.

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
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxstream.errors import StreamError
from fxstream.stream import Stream, Subscript, TileCall

__all__ = ["stream_map"]


def stream_map(stream: Stream, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of the segment on the leaves and small tensors `tensors`, differentiable in all of them.

    Raises `StreamError` under functional transforms.
    """
    if torch._C._are_functorch_transforms_active():
        raise StreamError(
            "torch.func transforms (grad, vmap, jvp) cannot go through a stream: use loss.backward() or"
            " torch.autograd.grad, or call the plain model"
        )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _StreamMap.apply(stream, *tensors)  # type: ignore[no-untyped-call, no-any-return]
    return _forward(stream, tensors).outputs


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A tile that ran with recording: what it read of the leaves, the small tensors, its results."""

    tiles: list[torch.Tensor]
    smalls: list[torch.Tensor]
    results: tuple[torch.Tensor, ...]


def _recorded(
    stream: Stream,
    call: TileCall,
    leaves: Sequence[torch.Tensor],
    smalls: Sequence[torch.Tensor],
    wanted: Sequence[bool],
    program: Callable[..., tuple[torch.Tensor, ...]],
) -> _Recorded:
    """Run one tile with recording, for gradients of the inputs that are wanted."""
    with torch.enable_grad():
        tiles = [
            tile.requires_grad_(wants)
            for tile, wants in zip(stream.tile_inputs(call, leaves), wanted, strict=False)
        ]
        own = [small.detach().requires_grad_(w) for small, w in zip(smalls, wanted[len(tiles) :], strict=True)]
        return _Recorded(tiles, own, program(*tiles, *own, *stream.tables(call, (*leaves, *smalls)[0].device)))


@dataclass(frozen=True, slots=True)
class _Done:
    """What forward leaves: the outputs, the recorded tiles that are kept, the partial results of reductions."""

    outputs: tuple[torch.Tensor, ...]
    kept: dict[int, _Recorded]
    partials: dict[int, torch.Tensor]


@torch.no_grad()
def _forward(stream: Stream, tensors: Sequence[torch.Tensor], wanted: Sequence[bool] | None = None) -> _Done:
    """Rule 1: all tiles, without recording but for those that are kept (rule 6), where gradients are wanted."""
    leaves = [tensor.detach() for tensor in tensors[: stream.leaf_count]]
    smalls = [tensor.detach() for tensor in tensors[stream.leaf_count :]]
    outputs: dict[int, torch.Tensor] = {}
    parts: dict[int, list[torch.Tensor]] = {k: [] for k in stream.combined}
    kept: dict[int, _Recorded] = {}
    with _Ambient.now(tensors[0].device).restored():
        for i, call in enumerate(stream.calls):
            if call.is_kept and wanted is not None:
                kept[i] = _recorded(stream, call, leaves, smalls, wanted, stream.programs[call.program].forward)
                tiles = kept[i].results
            else:
                tables = stream.tables(call, tensors[0].device)
                tiles = stream.programs[call.program].forward(*stream.tile_inputs(call, leaves), *smalls, *tables)
            for k, (tile, owned) in enumerate(zip(tiles, call.outputs, strict=True)):
                if owned is None:
                    continue
                if k in parts:
                    parts[k].append(tile.detach())
                    continue
                if tile.shape == stream.outputs[k].shape:
                    outputs[k] = tile.detach()
                    continue
                if k not in outputs:
                    outputs[k] = _allocate(tile, stream.outputs[k].shape)
                outputs[k][owned] = tile
        partials = {k: torch.stack(of_tiles) for k, of_tiles in parts.items()}
        outputs |= {k: _combined(stream, k, of_tiles) for k, of_tiles in partials.items()}
    return _Done(tuple(output for _, output in sorted(outputs.items())), kept, partials)


def _combined(stream: Stream, k: int, partials: torch.Tensor) -> torch.Tensor:
    """Rule 7: the whole result of a reduction."""
    owned = [call.positions[k] for call in stream.calls if call.positions[k]]
    counts = torch.tensor(owned, dtype=torch.float64, device=partials.device)
    return stream.combined[k](partials, counts).to(stream.outputs[k].dtype)


def _gradients_of_partials(
    stream: Stream, k: int, partials: torch.Tensor, grad: torch.Tensor
) -> list[torch.Tensor]:
    """The gradients of the partial results of the tiles that own any position (rule 7), in their order."""
    with torch.enable_grad():
        given = partials.detach().requires_grad_()
        (found,) = torch.autograd.grad(_combined(stream, k, given), given, grad)
    return list(found)


def _allocate(tile: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An output of the type, device and memory format of its first tile."""
    layout = torch.contiguous_format
    for channels_last in (torch.channels_last, torch.channels_last_3d):
        rank = 4 if channels_last is torch.channels_last else 5
        if tile.ndim == rank and not tile.is_contiguous() and tile.is_contiguous(memory_format=channels_last):
            layout = channels_last
    return torch.empty(shape, dtype=tile.dtype, device=tile.device, memory_format=layout)


@dataclass(frozen=True, slots=True)
class _Ambient:
    """The autocast state that forward ran under (rule 4)."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> _Ambient:
        return cls(device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        if not self.enabled and not torch.is_autocast_enabled(self.device):
            yield
            return
        with torch.autocast(self.device, enabled=self.enabled, dtype=self.dtype, cache_enabled=False):
            yield


class _StreamMap(torch.autograd.Function):
    """The segment as one function of its leaves and small tensors."""

    @staticmethod
    def forward(ctx: Any, stream: Stream, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        done = _forward(stream, tensors, ctx.needs_input_grad[1:])
        outputs, ctx.kept, ctx.partials = done.outputs, done.kept, done.partials
        ctx.save_for_backward(*tensors)
        ctx.stream = stream
        ctx.ambient = _Ambient.now(tensors[0].device)
        ctx.dtypes = tuple(output.dtype for output in outputs)
        ctx.versions = [(weakref.ref(t), None if t.is_inference() else t._version) for t in tensors]
        ctx.mark_non_differentiable(
            *(
                output
                for output, sources in zip(outputs, stream.sources, strict=True)
                if not any(tensors[source].requires_grad for source in sources)
            )
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise StreamError(
                "a stream has no double backward: its tiles are recomputed and released during backward, so"
                " create_graph=True is not possible; call the plain model for higher derivatives"
            )
        stream: Stream = ctx.stream
        _check_unchanged(stream, ctx.versions)
        tensors = ctx.saved_tensors
        sums = _Sums(stream, tensors, ctx.needs_input_grad[1:])
        with ctx.ambient.restored():
            of_tiles = {
                k: _gradients_of_partials(stream, k, partials, grad)
                for k, partials in ctx.partials.items()
                if (grad := grads[k]) is not None
            }
            for i in reversed(range(len(stream.calls))):  # kept tiles are the last ones
                call = stream.calls[i]
                given = [
                    None if grad is None or owned is None else of_tiles[k].pop() if k in of_tiles else grad[owned]
                    for k, (grad, owned) in enumerate(zip(grads, call.outputs, strict=True))
                ]
                _pull_back(stream, call, sums, given, ctx.dtypes, ctx.kept.pop(i, None))
        return (None, *sums.gradients())


def _check_unchanged(stream: Stream, versions: Sequence[tuple[Any, int | None]]) -> None:
    """Refuse where a saved tensor was changed in place since forward, naming it."""
    for label, (reference, version) in zip(stream.labels, versions, strict=True):
        tensor = reference()
        if tensor is not None and version is not None and tensor._version != version:
            raise StreamError(
                f"`{label}` was changed in place between forward and backward, and the stream must recompute"
                " with the values of forward: take the optimiser's step after backward"
            )


class _Sums:
    """The gradients of all inputs, summed over tiles (rules 2, 3 and 5)."""

    def __init__(self, stream: Stream, tensors: Sequence[torch.Tensor], wanted: Sequence[bool]) -> None:
        count = stream.leaf_count
        self._tensors, self.wanted = tensors, wanted
        self.leaves = [tensor.detach() for tensor in tensors[:count]]
        self.smalls = [tensor.detach() for tensor in tensors[count:]]
        self._sums: list[torch.Tensor | None] = [None] * len(tensors)
        self._single = len(stream.calls) == 1

    def add_leaf(self, leaf: int, box: Subscript, gradient: torch.Tensor) -> None:
        """Add what one tile gives for the box of a leaf that it read."""
        total = self._sums[leaf]
        if self._single and gradient.shape == self.leaves[leaf].shape:
            self._sums[leaf] = gradient
            return
        if total is None:
            total = self._sums[leaf] = torch.zeros_like(self.leaves[leaf])
        total[box] += gradient

    def add_small(self, small: int, gradient: torch.Tensor) -> None:
        """Add what one tile gives for a small tensor."""
        place = len(self.leaves) + small
        if self._single:
            self._sums[place] = gradient
            return
        total = self._sums[place]
        if total is None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._sums[place] = gradient.to(wide, copy=True)
        else:
            total += gradient

    def gradients(self) -> Iterator[torch.Tensor | None]:
        """The sums in the type of their tensor; None where nothing was asked for or nothing flowed."""
        for tensor, wants, total in zip(self._tensors, self.wanted, self._sums, strict=True):
            yield total.to(tensor.dtype) if wants and total is not None else None


def _pull_back(
    stream: Stream,
    call: TileCall,
    sums: _Sums,
    grads: Sequence[torch.Tensor | None],
    dtypes: Sequence[torch.dtype],
    recorded: _Recorded | None,
) -> None:
    """Rule 2 for one tile, which is run again unless its graph was kept; `grads` are those of its own results."""
    flowing = [(k, grad) for k, grad in enumerate(grads) if grad is not None]
    if not flowing:
        return
    if recorded is None:
        program = stream.programs[call.program].recomputation
        recorded = _recorded(stream, call, sums.leaves, sums.smalls, sums.wanted, program)
    tiles, smalls, results = recorded.tiles, recorded.smalls, recorded.results
    pulled = [(results[k], grad) for k, grad in flowing if results[k].requires_grad]
    for k, grad in flowing:
        same_type = k in stream.combined or results[k].dtype == dtypes[k]
        if not same_type or results[k].shape != grad.shape:
            raise StreamError(
                f"a recomputed tile of `{stream.plan.segment.outputs[k]}` is {results[k].dtype}"
                f" {list(results[k].shape)}, but forward had {dtypes[k]} {list(grad.shape)}"
            )
    inputs = [tensor for tensor in (*tiles, *smalls) if tensor.requires_grad]
    if not pulled or not inputs:
        return
    outputs, slices = zip(*pulled, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, slices, allow_unused=True))
    for leaf, tile in enumerate(tiles):
        if tile.requires_grad and (gradient := next(found)) is not None:
            sums.add_leaf(leaf, call.leaves[leaf], gradient)
    for k, small in enumerate(smalls):
        if small.requires_grad and (gradient := next(found)) is not None:
            sums.add_small(k, gradient)
