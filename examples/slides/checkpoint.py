"""A training run on disk: everything that the rest of the run depends on, replaced in one step.

A run that is killed at any moment leaves its last whole checkpoint, and one that goes on from there ends as if it
had never stopped.
"""

import os
from pathlib import Path
from typing import Any

import torch


def write(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path`, flush it to the disk, and put it in place of what `path` was."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def random_state() -> dict[str, Any]:
    """The state of torch's generators, on the CPU and on every CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: dict[str, Any]) -> None:
    """Bring the generators to a state; one of CUDA only where there are as many devices."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
