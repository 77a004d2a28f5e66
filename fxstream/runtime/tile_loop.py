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
9. Where memory runs out, kept graphs are given up first; then the tile is halved, and the halves run instead,
   now and in later calls. What a tile yields is added to the results in steps that happen or do not, after all
   of it is there, so that nothing is counted twice. A halved tile that had a partial result gets that of its
   halves in its place, and the gradients of these.
10. Where ranks share the tiles, each runs its own; maps, partial results and summed gradients are exchanged at the
   end of a pass (`sharing`), after all have told that they came that far.
11. Offloaded outputs lie in host memory, and so do their gradients: tiles write their rectangles there, the reader
   brings boxes back, as of an image in host memory.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from fxstream.errors import StreamError, StreamingWarning
from fxstream.geometry.box import Box
from fxstream.machine.copies import to_device
from fxstream.machine.heap import heap_held
from fxstream.machine.out_of_memory import Exhausted, attempt
from fxstream.runtime.accumulate import Sums
from fxstream.runtime.prefetch import Leaf, Reader
from fxstream.runtime.ranks import Ranks, Rows
from fxstream.runtime.schedule import Stream, TileCall

__all__ = ["stream_map"]

T = TypeVar("T")
HOST = torch.device("cpu")


def stream_map(stream: Stream, tensors: Sequence[Leaf]) -> tuple[torch.Tensor, ...]:
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
    return _Forward(stream, tensors).run()


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A tile that ran with recording: what it read of the leaves, the small tensors, its results."""

    tiles: list[torch.Tensor]
    smalls: list[torch.Tensor]
    results: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The leaves and the small tensors of one call of a segment, without their history, and where it computes."""

    leaves: tuple[Leaf, ...]
    smalls: tuple[torch.Tensor, ...]
    device: torch.device

    @classmethod
    def of(cls, stream: Stream, tensors: Sequence[Leaf]) -> _Inputs:
        bare = [tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]
        leaves, smalls = tuple(bare[: stream.leaf_count]), tuple(bare[stream.leaf_count :])
        # A leaf may lie in host memory; what is small lies where the model is.
        return cls(leaves, smalls, (*smalls, *leaves)[0].device)  # type: ignore[arg-type]

    def run(
        self, stream: Stream, call: TileCall, tiles: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor | None, ...]:
        """The results of one tile, without recording."""
        return stream.programs[call.program].run(*tiles, *self.smalls, *stream.tables(call, self.device))

    def recorded(
        self,
        stream: Stream,
        call: TileCall,
        given: Sequence[torch.Tensor],
        wanted: Sequence[bool],
        program: Callable[..., tuple[torch.Tensor, ...]],
    ) -> _Recorded:
        """One tile with recording, for gradients of the inputs that are wanted."""
        with torch.enable_grad():
            tiles = [tile.requires_grad_(wants) for tile, wants in zip(given, wanted, strict=False)]
            own = zip(self.smalls, wanted[len(tiles) :], strict=True)
            smalls = [small.detach().requires_grad_(wants) for small, wants in own]
            return _Recorded(tiles, smalls, program(*tiles, *smalls, *stream.tables(call, self.device)))


@dataclass(slots=True, eq=False)
class _Turn:
    """One tile of one call of a segment: its partial results of reductions by output, its graph if it is kept."""

    call: TileCall
    partials: dict[int, torch.Tensor]
    recorded: _Recorded | None = None
    gradients: dict[int, torch.Tensor] | None = None


Others = dict[int, tuple[Rows, Rows]]
"""The partial results of the ranks before and behind this one, by output."""


