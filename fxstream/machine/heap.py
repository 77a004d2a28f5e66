"""Memory of the host: which allocations are new to the process, and the heap that a pass holds on to.

NOTE [memory that is used again]
1. The C library of Linux maps an allocation of more than `REUSED` bytes anew, whatever was freed before, and the
   kernel clears each of its pages at the first use. Smaller ones come from a heap that grows at its end.
2. When the end of that heap is free it goes back to the kernel, so a loop of tiles pays for the same pages with
   every tile, or does not: by what happens to lie at the end. `heap_held` puts a block there that nothing uses;
   below it the memory of one tile stays for the next. What the block lies on is address space until a tile writes
   to it.
3. How large an allocation may be to come from the heap is learned from what is freed, up to `REUSED`.
4. What is free behind a pass stays with the process, in pieces, and is used again by whatever runs next; so the
   process may be larger than its tensors. Where memory is scarce, all of it goes back to the kernel: measured on
   DenseNet-121 within 2 GiB, that is 3.0 instead of 4.1 GiB of process, in 1.15 times the time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

from fxstream.machine.device import free_bytes, total_bytes

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["REUSED", "allocates_afresh", "heap_held"]

REUSED = 32 * 2**20
"""Bytes of the largest allocation that the C library takes from what was freed before (M_MMAP_THRESHOLD)."""
HELD = 2**30
"""Bytes of address space that a pass holds on to: what tiles allocate in pieces up to `REUSED` fits in."""
BLOCK = 2**24
"""Bytes of a block of these: well below what is mapped on its own."""
PLENTY = 0.5
"""Where at least this share of the host's memory is free, a process may keep what it has freed."""


@functools.cache
def allocates_afresh() -> bool:
    """Whether host memory for a large tensor is new to the process each time, and cleared page by page.

    So it is with the C library of Linux as it comes, and not with allocators that keep what was freed. Page faults
    tell: a buffer that is allocated after equal ones were freed has one for every page each time, or not.
    """
    if resource is None:
        return False
    faults = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2 * REUSED, dtype=torch.uint8).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults) > REUSED / resource.getpagesize()


@contextlib.contextmanager
def heap_held(device: torch.device) -> Iterator[None]:
    """Within it, memory of the host that was freed is used again; rule 4 is for what comes behind it."""
    library = _c_library() if device.type == "cpu" and allocates_afresh() else None
    if library is None:
        yield
        return
    library.free(library.malloc(REUSED - BLOCK // 8))  # rule 3
    blocks = sorted(filter(None, (library.malloc(BLOCK) for _ in range(HELD // BLOCK))))
    for block in blocks[:-1]:
        library.free(block)
    try:
        yield
    finally:
        for block in blocks[-1:]:
            library.free(block)
        if free_bytes(device) < PLENTY * total_bytes(device):
            library.malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    """The C library of Linux, or None where it is another."""
    library = ctypes.CDLL(None) if resource is not None else None
    if library is None or not hasattr(library, "malloc_trim"):
        return None
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    return library
