"""Failed allocations: told apart from other errors, and turned into results that keep no memory alive."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from fxstream.machine.device import release_cached

__all__ = ["OutOfMemory", "catch_oom"]

T = TypeVar("T")

MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "alloc_failed",
    "could not create a memory object",
)
"""Parts of the messages of allocators without an error class: torch on the CPU, oneDNN, cuBLAS and cuDNN."""


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """An allocation that failed, in the allocator's words."""

    message: str


def catch_oom(function: Callable[[], T]) -> T | OutOfMemory:
    """The function's result, or `OutOfMemory` where an allocation failed; then nothing keeps its frames alive.

    >>> def fails():
    ...     raise torch.OutOfMemoryError("CUDA out of memory")
    >>> catch_oom(fails)
    OutOfMemory(message='CUDA out of memory')
    """
    try:
        return function()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        failure = OutOfMemory((str(error) or type(error).__name__).splitlines()[0])
    gc.collect()
    release_cached()
    return failure


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(message in str(error).lower() for message in MESSAGES)