class _Forward:
    """Rule 1: all tiles, without recording but for those that are kept (rule 6), where gradients are wanted."""

    def __init__(self, stream: Stream, tensors: Sequence[Leaf], wanted: Sequence[bool] | None = None) -> None:
        self._stream, self._wanted = stream, wanted
        self._inputs = _Inputs.of(stream, tensors)
        self._outputs: dict[int, torch.Tensor] = {}
        self.turns: list[_Turn] = []
        self.others: Others = {}

    @torch.no_grad()
    def run(self) -> tuple[torch.Tensor, ...]:
        """The whole outputs; `turns` then has what the tiles leave for backward."""
        stream = self._stream
        self._outputs |= {k: torch.empty(0) for k in stream.sinks}
        with _Ambient.now(self._inputs.device).restored():
            with stream.settled():
                self._run_tiles([call for call in stream.calls if not self._is_written(call)])
            if stream.ranks is not None:
                self._exchange(stream.ranks)
            for k in stream.combined:
                before, behind = self.others.get(k, ([], []))
                rows = [*before, *_rows(self.turns, k), *behind]
                self._outputs[k] = _persistent(stream, functools.partial(_combined, stream, k, rows))
        return tuple(output for _, output in sorted(self._outputs.items()))

    def _run_tiles(self, calls: list[TileCall]) -> None:
        reading = Reader(self._inputs.leaves, calls, self._inputs.device)
        with reading as reader, heap_held(self._inputs.device), self._stream.watched("forward") as tell:
            while len(self.turns) < len(calls):
                done = attempt(functools.partial(self._turn, reader, *calls[len(self.turns) :][:2]))
                if isinstance(done, Exhausted):
                    self._relieve(calls, done)
                else:
                    self.turns.append(done)
                    tell(len(self.turns), len(calls))

    def _exchange(self, ranks: Ranks) -> None:
        """Complete the maps of which this rank has some tiles; partial results of the others."""
        stream = self._stream
        for k, shape in enumerate(stream.outputs):
            if k in stream.combined:
                own = _rows(self.turns, k)
                self.others[k] = ranks.gather_rows([row for row, _ in own], [count for _, count in own])
                continue
            if k not in self._outputs:  # no tile of it is this rank's
                self._outputs[k] = torch.empty(shape.shape, dtype=shape.dtype, device=self._inputs.device)
            ranks.exchange(self._outputs[k], stream.owned_by_ranks(k))

    def _is_written(self, call: TileCall) -> bool:
        """Whether everything that a tile yields was written before."""
        stream = self._stream
        return bool(stream.sinks) and all(
            owned is None
            or (k in stream.sinks and stream.sinks[k].is_written(Box.of(owned, stream.outputs[k].shape)))
            for k, owned in enumerate(call.outputs)
        )

    def _turn(self, reader: Reader, call: TileCall, following: TileCall | None = None) -> _Turn:
        """Run one tile and write its rectangles."""
        stream, given = self._stream, reader.read(call, following)
        recorded = None
        results: Sequence[torch.Tensor | None]
        if call.is_kept and self._wanted is not None:
            program = stream.programs[call.program].run
            recorded = self._inputs.recorded(stream, call, given, self._wanted, program)
            results = recorded.results
        else:
            results = self._inputs.run(stream, call, given)
        partials = {}
        for k, (tile, owned) in enumerate(zip(results, call.outputs, strict=True)):
            if tile is None or owned is None:
                continue
            if k in stream.sinks:
                stream.sinks[k].write(Box.of(owned, stream.outputs[k].shape), tile)
            elif k in stream.combined:
                partials[k] = tile.detach()
            elif tile.shape == stream.outputs[k].shape and k not in stream.offloaded:
                self._outputs[k] = tile.detach()
            else:
                if k not in self._outputs:
                    place = HOST if k in stream.offloaded else tile.device
                    self._outputs[k] = _allocate(tile, stream.outputs[k].shape, place)
                self._outputs[k][owned] = to_device(tile, self._outputs[k].device)
        return _Turn(call, partials, recorded)

    def _relieve(self, calls: list[TileCall], exhausted: Exhausted) -> None:
        """Rule 9: give up kept graphs, or halve the tile that comes next."""
        now = len(self.turns)
        if self._wanted is not None and any(call.is_kept for call in calls):
            calls[:] = [replace(call, is_kept=False) for call in calls]
            for turn, call in zip(self.turns, calls, strict=False):
                turn.call, turn.recorded = call, None
        else:
            calls[now : now + 1] = _halved(self._stream, calls[now], exhausted)
        self._stream.calls = tuple(calls)


def _halved(stream: Stream, call: TileCall, exhausted: Exhausted) -> tuple[TileCall, ...]:
    """Two tiles in the place of one, told once per segment. Raises `StreamError` where nothing smaller exists."""
    halves = stream.halves(call)
    plan = stream.plan
    if not halves:
        raise StreamError(
            f"out of memory in `{plan.segment.name}` ({plan.first} .. {plan.last}), which cannot run in smaller"
            f" parts: {exhausted.message}. Plan with less: memory= below what the device has free"
        )
    if not stream.is_reduced:
        stream.is_reduced = True
        warnings.warn(
            f"`{plan.segment.name}` ({plan.first} .. {plan.last}) ran out of memory: its tiles are made smaller"
            " where needed, with the same results. A smaller memory= plans for it",
            StreamingWarning,
            stacklevel=2,
        )
    return halves


def _persistent(stream: Stream, function: Callable[[], T]) -> T:
    """The function's result, tried again where memory ran out. Raises `StreamError` if it does again."""
    done = attempt(function)
    if isinstance(done, Exhausted):
        done = attempt(function)
    if isinstance(done, Exhausted):
        raise StreamError(
            f"out of memory for the results of `{stream.plan.segment.name}`: {done.message}. Plan with less:"
            " memory= below what the device has free"
        )
    return done


