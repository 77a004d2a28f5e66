"""The flags of the command line: a table per group. Does not load torch, so that help and mistakes are fast.

A flag is a line of a table: its name, its help, and what argparse needs besides. What its text stands for is in
`values`. A flag with the name of an option of `compile` is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BENCH", "BUDGETS", "CHECK", "MODELS", "PLAN", "PREDICT", "REPORT", "Group", "add_flags"]


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag, or without dashes a positional argument; `settings` are other arguments of `add_argument`."""

    name: str
    help: str
    settings: Mapping[str, Any]


Group = tuple["Flag | Group", ...]
"""Flags of one subject; a group within a group are flags that exclude each other."""


def flag(name: str, help: str, **settings: Any) -> Flag:
    """A line of a table."""
    return Flag(name, help, settings)


def switch(name: str, help: str) -> Flag:
    """A flag without a value."""
    return Flag(name, help, {"action": "store_true"})


BUDGETS = "60%,40%,25%,15%"
"""The budgets of a benchmark that names none."""

MODEL: Group = (
    flag("target", "the network; see below", metavar="TARGET"),
    flag("--size", "image extent, one number or one per axis: 8192, 4096x6144"),
    flag("--channels", "image channels (3)", type=int, default=3),
    flag("--batch", "images per batch (1)", type=int, default=1),
    flag(
        "--input",
        "instead of the three above, the whole shape of an input, once for each: 1x3x512x512, with a type if it is"
        " not the model's: 1x512x512:int64",
        action="append",
        metavar="SHAPE",
    ),
    (
        switch("--train", "training mode: the default for a training step"),
        switch("--eval", "evaluation mode: the default of a report without --tile and --memory, and of --no-grad"),
    ),
    switch("--freeze-batch-norm", "running statistics in training mode, too; faster"),
    switch("--json", "plain data on standard output"),
)
TILE = flag("--tile", "largest box that a tile reads of the image: 2048, 2048x1024")
MEMORY = flag("--memory", "the fastest plan predicted to fit: 8GiB, 500MB, or 50% of all memory of the device")
SEGMENTS: Group = (
    flag("--segments", "segments per region; 1 is a single stream", type=int),
    flag("--cut", "stream nothing after this module", metavar="MODULE"),
    flag(
        "--global-ops",
        "stream reductions over space (batch statistics, pooling), cut there, or as the planner finds (auto)",
        default="auto",
        metavar="{auto,stream,cut}",
    ),
)
OFFLOAD = switch("--offload", "boundaries in host memory, where that is faster")
CUDA_GRAPHS = switch("--cuda-graphs", "tiles replayed as CUDA graphs, for small ones")
COMPILE_TILES = switch("--compile-tiles", "tiles through torch.compile, of one shape where that costs little")
PLANNED: Group = (
    *MODEL,
    TILE,
    MEMORY,
    *SEGMENTS,
    flag("--device", "what to plan for: cpu, cuda, cuda:1 (cpu)", default="cpu"),
    OFFLOAD,
    CUDA_GRAPHS,
    COMPILE_TILES,
    switch("--no-grad", "plan a call without gradients"),
)
PLAN: Group = PLANNED
REPORT: Group = (
    *PLANNED,
    flag("--depth", "group layers by this many parts of the path (2)", type=int, default=2),
    switch("--all", "every operator on a line of its own"),
    switch("--no-probe", "do not measure on the real operators"),
    flag("--html", "write one self-contained page", metavar="FILE"),
    flag("--plot", "draw fields, memory and tiles (needs matplotlib)", metavar="FILE"),
)
CHECK: Group = (
    *MODEL,
    TILE,
    MEMORY,
    *SEGMENTS,
    COMPILE_TILES,
    switch("--native", "in the model's own type instead of float64"),
)
BENCH: Group = (
    *MODEL,
    TILE,
    flag("--memory", f"budgets: 8GiB, or shares of the plain network's predicted peak ({BUDGETS})"),
    *SEGMENTS,
    flag("--device", "what to measure on: cpu, cuda, cuda:1 (cpu)", default="cpu"),
    OFFLOAD,
    CUDA_GRAPHS,
    COMPILE_TILES,
    switch("--compile", "beside torch.compile, also told to save a half, a fifth, a twentieth; and the roofline"),
    flag("--rounds", "processes per method; medians are shown (3)", type=int, default=3),
    flag("--plot", "draw time over memory (needs matplotlib)", metavar="FILE"),
)
PREDICT: Group = (
    flag("target", "the network, which returns one tensor; see below", metavar="TARGET"),
    flag("images", "TIFF, OME-TIFF, slide, OME-Zarr, zarr, npy, PNG or JPEG", nargs="+", metavar="IMAGE"),
    flag("--weights", "a state dict: safetensors, or a file of torch", metavar="FILE"),
    flag("--out", "the folder of results, which is the job: start it again, or many times", metavar="FOLDER"),
    flag("--memory", "what a tile may take: 8GiB, or 50% of all memory of the device (what is free)"),
    flag("--device", "cpu, cuda, cuda:1 (cuda where there is one)"),
    (
        flag("--level", "the level of a pyramid, 0 is the finest (0)", type=int),
        flag("--spacing", "instead, its micrometres per pixel", type=float),
    ),
    flag("--layout", "the axes of an array whose file does not name them: YXC, CZYX"),
    flag(
        "--normalise",
        "unit: integers over their largest; imagenet: less its mean, over its deviation; or both of yours, per"
        " channel: 0.5,0.5,0.5/0.2,0.2,0.2 (none)",
        metavar="HOW",
    ),
    flag("--format", "of maps: ome-zarr, tiff (ome-zarr); vectors are npy", default="ome-zarr"),
    flag("--dtype", "the type that is stored: uint8, float16 (the result's)"),
    switch("--mesh", "processes of torchrun share the tiles of each image, not the images"),
)
MODELS: Group = (flag("pattern", "only names that contain this", nargs="?", default="", metavar="PATTERN"),)


def add_flags(parser: argparse._ActionsContainer, flags: Group) -> None:
    """Define flags on a parser."""
    for one in flags:
        if isinstance(one, tuple):
            add_flags(parser.add_mutually_exclusive_group(), one)
        else:
            parser.add_argument(one.name, help=one.help.replace("%", "%%"), **one.settings)
