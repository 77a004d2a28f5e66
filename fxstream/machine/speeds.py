"""How fast typical machines compute and move memory: a table by the type of the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fxstream.machine.device import is_accelerator
from fxstream.machine.heap import REUSED, largest_reused, malloc_remaps

__all__ = ["Machine"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Multiply-accumulates and bytes per second, seconds per operator, bytes per second between ranks.

    `fresh` are bytes per second of newly mapped pages: every allocation of more than `reused` bytes. `host` are
    bytes per second between the device and host memory.
    """

    macs: float
    bandwidth: float
    call: float
    link: float = 1e9
    fresh: float = math.inf
    host: float = math.inf
    reused: int = REUSED

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """A typical machine of this kind. Only ratios matter: they weigh recomputation against traffic."""
        if is_accelerator(device):
            return ACCELERATORS.get(device.type, ACCELERATORS["cuda"])
        threads = torch.get_num_threads()
        fresh = 1.25e9 * threads if malloc_remaps() else math.inf
        return cls(5e10 * threads, 1.25e10 * threads, 1e-5, fresh=fresh, reused=largest_reused())

    def writing(self, count: float) -> float:
        """Seconds to fill a buffer of `count` bytes."""
        return count / self.bandwidth + (count / self.fresh if count > self.reused else 0.0)


ACCELERATORS = {
    "cuda": Machine(macs=5e13, bandwidth=2e12, call=3e-5, link=2e11, host=2e10),
}
"""Typical accelerators by type; one that is missing is planned for as the first."""
