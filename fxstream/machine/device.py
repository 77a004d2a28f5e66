"""Devices: which of them are accelerators, how much memory there is, and what a request for memory means.

A device is the host ("cpu", and "meta", which is planned for as the host) or the accelerator that
`torch.accelerator` speaks for. A new accelerator is described here, where torch does not know its memory, in
`copies`, where it copies from pinned host memory, and in the table of `speeds`. All else asks these three.

The host's free and installed memory are asked of the operating system: of Linux and of POSIX, as far as they
answer. Where they do not, an amount of memory in bytes, or a tile, has to be given.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from fxstream.errors import InputError

__all__ = [
    "budget_of",
    "cores",
    "current_device",
    "device_of",
    "free_bytes",
    "is_accelerator",
    "is_idle",
    "is_present",
    "release_cached",
    "synchronize",
    "total_bytes",
]

HOST = frozenset({"cpu", "meta"})
"""Types of devices whose memory is the host's."""
FREE_SHARE = 0.8
"""Of what is free this share is used where the user names no amount: allocators round and fragment."""
UNKNOWN_FREE_SHARE = 0.5
"""Of what is installed this share counts as free where the operating system does not say (macOS)."""
LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Limit and use of a container, in both forms that Linux knows."""
MEMINFO = Path("/proc/meminfo")


def device_of(name: str) -> torch.device:
    """The device of this name, which need not be present. Raises `InputError` for what is no device."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"{name!r} is not a device: use cpu, cuda or cuda:1") from None


def is_accelerator(device: torch.device) -> bool:
    """Whether a device computes in memory of its own, not the host's. It need not be present."""
    return device.type not in HOST


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_idle(device: torch.device) -> bool:
    """Whether all is done that a device was given to do; the host is when it asks."""
    return device.type != "cuda" or torch.cuda.current_stream(device).query()


def is_present(device: torch.device) -> bool:
    """Whether torch can compute on a device of this type here."""
    if not is_accelerator(device):
        return True
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device.type


def current_device(kind: str) -> torch.device:
    """The device of this type ("cpu", "cuda") that this process computes on."""
    device = torch.device(kind)
    return torch.device(kind, torch.accelerator.current_device_index()) if is_accelerator(device) else device


def synchronize(device: torch.device) -> None:
    """Wait for the work that was given to a device; the host's is done already."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def release_cached() -> None:
    """Give memory that the accelerator's allocator holds without use back to the device, if there is one."""
    if torch.accelerator.current_accelerator() is not None:
        with contextlib.suppress(RuntimeError):  # one whose allocator keeps nothing
            torch.accelerator.empty_cache()


def budget_of(memory: float | None, device: torch.device) -> int:
    """Bytes: the number itself, that share of all memory of the device up to one, most of what is free for None.

    Raises `InputError` where the device's memory has to be known for that, and is not.
    """
    if memory is None:
        return int(FREE_SHARE * free_bytes(device))
    return int(memory * total_bytes(device)) if isinstance(memory, float) and memory <= 1 else int(memory)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; what its allocator holds without use is free."""
    if is_accelerator(device):
        free, _ = _accelerator_memory(device)
        return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return min([_available(), *(limit - used for limit, used in _limits())])


def total_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if is_accelerator(device):
        return _accelerator_memory(device)[1]
    return min([_installed(), *(limit for limit, _ in _limits())])


def _accelerator_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free on an accelerator for all processes, and in all."""
    if not is_present(device):
        raise InputError(
            f"torch finds no {device.type} device here: give the memory in bytes, as '8GiB', or a tile"
        )
    return torch.accelerator.get_memory_info(device)


def _installed() -> int:
    installed = _pages("SC_PHYS_PAGES")
    if installed is None:
        raise InputError(
            "this system does not say how much memory it has: give the memory in bytes, as '8GiB', or a tile"
        )
    return installed


def _available() -> int:
    """What the kernel can give without swapping; without its word, the pages that nothing uses."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        unused = _pages("SC_AVPHYS_PAGES")
        return int(UNKNOWN_FREE_SHARE * _installed()) if unused is None else unused


def _pages(name: str) -> int | None:
    """Bytes of the pages that `os.sysconf` counts under a name; None where it does not know it."""
    try:
        pages = os.sysconf(name)
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf, macOS not every name
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None


def _limits() -> list[tuple[int, int]]:
    limits = []
    for limit, used in LIMITS:
        try:
            limits.append((int(limit.read_text(encoding="ascii")), int(used.read_text(encoding="ascii"))))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return limits
