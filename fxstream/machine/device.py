"""Memory of a device: how much there is, and what a request for memory means."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["budget_of", "free_bytes", "total_bytes"]

FREE_SHARE = 0.8
"""Of what is free this share is used where the user names no amount: allocators round and fragment."""
LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Limit and use of a container, in both forms that Linux knows."""


def budget_of(memory: float | None, device: torch.device) -> int:
    """Bytes: the number itself, that share of the device where it is below one, most of what is free for None."""
    if memory is None:
        return int(FREE_SHARE * free_bytes(device))
    return int(memory * total_bytes(device)) if memory < 1 else int(memory)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_available(), *(limit - used for limit, used in _limits())])


def total_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([installed, *(limit for limit, _ in _limits())])


def _available() -> int:
    """What the kernel can give without swapping; without its word, the pages that nothing uses."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits() -> list[tuple[int, int]]:
    found = []
    for limit, used in LIMITS:
        try:
            found.append((int(limit.read_text(encoding="ascii")), int(used.read_text(encoding="ascii"))))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found
