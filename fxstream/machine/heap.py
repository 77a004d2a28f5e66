"""The heap of the host: which allocations are newly mapped pages, and how tiles reuse the pages of others.

NOTE [reused pages]
1. The C library of Linux maps every allocation of more than `REUSED` bytes anew, whatever was freed before, and
   the kernel clears each of its pages at the first use. Smaller ones come from a heap that grows at its top.
2. The C library gives free memory at the top of that heap back to the kernel, so that a loop of tiles may pay for
   the same pages with every tile, depending on what happens to lie at the top. `heap_kept` puts a block there that
   nothing uses; below it the memory of one tile stays for the next. The block is address space, and takes no
   memory until a tile writes to it.
3. The C library learns from freed blocks how large an allocation from the heap may be, up to `REUSED`. The
   threshold never falls again: `heap_kept` changes it for the whole process.
4. What the planning of a size has freed goes back to the kernel, which takes 0.01 to 0.03 s: a process that sees
   hundreds of sizes would grow by it. What is free after a pass stays with the process, in pieces, and is used by
   whatever runs next; so the process may be larger than its tensors. Where memory is scarce, all of it goes back:
   measured on DenseNet-121 within 2 GiB, that is 3.0 instead of 4.1 GiB of process, in 1.15 times the time.
5. With `return_freed` no large tensor comes from the heap: each is mapped anew, and goes back to the kernel when
   it is freed; of the small ones, what is free goes back after every pass. So the process is as large as its
   tensors and what a first call loads and keeps, code and graphs, for which the planner leaves some of a memory.
   It costs the time to map and clear every page.
6. With another C library nothing is done: `malloc_remaps` is False, `heap_kept` and `return_freed` do nothing.
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

__all__ = ["REUSED", "give_back", "heap_kept", "largest_reused", "loaded_bytes", "malloc_remaps", "return_freed"]

REUSED = 32 * 2**20
"""Bytes of the largest allocation that the C library takes from what was freed before (M_MMAP_THRESHOLD)."""
RETURNED = 2**20
"""The same after `return_freed`."""
MMAP_THRESHOLD = -3
"""The number of that parameter for `mallopt` (M_MMAP_THRESHOLD)."""
KEPT = 2**30
"""Bytes of address space that stay mapped during a pass; tiles allocate in them in pieces up to `REUSED`."""
BLOCK = 2**24
"""Bytes of one block of `KEPT`: well below what is mapped on its own."""
LOADED = 64 * 2**20
"""Bytes that a first call loads and keeps: 65 to 80 MiB for networks of 20 to 120 layers."""
SMALLER = 2**20
"""So many bytes a buffer lacks that surely fits where one was freed."""
PLENTY = 0.5
"""Where at least this share of the host's memory is free, a process may keep what it has freed."""


@functools.cache
def malloc_remaps() -> bool:
    """Whether host memory for a large tensor is newly mapped each time, and cleared page by page.

    That holds for the C library of Linux by default, and not for allocators that keep what was freed. It is
    measured: a newly mapped buffer has a page fault for every page, also after larger buffers were freed. (Where
    an equal one was, a small block may lie in what its alignment needs.)
    """
    if resource is None:
        return False
    faults = []
    for i in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2 * REUSED - i * SMALLER, dtype=torch.uint8).fill_(1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults) > REUSED / resource.getpagesize()


_is_returned = False


def return_freed() -> None:
    """From now on, in the whole process, give the memory of a freed tensor back to the kernel at once (rule 5)."""
    global _is_returned
    library = _c_library()
    if library is not None:
        library.mallopt(MMAP_THRESHOLD, RETURNED)
        _is_returned = True


def largest_reused() -> int:
    """Bytes of the largest allocation that the C library takes from what was freed before."""
    return RETURNED if _is_returned else REUSED


def loaded_bytes() -> int:
    """Bytes of a memory that are left to the process for what a first call loads: some after `return_freed`."""
    return LOADED if _is_returned else 0


def give_back(device: torch.device) -> None:
    """Give what is free in the heap back to the kernel, where that is the memory of the device (rule 4)."""
    library = _c_library() if device.type == "cpu" and malloc_remaps() else None
    if library is not None:
        library.malloc_trim(0)


@contextlib.contextmanager
def heap_kept(device: torch.device, tiles: int) -> Iterator[None]:
    """Keep the top of the malloc heap mapped, so that so many tiles reuse pages; a single one has none to reuse.

    Rules 4 and 5 are about the memory afterwards.
    """
    is_used = device.type == "cpu" and (_is_returned or (tiles > 1 and malloc_remaps()))
    library = _c_library() if is_used else None
    if library is None:
        yield
        return
    if _is_returned:
        yield
        library.malloc_trim(0)
        return
    library.free(library.malloc(REUSED - BLOCK // 8))  # rule 3
    blocks = sorted(filter(None, (library.malloc(BLOCK) for _ in range(KEPT // BLOCK))))
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
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # not on Windows
        return None
    if not hasattr(library, "malloc_trim"):
        return None
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    return library
