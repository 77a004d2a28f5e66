"""How fast machines compute and move memory: measured, or from a table by the type of the device."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch

from fxstream.machine.calibration import LARGE, rates_of
from fxstream.machine.device import free_bytes, is_accelerator, is_present
from fxstream.machine.heap import REUSED, largest_reused, loaded_bytes, malloc_remaps

__all__ = ["DEPTHWISE", "LARGE", "SLOW_VOLUME", "Machine"]

CALIBRATION = 2**31
"""Bytes that have to be free for it to be measured."""
SMALL = 8
"""No more than this part of a memory is left for what is loaded."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How many times the seconds of its plain traffic an operator takes, forward and backward.

    `share` is the part of the device's rate at which it multiplies and accumulates.
    """

    forward: float = 1.0
    backward: float = 2.0
    share: float = 1.0


REPLAYED = 2e-6
"""Seconds between two kernels of a CUDA graph."""
DEPTHWISE = "depthwise convolution"
"""The kind of a convolution of each channel alone; other kinds are names of operators."""
SLOW_VOLUME = "convolution of one small volume"
"""The kind of those that torch has a slow kernel for on the CPU (`kernels.volumes`)."""
CPU = {SLOW_VOLUME: Effort(share=0.2)}
"""On a CPU with AVX-512: 8e9 to 1.9e10 multiply-accumulates per second of 6e10 to 7.5e10 (float32, torch 2.13)."""
H200 = {
    "aten::add": Effort(1.0, 1.0),
    "aten::avg_pool2d": Effort(2.0, 4.0),
    "aten::batch_norm": Effort(1.75, 2.7),
    "aten::group_norm": Effort(3.0, 4.0),
    "aten::layer_norm": Effort(10.0, 10.0),
    "aten::max_pool2d": Effort(3.3, 7.4),
    "aten::upsample_bilinear2d": Effort(10.0, 45.0),
    "fxstream::moments": Effort(6.6, 4.0),
    "fxstream::normalise": Effort(1.75, 2.7),
    DEPTHWISE: Effort(0.5, 17.0, 0.008),
}
"""The efforts of kernels on an NVIDIA H200, from profiles of four networks (bfloat16, channels_last, torch 2.11).

Reading a map for its statistics takes 6.6 times as long as a copy reads it; a depthwise convolution runs at 3e12
multiply-accumulates per second where others reach 3.8e14, and its backward is bound by a slow kernel. None of the
networks had average pooling or group norm: theirs are taken to be like those of their kin.
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """Multiply-accumulates and bytes per second, seconds per operator, bytes per second between ranks.

    `fresh` are bytes per second of newly mapped pages: every allocation of more than `reused` bytes. `host` are
    bytes per second between the device and host memory. `wide_macs` is the rate in 32 bits, that of all types
    where it is None. An operator on `LARGE` elements or more takes `beyond` times as long. `loaded` are bytes of a
    memory that are not for tensors. `efforts` are those of kinds of operators, others have that of `pointwise`.
    Where tiles are replayed an operator of theirs takes `replayed` instead of `call`.
    """

    macs: float
    bandwidth: float
    call: float
    link: float = 1e9
    fresh: float = math.inf
    host: float = math.inf
    reused: int = REUSED
    wide_macs: float | None = None
    beyond: float = 1.0
    loaded: int = 0
    pointwise: Effort = Effort()
    efforts: tuple[tuple[str, Effort], ...] = ()
    replayed: float | None = None

    def effort(self, kind: str) -> Effort:
        """The effort of a kind of operators."""
        return dict(self.efforts).get(kind, self.pointwise)

    @property
    def halves_volumes(self) -> bool:
        """Whether small volumes are convolved in halves, because torch's kernel for one is slow."""
        return SLOW_VOLUME in dict(self.efforts)

    @classmethod
    def of(cls, device: torch.device, is_shared: bool = False) -> Machine:
        """This accelerator, if it is there, as it was measured; otherwise a typical machine of its kind.

        Of typical machines only ratios matter: they weigh recomputation against traffic. So it is where a plan
        `is_shared` with other processes, in which another result may be measured.
        """
        if is_accelerator(device):
            typical = ACCELERATORS.get(device.type, ACCELERATORS["cuda"])
            is_measured = device.type == "cuda" and not is_shared and is_present(device)
            if not is_measured or free_bytes(device) < CALIBRATION:
                return typical
            return replace(typical, **asdict(rates_of(device)))
        threads = torch.get_num_threads()
        fresh = 1.25e9 * threads if malloc_remaps() else math.inf
        rates = 5e10 * threads, 1.25e10 * threads, 1e-5
        efforts = tuple(CPU.items())
        return cls(*rates, fresh=fresh, reused=largest_reused(), loaded=loaded_bytes(), efforts=efforts)

    @property
    def call_of_tile(self) -> float:
        """Seconds per operator of a tile."""
        return self.call if self.replayed is None else self.replayed

    def with_replays(self) -> Machine:
        """The same machine with tiles that are replayed."""
        return replace(self, replayed=REPLAYED)

    def rate(self, dtype: torch.dtype) -> float:
        """Multiply-accumulates per second with results of a type."""
        return self.wide_macs if self.wide_macs is not None and dtype.itemsize >= 4 else self.macs

    def for_tensors(self, memory: int) -> int:
        """Bytes that tensors may take of a memory; a small one is all theirs but for an eighth."""
        return memory - min(self.loaded, memory // SMALL)

    def around_tensors(self, tensors: int) -> int:
        """The memory of which tensors may take so many bytes: the inverse of `for_tensors`."""
        return tensors + min(self.loaded, -(-tensors // (SMALL - 1)))

    def writing(self, count: float) -> float:
        """Seconds to fill a buffer of `count` bytes."""
        return count / self.bandwidth + (count / self.fresh if count > self.reused else 0.0)


ACCELERATORS = {
    "cuda": Machine(
        macs=3.8e14,
        bandwidth=4.3e12,
        call=1.4e-5,
        link=2e11,
        host=2e10,
        wide_macs=4.3e13,
        beyond=20.0,
        pointwise=Effort(1.0, 1.5),
        efforts=tuple(H200.items()),
    ),
}
"""Typical accelerators by type; one that is missing is planned for as the first."""