def _rows(turns: Sequence[_Turn], k: int) -> Rows:
    """The partial results of a reduction and how many positions each is of."""
    return [(turn.partials[k], turn.call.positions[k]) for turn in turns if k in turn.partials]


def _combined(stream: Stream, k: int, rows: Rows) -> torch.Tensor:
    """Rule 7: the whole result of a reduction."""
    partials = torch.stack([row for row, _ in rows])
    counts = torch.tensor([count for _, count in rows], dtype=torch.float64, device=partials.device)
    return stream.combined[k](partials, counts).to(stream.outputs[k].dtype)


def _find_gradients(
    stream: Stream, turns: Sequence[_Turn], others: Others, grads: Mapping[int, torch.Tensor]
) -> None:
    """Give those of the turns that have none yet the gradients of their partial results (rule 7)."""
    found: dict[_Turn, dict[int, torch.Tensor]] = {turn: {} for turn in turns if turn.gradients is None}
    for k, grad in grads.items():
        having = [turn for turn in turns if k in turn.partials]
        if not having:
            continue
        with torch.enable_grad():
            own = [(row.detach().requires_grad_(), count) for row, count in _rows(having, k)]
            before, behind = others.get(k, ([], []))
            combined = _combined(stream, k, [*before, *own, *behind])
            of_rows = torch.autograd.grad(combined, [row for row, _ in own], grad)
        for turn, gradient in zip(having, of_rows, strict=True):
            if turn in found:
                found[turn][k] = gradient
    for turn, gradients in found.items():
        turn.gradients = gradients


