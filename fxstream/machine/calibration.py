"""How fast an accelerator is, measured once: a second of kernels, kept in the user's cache directory.

NOTE [what is measured]
1. Multiply-accumulates of a convolution of many channels, in float32 as torch is set up, and in bfloat16; bytes of
   a sum of two maps; a call; a copy from host memory; and how much longer a convolution takes per pixel where its
   result has more than 2^31 elements. Each is the best of a few runs: what disturbs a run only makes it slower.
2. The result is kept per device and version of torch, as a file of JSON in `$XDG_CACHE_HOME/fxstream` or
   `~/.cache/fxstream`, and read from then on. What cannot be written is measured again in the next process; a file
   that is no such result is measured anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fxstream.machine.device import free_bytes, synchronize

__all__ = ["Rates", "best_seconds", "cache_file", "rates_of"]

VERSION = 2
"""Of what is measured."""
RUNS = 3
LARGE = 2**31
"""Elements from which on kernels of torch count in 64 bits."""
SMALL = 2**26
"""Elements of a tensor that is measured otherwise."""
NEEDED = 6
"""Bytes per element of `LARGE` that have to be free for the operator on so many: bfloat16, twice and a half."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """Multiply-accumulates per second in 32 and in 16 bits, bytes per second, seconds of a call.

    `host` are bytes per second from host memory, `beyond` is the factor of an operator on 2^31 elements or more.
    """

    wide_macs: float
    macs: float
    bandwidth: float
    call: float
    host: float
    beyond: float


@functools.lru_cache(16)
def rates_of(device: torch.device, elements: int = SMALL) -> Rates:
    """The rates of an accelerator that is there: from the cache, or measured and kept."""
    file = cache_file(device)
    with contextlib.suppress(OSError, TypeError, ValueError):
        return Rates(**json.loads(file.read_text()))
    rates = _measured(device, elements)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(number, "w") as stream:
            json.dump(dataclasses.asdict(rates), stream)
        os.replace(name, file)
    return rates


def cache_file(device: torch.device) -> Path:
    """Where the rates of a device are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxstream"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = hashlib.sha256(f"{name} {torch.__version__} {VERSION}".encode()).hexdigest()[:16]
    return folder / f"rates_{key}.json"


def _measured(device: torch.device, elements: int) -> Rates:
    """The rates, with tensors of so many elements."""
    map_ = torch.zeros(elements, dtype=torch.float32, device=device)
    host = torch.zeros(elements // 4, dtype=torch.float32)
    small = torch.zeros(1, device=device)
    bandwidth = 3 * map_.nbytes / best_seconds(lambda: torch.add(map_, map_), device)
    calls = 64
    call = best_seconds(lambda: [small.add_(1) for _ in range(calls)], device) / calls
    return Rates(
        wide_macs=_macs_per_second(torch.float32, device, elements),
        macs=_macs_per_second(torch.bfloat16, device, elements),
        bandwidth=bandwidth,
        call=call,
        host=host.nbytes / best_seconds(lambda: host.to(device, copy=True), device),
        beyond=_beyond(device),
    )


def _macs_per_second(dtype: torch.dtype, device: torch.device, elements: int) -> float:
    """Of a convolution of 256 to 256 channels with kernels of 3, of numbers that are not all the same."""
    channels, side = 256, max(8, int((elements / 256) ** 0.5))
    image = torch.randn(1, channels, side, side, dtype=dtype, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype, device=device)
    seconds = best_seconds(lambda: torch.nn.functional.conv2d(image, weight, padding=1), device)
    return 9 * channels * channels * side * side / seconds


def _beyond(device: torch.device) -> float:
    """The factor of a convolution whose result has 2^31 elements, over one of a sixteenth; 1 if unknown."""
    if free_bytes(device) < NEEDED * LARGE or device.type == "cpu":
        return 1.0
    weight = torch.zeros(64, 1, 3, 3, dtype=torch.bfloat16, device=device)
    seconds = []
    for side in (1449, 5796):  # of 64 channels: below, and above
        image = torch.zeros(1, 1, side, side, dtype=torch.bfloat16, device=device)
        run = functools.partial(torch.nn.functional.conv2d, image, weight, padding=1)
        seconds.append(best_seconds(run, device) / side**2)
    return max(1.0, seconds[1] / seconds[0])


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    with torch.no_grad():
        run()
        seconds = []
        for _ in range(RUNS):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
    return max(1e-9, min(seconds))
