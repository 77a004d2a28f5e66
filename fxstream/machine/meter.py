"""Measuring: the peak of live tensor bytes and the time of a step.

The allocator of an accelerator counts its peak. On the host resident memory is noisy and depends on the allocator:
`PeakMemory` counts the bytes of all tensor storages that operators create while it is active, each once for as
long as it lives. Workspaces inside an operator are not counted.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxstream.machine.device import is_accelerator, synchronize

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Measured", "PeakMemory", "measure", "resident_bytes", "resident_now"]

STATM = Path("/proc/self/statm")
"""Pages of this process, on Linux."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors created inside the context; `peak` is their largest sum.

    >>> with PeakMemory() as memory:
    ...     x = torch.zeros(1000)
    ...     del x
    ...     y = torch.zeros(10)
    >>> memory.peak, memory.live
    (4000, 40)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {
            id(leaf.untyped_storage())
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in before:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._counted or storage.device.type == "meta":  # fake tensors have no memory
            return
        self._counted.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: its result, seconds, and the peak of the bytes that it allocated."""

    result: Any
    seconds: float
    peak_bytes: int


def measure(step: Callable[[], Any], device: torch.device | None = None) -> Measured:
    """Run `step` once; on an accelerator the peak is the allocator's, above what was allocated before."""
    if device is not None and is_accelerator(device):
        synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before, start = torch.accelerator.memory_allocated(device), time.perf_counter()
        result = step()
        synchronize(device)
        seconds = time.perf_counter() - start
        return Measured(result, seconds, torch.accelerator.max_memory_allocated(device) - before)
    with PeakMemory() as memory:
        start = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - start
    return Measured(result, seconds, memory.peak)


def resident_bytes() -> int:
    """The largest resident memory of this process so far; 0 where the operating system does not say (Windows)."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_now() -> int:
    """The resident memory of this process; the largest so far where the system is not Linux."""
    try:
        return int(STATM.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return resident_bytes()
