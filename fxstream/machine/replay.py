"""Work that a device is given once and does again in one launch, without Python: CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

__all__ = ["Replayer", "can_replay"]

ONE = threading.Lock()
"""One replay is made at a time in a process."""


def can_replay(device: torch.device) -> bool:
    """Whether a device, which need not be present, has replays."""
    return device.type == "cuda"


class Replayer:
    """Makes replays on one device, in memory that they share: only one runs at a time.

    They belong to the stream on which this was made. A replay reads and writes the tensors that its function read
    and wrote, where they lay; what the function makes for itself is memory of the replays as long as one exists:
    `bytes` in all.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self.bytes = 0

    @staticmethod
    def of(device: torch.device) -> Replayer | None:
        """One for the current stream of a device; None where the device has no replays."""
        return Replayer(device) if can_replay(device) else None

    @property
    def is_current(self) -> bool:
        """Whether work is asked of the stream of the replays, and done: not itself made into one."""
        with torch.cuda.device(self._device):
            is_stream = torch.cuda.current_stream() == self._stream
            return is_stream and not torch.cuda.is_current_stream_capturing()

    def replay_of(self, function: Callable[[], None]) -> Callable[[], None]:
        """What does the device's work of a function again. The function is called, and its work is not done.

        It ran before, so that libraries are loaded and kernels are chosen. Raises `RuntimeError` where it waits
        for the device, or does what cannot be done again.
        """
        graph = torch.cuda.CUDAGraph()
        # In this thread alone: others read boxes of images meanwhile.
        capture = torch.cuda.graph(graph, self._pool, self._side, capture_error_mode="thread_local")
        # The outer stream is set again when a capture ends with an error.
        with ONE, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            with capture:
                function()
            self.bytes += torch.cuda.memory_reserved() - before
        return graph.replay
