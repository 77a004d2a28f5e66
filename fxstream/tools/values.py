"""What the texts of the flags stand for. Does not load torch: a mistake is reported before anything else happens.

Texts are read after all flags are parsed, so that a mistake in one is an `InputError` with a sentence, as any
other mistake. What can be said without a network `check_flags` says.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from fxstream.errors import InputError
from fxstream.machine.units import parse_memory
from fxstream.tools.flags import BUDGETS

if TYPE_CHECKING:
    from fxstream.compiler.options import RequestOptions

__all__ = [
    "Input",
    "budgets_of",
    "check_flags",
    "has_request",
    "is_training",
    "request_options",
    "shapes_of",
    "title_of",
]

Input = tuple[tuple[int, ...], str]
"""Shape and type of an input; an empty type is that of the model."""
OPTIONS = ("tile", "memory", "segments", "cut", "global_ops", "offload", "cuda_graphs", "compile_tiles")
"""The flags that are options of `compile`."""
SHAPE = re.compile(r"([0-9]+(?:[x,][0-9]+)*)(?::([a-z]+[0-9]*))?")


def check_flags(options: argparse.Namespace) -> None:
    """Read every text once. Raises `InputError` for the first that is a mistake."""
    if options.command == "predict":
        _check_prediction(options)
    if not hasattr(options, "size"):
        return
    shapes_of(options)
    if options.tile and options.memory:
        raise InputError("give --tile or --memory, not both")
    _tile(options)
    if options.memory:
        budgets_of(options, 1) if options.command == "bench" else parse_memory(options.memory)
    if options.command in ("plan", "check") and not has_request(options):
        raise InputError(f"{options.command} needs --tile or --memory")
    for name in ("depth", "rounds"):
        if (number := getattr(options, name, None)) is not None and number < 1:
            raise InputError(f"--{name} {number} must be positive")


def _check_prediction(options: argparse.Namespace) -> None:
    if not options.out:
        raise InputError("predict needs --out, the folder of results")
    if options.memory:
        parse_memory(options.memory)
    if options.mesh and "RANK" not in os.environ:
        raise InputError(
            "--mesh needs processes that share the tiles: torchrun --nproc-per-node 4 -m fxstream predict ..."
        )


def has_request(options: argparse.Namespace) -> bool:
    """Whether there is a tile or a memory to plan for."""
    return bool(options.tile or options.memory)


def is_training(options: argparse.Namespace) -> bool:
    """Whether the network is in training mode: as asked for, else where a training step is predicted or run."""
    if options.train or options.eval:
        return bool(options.train)
    predicts = options.command != "report" or has_request(options)
    return predicts and not getattr(options, "no_grad", False)


def title_of(target: str, inputs: Sequence[Input], train: bool, frozen: bool) -> str:
    """Network, inputs and mode in one line."""
    shapes = " and ".join("x".join(map(str, shape)) for shape, _ in inputs)
    batch_norm = ", BatchNorm frozen" if train and frozen else ""
    return f"{target}, image {shapes}, {'train' if train else 'eval'} mode{batch_norm}"


def shapes_of(options: argparse.Namespace) -> list[Input]:
    """Shape and type of every input of the model."""
    if options.input:
        return [_input(text) for text in options.input]
    if not options.size:
        raise InputError("give the image's --size: 8192, or 4096x6144")
    size = _numbers(options.size, "--size")
    shape = (options.batch, options.channels, *(size * 2 if len(size) == 1 else size))
    if min(shape) < 1:
        raise InputError(f"--size, --channels and --batch must be positive, found {'x'.join(map(str, shape))}")
    return [(shape, "")]


def _input(text: str) -> Input:
    match = SHAPE.fullmatch(text)
    shape = tuple(map(int, re.split("[x,]", match[1]))) if match else ()
    if match is None or len(shape) < 3 or min(shape) < 1:
        raise InputError(
            f"--input {text!r} is not a shape: it needs batch, channels and at least one extent, 1x3x512x512"
        )
    return shape, match[2] or ""


def request_options(options: argparse.Namespace) -> RequestOptions:
    """The options of `compile` among the flags. Several budgets of a benchmark are none."""
    values = {name: getattr(options, name) for name in OPTIONS if hasattr(options, name)}
    values |= {"tile": _tile(options), "memory": options.memory or None}
    if options.command == "bench":
        values["memory"] = None
    return cast("RequestOptions", values)


def budgets_of(options: argparse.Namespace, plain: int) -> list[tuple[str, int]]:
    """The budgets of a benchmark: each text and its bytes; a share is one of `plain` bytes."""
    texts = [text.strip() for text in (options.memory or BUDGETS).split(",")]
    amounts = [parse_memory(text) for text in texts]
    return [
        (text, int(amount * plain) if isinstance(amount, float) else amount)
        for text, amount in zip(texts, amounts, strict=True)
    ]


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
