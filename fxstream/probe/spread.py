"""Where values that are not a number come to: by themselves, from image to image, from channel to channel."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxstream.probe.strip import Strip

__all__ = ["mixes_images", "nodes_with_nan", "whole_box"]


class _Spread(fx.Interpreter):
    """Runs a strip and collects the `nodes` whose values are NaN, and those `mixed`, in the second image."""

    def __init__(self, strip: Strip) -> None:
        super().__init__(strip.part.module)
        self.extra_traceback = False
        self._batch = strip.batch
        self.nodes, self.mixed = set[str](), set[str]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        if any(bool(leaf.isnan().any()) for leaf in leaves):
            self.nodes.add(n.name)
        if isinstance(value, torch.Tensor) and n.name in self._batch:
            _, second = value.chunk(2, self._batch[n.name])
            if bool(second.isnan().any()):
                self.mixed.add(n.name)
        return value


@torch.no_grad()
def nodes_with_nan(strip: Strip, inputs: Sequence[torch.Tensor]) -> set[str]:
    """The nodes whose values are NaN anywhere with these inputs, as of a logarithm of less than 0."""
    spread = _Spread(strip)
    spread.run(*inputs, *strip.weights.values())
    return spread.nodes


@torch.no_grad()
def mixes_images(strip: Strip, inputs: Sequence[torch.Tensor], without: Set[str]) -> bool:
    """Whether NaN in the first image come into the second at any node but those that have some `without`.

    So of attention over frames that a reshape took out of the batch for a batch of one.
    """
    poisoned = [tensor.clone() for tensor in inputs]
    for (name, _), tensor in zip(strip.part.segment.spatial, poisoned, strict=True):
        if name in strip.batch and tensor.is_floating_point():
            tensor[: len(tensor) // 2] = math.nan
    spread = _Spread(strip)
    spread.run(*poisoned, *strip.weights.values())
    return bool(spread.mixed - without)


def whole_box(gradient: torch.Tensor, poisoned: torch.Tensor, batch: int, dim: int) -> torch.Tensor:
    """A value or gradient with NaN in every channel of a pixel that has it in one: tiles hold whole boxes.

    It lies in memory as before, for there are operators that take a view of it.
    """
    entries = gradient.unflatten(batch, (2, -1)).movedim(batch, 0)
    shape = [extent if d in (0, dim + 1) else 1 for d, extent in enumerate(entries.shape)]
    mask = poisoned.view(shape).expand(entries.shape).movedim(0, batch).flatten(batch, batch + 1)
    return gradient.masked_fill(mask, math.nan)
