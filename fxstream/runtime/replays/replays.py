"""Sweeps over tiles in which those of a class are computed by a replay, but for the first.

NOTE [replays]
1. What a tile computes is a function of the whole inputs, the same for all tiles of a sweep, and of tensors of its
   own: boxes, parts of tables, gradients of its results. The first tile of a class computes it operator by
   operator, which shows what comes out. From the second on the function is a replay, which does the same work in
   one launch.
2. A replay reads and writes where it did when it was made. So what it reads is copied into static tensors before,
   the whole inputs once in a sweep; its results are copied into others as a part of it, and hold until the next.
3. Classes, segments, forward and backward share the static tensors and the memory of replays, of the largest each.
   So only one sweep at a time may use them: another one, of another thread or on another stream, computes its
   tiles operator by operator.
4. A replay is of one state of autocast and of torch's choices of kernels, and of one form of every tensor.
5. Functions of the user may do work on the host, which would not be done again: their segments have no replays.
   Nor have tiles whose graphs are kept, each with tensors of its own, and what runs whole.
6. Where one cannot be made, or memory runs out, all are given up for good, with a warning.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxstream.errors import StreamingWarning
from fxstream.machine.device import release_cached
from fxstream.machine.replay import Replayer
from fxstream.runtime.replays.slots import Form, Slots, form_of

__all__ = ["Groups", "Replays", "Results", "Sweep", "Tensors"]

Tensors = Sequence[torch.Tensor]
Results = Sequence[torch.Tensor | None]
Groups = Mapping[str, Tensors]
"""The tensors of one tile: its boxes, parts of tables, gradients of its results."""
Function = Callable[[Tensors, Groups], Results]
"""What a tile computes of the whole inputs and of tensors of its own."""

Key = tuple[str, Hashable, int, tuple[tuple[str, tuple[Form, ...]], ...]]
"""The function, the state it ran in, the forms of its tensors."""

MOST = 512
"""Replays of a device that are kept, and functions whose results are known."""


@dataclass(frozen=True, slots=True)
class _Replay:
    """A function as a replay, with its static tensors."""

    run: Callable[[], None]
    whole: list[torch.Tensor]
    arguments: list[torch.Tensor]
    results: list[torch.Tensor | None]

    def __call__(self, tile: Groups) -> Results:
        _copy_all(self.arguments, [*itertools.chain(*tile.values())])
        self.run()
        return self.results


@dataclass(slots=True)
class _Kept:
    """The replays of one device, by what they are of; the static tensors; the forms of results of what ran."""

    replayer: Replayer
    slots: Slots
    lock: threading.Lock = field(default_factory=threading.Lock)
    replays: OrderedDict[Hashable, _Replay] = field(default_factory=OrderedDict)
    whole: OrderedDict[Hashable, list[torch.Tensor]] = field(default_factory=OrderedDict)
    ran: OrderedDict[Hashable, tuple[Form | None, ...]] = field(default_factory=OrderedDict)
    states: dict[Hashable, int] = field(default_factory=dict)
    is_given_up: bool = False

    @property
    def bytes(self) -> int:
        """What there is of all of it."""
        whole = sum(tensor.nbytes for tensors in self.whole.values() for tensor in tensors)
        return self.replayer.bytes + self.slots.bytes + whole

    def give_up(self) -> None:
        """Give all memory back."""
        self.is_given_up = True
        self.slots.clear()
        for one in (self.replays, self.whole, self.ran):
            one.clear()
        release_cached()


class Replays:
    """The replays of the tiles of one model, on every device that it runs on. Pickled and copied without them."""

    def __init__(self) -> None:
        self._kept: dict[torch.device, _Kept | None] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    @property
    def bytes(self) -> int:
        """What replays and their static tensors have on all devices."""
        return sum(kept.bytes for kept in self._kept.values() if kept is not None)

    @contextlib.contextmanager
    def sweep(
        self, name: str, whole: Tensors, device: torch.device, largest: Mapping[Hashable, int]
    ) -> Iterator[Sweep]:
        """One sweep over the tiles of the segment `name` with these whole inputs.

        `largest` are the most elements that a static tensor has, by its name.
        """
        with self._lock:
            if device not in self._kept:
                replayer = Replayer.of(device)
                self._kept[device] = None if replayer is None else _Kept(replayer, Slots(device))
            kept = self._kept[device]
        if kept is None or not kept.replayer.is_current or not kept.lock.acquire(blocking=False):
            yield Sweep(name, whole)
            return
        try:
            for one, count in largest.items():
                kept.slots.reserve(one, count)
            yield Sweep(name, whole, kept, _state_of(device))
        finally:
            if kept.is_given_up:
                with self._lock:
                    self._kept[device] = None
            kept.lock.release()


class Sweep:
    """One sweep over the tiles of a segment; without what is `kept` every tile runs operator by operator."""

    def __init__(self, name: str, whole: Tensors, kept: _Kept | None = None, state: Hashable = None) -> None:
        self._name, self._whole, self._kept = name, whole, kept
        self._filled: list[torch.Tensor] | None = None
        if kept is not None:  # a number, for the forms of all weights take long to compare at every tile
            self._state = kept.states.setdefault((state, tuple(map(form_of, whole))), len(kept.states))

    def compute(self, kind: str, what: Hashable, tile: Groups, function: Function) -> Results:
        """The results of a function of the whole inputs and a tile's tensors, which hold until the next call.

        Functions of a kind are equal where `what` is.
        """
        if self._kept is None:
            return function(self._whole, tile)
        key = kind, what, self._state, tuple((name, tuple(map(form_of, group))) for name, group in tile.items())
        replay = self._replay(self._kept, key, function)
        if replay is not None:
            self._fill(replay.whole)
            return replay(tile)
        results = function(self._whole, tile)
        if self._kept is not None:
            _put(self._kept.ran, key, tuple(None if one is None else form_of(one) for one in results))
        return results

    def lasting(self, result: torch.Tensor) -> torch.Tensor:
        """A result that holds on."""
        return result if self._kept is None else result.clone()

    def give_up(self, reason: str) -> bool:
        """Give the memory of replays back for good; whether there are any."""
        kept = self._kept
        if kept is None or not (kept.replays or kept.whole):
            return False
        self._kept = None
        kept.give_up()
        warnings.warn(
            f"`{self._name}`: tiles run operator by operator from now on, without CUDA graphs: {reason}",
            StreamingWarning,
            stacklevel=2,
        )
        return True

    def _replay(self, kept: _Kept, key: Key, function: Function) -> _Replay | None:
        """The replay of a function that ran before; None where it did not, or where there can be none."""
        if key in kept.replays or key not in kept.ran:
            return kept.replays.get(key)
        slots, whole, forms = kept.slots, self._static(kept), kept.ran[key]
        tile = {name: [slots.get((name, k), form) for k, form in enumerate(group)] for name, group in key[-1]}
        results = [None if form is None else slots.get((key[0], k), form) for k, form in enumerate(forms)]

        def copied() -> None:
            for slot, result in zip(results, function(whole, tile), strict=True):
                if slot is not None and result is not None:
                    slot.copy_(result)

        try:
            run = kept.replayer.replay_of(copied)
        except RuntimeError as error:  # out of memory is one
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        else:
            _put(kept.replays, key, _Replay(run, whole, [*itertools.chain(*tile.values())], results))
            return kept.replays[key]
        self.give_up(reason)
        return None

    @torch.inference_mode(False)
    def _static(self, kept: _Kept) -> list[torch.Tensor]:
        """The static tensors of the whole inputs."""
        if self._state not in kept.whole:
            _put(kept.whole, self._state, [torch.empty_like(tensor) for tensor in self._whole])
        return kept.whole[self._state]

    def _fill(self, static: list[torch.Tensor]) -> None:
        """Copy the whole inputs, once in a sweep."""
        if self._filled is not static:
            _copy_all(static, self._whole)
            self._filled = static


def _copy_all(to: Tensors, tensors: Tensors) -> None:
    if to:
        torch._foreach_copy_(list(to), list(tensors))


def _put(cache: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    """A new entry; the oldest leave where they are too many."""
    cache[key] = value
    while len(cache) > MOST:
        cache.popitem(last=False)


def _state_of(device: torch.device) -> Hashable:
    """What of torch's state chooses types and kernels."""
    kind, backends = device.type, torch.backends
    return (
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.are_deterministic_algorithms_enabled(),
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        backends.cudnn.enabled,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
    )
