"""The flags of the command line: a table per group, and the values that their texts stand for.

A flag is a line of a table: its name, its help, and what argparse needs besides. Texts are read after all flags
are parsed, so that a mistake in one is an `InputError` with a sentence, as any other mistake. A flag with the name
of an option of `compile` is one: `request_options` passes it on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from fxstream.compiler.options import GLOBAL_OPS, RequestOptions, request_of
from fxstream.errors import InputError
from fxstream.machine.units import parse_bytes
from fxstream.tiling.request import Request

__all__ = [
    "BENCH",
    "CHECK",
    "PLAN",
    "REPORT",
    "Group",
    "add_flags",
    "budgets_of",
    "device_of",
    "image_shape",
    "request_from",
    "request_options",
]


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
    flag("target", "what to look at; see below", metavar="TARGET"),
    flag("--size", "image extent, one number or one per axis: 8192, 4096x6144"),
    flag("--channels", "image channels (3)", type=int, default=3),
    flag("--batch", "images per batch (1)", type=int, default=1),
    flag("--input-shape", "the whole shape, instead of the three above", metavar="N,C,..."),
    (switch("--train", "training mode"), switch("--eval", "evaluation mode (the default)")),
    switch("--freeze-batch-norm", "use running statistics also in training"),
    switch("--json", "plain data on standard output"),
)
TILE = flag("--tile", "largest box that a tile reads of the image: 2048, 2048x1024")
MEMORY = flag("--memory", "the fastest plan predicted to fit: 8GiB, 500MB")
SEGMENTS: Group = (
    flag("--segments", "segments per region; 1 is a single stream", type=int),
    flag("--cut", "stream nothing after this module", metavar="MODULE"),
    flag(
        "--global-ops",
        "stream reductions over space (batch statistics, pooling), cut there, or as the planner finds (auto)",
        choices=GLOBAL_OPS,
        default="auto",
    ),
)
OFFLOAD = switch("--offload", "boundaries in host memory, where that is faster")
PLANNED: Group = (
    *MODEL,
    TILE,
    MEMORY,
    *SEGMENTS,
    flag("--device", "what to plan for: cpu, cuda, cuda:1 (cpu)", default="cpu"),
    OFFLOAD,
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
    switch("--native", "in the model's own type instead of float64"),
)
BENCH: Group = (
    *MODEL,
    TILE,
    flag("--memory", f"budgets, in bytes or as a share of the plain network's peak ({BUDGETS})"),
    *SEGMENTS,
    flag("--device", "what to measure on: cpu, cuda, cuda:1 (cpu)", default="cpu"),
    OFFLOAD,
    flag("--rounds", "processes per method; medians are shown (3)", type=int, default=3),
    flag("--plot", "draw time over memory (needs matplotlib)", metavar="FILE"),
)


def add_flags(parser: argparse._ActionsContainer, flags: Group) -> None:
    """Define flags on a parser."""
    for one in flags:
        if isinstance(one, tuple):
            add_flags(parser.add_mutually_exclusive_group(), one)
        else:
            parser.add_argument(one.name, help=one.help.replace("%", "%%"), **one.settings)


def image_shape(options: argparse.Namespace) -> tuple[tuple[int, ...], int, int]:
    """Extents, channels and batch of the image."""
    if options.input_shape:
        shape = _numbers(options.input_shape, "--input-shape")
        if len(shape) < 3:
            raise InputError(f"--input-shape {options.input_shape} needs batch, channels and at least one extent")
        return shape[2:], shape[1], shape[0]
    if not options.size:
        raise InputError("give the image's --size: 8192, or 4096x6144")
    size = _numbers(options.size, "--size")
    return (size * 2 if len(size) == 1 else size), options.channels, options.batch


def device_of(options: argparse.Namespace) -> torch.device:
    """The device named by --device. It need not be present."""
    try:
        return torch.device(options.device)
    except RuntimeError:
        raise InputError(f"--device {options.device!r} is not a device: use cpu, cuda or cuda:1") from None


def request_from(options: argparse.Namespace) -> Request | None:
    """What --tile or --memory and their companions ask for; None without either of the two."""
    if options.tile and options.memory:
        raise InputError("give --tile or --memory, not both")
    if not options.tile and not options.memory:
        return None
    return request_of(**request_options(options))


def request_options(options: argparse.Namespace) -> RequestOptions:
    """The options of `compile` among the flags; the memory is text."""
    flags = {name: getattr(options, name) for name in RequestOptions.__annotations__ if hasattr(options, name)}
    return cast(RequestOptions, flags | {"tile": _tile(options), "memory": options.memory or None})


def budgets_of(options: argparse.Namespace, plain: int) -> list[tuple[str, int]]:
    """The budgets of a benchmark: each text and its bytes; a share is one of `plain` bytes."""
    texts = (options.memory or BUDGETS).split(",")
    return [(text.strip(), _budget(text, plain)) for text in texts]


def _budget(text: str, plain: int) -> int:
    share = text.strip().removesuffix("%")
    if share == text.strip():
        return parse_bytes(text)
    try:
        return int(float(share) / 100 * plain)
    except ValueError:
        raise InputError(f"--memory {text!r} is not a share: use 25%") from None


def _tile(options: argparse.Namespace) -> int | tuple[int, ...] | None:
    if not options.tile:
        return None
    numbers = _numbers(options.tile, "--tile")
    if min(numbers) < 1:
        raise InputError(f"--tile {options.tile} must be positive")
    return numbers if len(numbers) > 1 else numbers[0]


def _numbers(text: str, what: str) -> tuple[int, ...]:
    """Numbers written as 8192 or 4096x6144."""
    try:
        return tuple(int(part) for part in text.replace(",", "x").split("x"))
    except ValueError:
        raise InputError(f"{what} {text!r} is not a number, or numbers joined by x: 8192, 4096x6144") from None