def _allocate(tile: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An output of the type and memory format of its first tile."""
    layout = torch.contiguous_format
    for channels_last in (torch.channels_last, torch.channels_last_3d):
        rank = 4 if channels_last is torch.channels_last else 5
        if tile.ndim == rank and not tile.is_contiguous() and tile.is_contiguous(memory_format=channels_last):
            layout = channels_last
    return torch.empty(shape, dtype=tile.dtype, device=device, memory_format=layout)


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
    def forward(ctx: Any, stream: Stream, *tensors: Leaf) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        forward = _Forward(stream, tensors, ctx.needs_input_grad[1:])
        outputs, ctx.turns, ctx.others = forward.run(), forward.turns, forward.others
        held = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        ctx.save_for_backward(*held)
        ctx.sources = {k: leaf for k, leaf in enumerate(tensors) if not isinstance(leaf, torch.Tensor)}
        ctx.stream = stream
        ctx.ambient = _Ambient.now(_Inputs.of(stream, tensors).device)
        ctx.dtypes = tuple(output.dtype for output in outputs)
        ctx.versions = [(weakref.ref(t), None if t.is_inference() else t._version) for t in held]
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
        labels = [label for k, label in enumerate(ctx.stream.labels) if k not in ctx.sources]
        _check_unchanged(labels, ctx.versions)
        held = iter(ctx.saved_tensors)
        tensors = [ctx.sources[k] if k in ctx.sources else next(held) for k in range(len(ctx.stream.labels))]
        with ctx.ambient.restored():
            backward = _Backward(ctx.stream, tensors, ctx.needs_input_grad[1:], ctx.dtypes)
            return (None, *backward.run(ctx.turns, ctx.others, grads))


def _check_unchanged(labels: Sequence[str], versions: Sequence[tuple[Any, int | None]]) -> None:
    """Refuse where a saved tensor was changed in place since forward, naming it."""
    for label, (reference, version) in zip(labels, versions, strict=True):
        tensor = reference()
        if tensor is not None and version is not None and tensor._version != version:
            raise StreamError(
                f"`{label}` was changed in place between forward and backward, and the stream must recompute"
                " with the values of forward: take the optimiser's step after backward"
            )


class _Backward:
    """Rule 2: pull the gradients of the outputs back through one tile after the other, the last one first."""

    def __init__(
        self, stream: Stream, tensors: Sequence[Leaf], wanted: Sequence[bool], dtypes: Sequence[torch.dtype]
    ) -> None:
        self._stream, self._wanted, self._dtypes = stream, wanted, dtypes
        self._inputs = _Inputs.of(stream, tensors)
        is_single = len(stream.calls) == 1 and stream.ranks is None
        self._sums = Sums(self._inputs.leaves, self._inputs.smalls, wanted, is_single)
        self._everything: list[_Turn] = []
        self._combine: Callable[[], None] = lambda: None

    def run(
        self, turns: Sequence[_Turn], others: Others, grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The gradients of the inputs. Kept tiles are the last ones, and are freed one by one."""
        stream = self._stream
        combined = {k: grad for k in stream.combined if (grad := grads[k]) is not None}
        self._everything = list(turns)
        self._combine = functools.partial(_find_gradients, stream, self._everything, others, combined)
        for turn in turns:  # backward may come again
            turn.gradients = None
        with stream.settled():
            _persistent(stream, self._combine)
            self._pull_back_all(list(turns), grads)
        return _persistent(stream, functools.partial(self._sums.gradients, stream.ranks))

    def _pull_back_all(self, turns: list[_Turn], grads: Sequence[torch.Tensor | None]) -> None:
        waiting = [turn.call for turn in reversed(turns) if turn.recorded is None]
        count = 0
        reading = Reader(self._inputs.leaves, waiting, self._inputs.device)
        with reading as reader, heap_held(self._inputs.device), self._stream.watched("backward") as tell:
            while turns:
                following = turns[-2].call if len(turns) > 1 and turns[-2].recorded is None else None
                done = attempt(functools.partial(self._pulled_back, turns[-1], grads, reader, following))
                if isinstance(done, Exhausted):
                    self._relieve(turns, reader, done)
                    continue
                turns.pop().recorded = None
                while done:
                    _persistent(self._stream, done.pop())
                count += 1
                tell(count, count + len(turns))

    def _relieve(self, turns: list[_Turn], reader: Reader, exhausted: Exhausted) -> None:
        """Rule 9: give up kept graphs, or put two halves in the place of the last tile."""
        if any(turn.recorded is not None for turn in turns):
            for turn in turns:
                turn.recorded = None
            self._stream.calls = tuple(replace(call, is_kept=False) for call in self._stream.calls)
            return
        last = turns.pop()
        halves = self._halves(last, reader, exhausted)
        turns += halves
        place = self._everything.index(last)
        self._everything[place : place + 1] = halves
        _persistent(self._stream, self._combine)
        calls = list(self._stream.calls)
        if last.call in calls:  # another call of the segment may have changed them since
            place = calls.index(last.call)
            calls[place : place + 1] = [half.call for half in halves]
            self._stream.calls = tuple(calls)

    def _halves(self, turn: _Turn, reader: Reader, exhausted: Exhausted) -> list[_Turn]:
        """The halves of a tile with their partial results; halves of halves where these run out of memory too."""
        found = []
        for call in _halved(self._stream, turn.call, exhausted):
            done = attempt(functools.partial(self._half, call, tuple(turn.partials), reader))
            if isinstance(done, Exhausted):
                found += self._halves(_Turn(call, turn.partials), reader, done)
            else:
                found.append(done)
        return found

    def _half(self, call: TileCall, reductions: Sequence[int], reader: Reader) -> _Turn:
        if not any(call.positions[k] for k in reductions):
            return _Turn(call, {})
        with torch.no_grad():
            results = self._inputs.run(self._stream, call, reader.read(call))
        return _Turn(call, {k: tile for k in reductions if (tile := results[k]) is not None})

    def _pulled_back(
        self,
        turn: _Turn,
        grads: Sequence[torch.Tensor | None],
        reader: Reader,
        following: TileCall | None,
    ) -> list[Callable[[], None]]:
        """The steps that add what one tile gives, which is run again unless its graph was kept."""
        stream, call, partial = self._stream, turn.call, turn.gradients or {}
        flowing: list[tuple[int, torch.Tensor]] = []
        for k, (grad, owned) in enumerate(zip(grads, call.outputs, strict=True)):
            if grad is not None and owned is not None:
                flowing.append((k, partial[k] if k in stream.combined else grad[owned]))
        if not flowing:
            return []
        recorded = turn.recorded
        if recorded is None:
            given, program = reader.read(call, following), stream.programs[call.program].run_again
            recorded = self._inputs.recorded(stream, call, given, self._wanted, program)
        results = recorded.results
        flowing = [(k, grad.to(self._inputs.device)) for k, grad in flowing]
        for k, grad in flowing:
            same_type = k in stream.combined or results[k].dtype == self._dtypes[k]
            if not same_type or results[k].shape != grad.shape:
                raise StreamError(
                    f"a recomputed tile of `{stream.plan.segment.outputs[k]}` is {results[k].dtype}"
                    f" {list(results[k].shape)}, but forward had {self._dtypes[k]} {list(grad.shape)}"
                )
        pulled = [(results[k], grad) for k, grad in flowing if results[k].requires_grad]
        inputs = (*recorded.tiles, *recorded.smalls)
        places = [place for place, tensor in enumerate(inputs) if tensor.requires_grad]
        if not pulled or not places:
            return []
        outputs, slices = zip(*pulled, strict=True)
        found = torch.autograd.grad(outputs, [inputs[place] for place in places], slices, allow_unused=True)
        boxes = (*call.leaves, *(None for _ in self._inputs.smalls))
        return [
            self._sums.addition(place, boxes[place], gradient)
            for place, gradient in zip(places, found, strict=True)
            if gradient is not None
        ]
