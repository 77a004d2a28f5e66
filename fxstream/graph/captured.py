"""A model as one functional ATen graph, and how a call's values get into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

__all__ = ["CUMULATIVE", "Captured", "Results"]

CUMULATIVE = -1.0
"""Stands for the momentum of a BatchNorm that averages over all batches so far."""


@dataclass(frozen=True, slots=True)
class Results:
    """What a model returns: for each flat result the output of the graph that it is, and their structure.

    A result that the graph does not compute (an input, a constant) has None.
    """

    outputs: tuple[int | None, ...]
    spec: pytree.TreeSpec


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph for one mode, input structure and type.

    `module` takes the model's tensors, whose names for the user are `tensors`, and then the tensors of the call,
    whose placeholders are `inputs`. `places` has, for each of these placeholders, the index among the values that
    the call comes with, or the name of one of the `constants`. It returns a list of outputs, of which the last are
    what the values at the indices `changed` became, which the model changes in place. With `bound` the graph is
    specialised to its size; with a `batch` to that batch size, with `frames` to that extent of the first of three
    axes. With `is_cast` it holds the casts of autocast, which must then be off when it runs.
    """

    module: fx.GraphModule
    tensors: tuple[str, ...]
    inputs: tuple[str, ...]
    places: tuple[int | str, ...]
    constants: Mapping[str, torch.Tensor]
    changed: tuple[int, ...] = ()
    bound: bool = False
    batch: int | None = None
    frames: int | None = None
    is_cast: bool = False

    @property
    def graph(self) -> fx.Graph:
        """The captured graph."""
        return self.module.graph

    @property
    def outputs(self) -> tuple[str | None, ...]:
        """The nodes that the graph returns; None for a constant."""
        outputs: Any = self.graph.output_node().args[0]
        return tuple(output.name if isinstance(output, fx.Node) else None for output in outputs)

    def serves(self, batch: int, frames: int | None) -> bool:
        """Whether it holds for so many images, and so many frames of a video or slices of a volume."""
        return self.batch in (None, batch) and self.frames in (None, frames)

    def arguments(self, values: Sequence[Any]) -> list[Any]:
        """The arguments of the graph for the values that a call comes with."""
        return [self.constants[place] if isinstance(place, str) else values[place] for place in self.places]
