"""The tiles of an image shared by the processes of one dimension of a mesh.

NOTE [sharing]
1. Every rank holds the whole model and is given the same image. It computes the tiles that are its own; results
   of a segment are exchanged, so that every rank has all of them; ordinary operators run on every rank alike.
2. In backward every rank pulls back its own tiles, and the gradients of a segment's inputs are summed over the
   ranks once. So every rank has the whole gradient, which replicas on another dimension of the mesh (DDP, FSDP)
   average as usual.
3. Before anything is exchanged, every rank tells whether it failed; if one did, all raise, naming it. What ranks
   must have in common (image, plan, state of the random generator) is compared at every call.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fxstream.errors import InputError, StreamError
from fxstream.io.source import Source
from fxstream.machine.device import current_device

__all__ = ["Ranks", "Rows", "assigned", "digest", "fingerprint", "together"]

Subscript = tuple[slice, ...]
Rows = list[tuple[torch.Tensor, int]]
SAMPLES = 16
"""Values of an image along each axis that are compared between ranks."""


class Ranks:
    """The processes that share the tiles of an image: a mesh of one dimension, or a process group."""

    def __init__(self, mesh: Any) -> None:
        if not isinstance(mesh, dist.ProcessGroup):
            if getattr(mesh, "ndim", None) != 1:
                raise InputError(
                    "mesh must be a DeviceMesh of one dimension, as mesh['tiles'], or a process group; found"
                    f" {mesh!r}"
                )
            mesh = mesh.get_group()
        self._group: dist.ProcessGroup = mesh
        self.rank, self.count = dist.get_rank(mesh), dist.get_world_size(mesh)

    def require_equal(self, parts: Mapping[str, object]) -> None:
        """Compare what all ranks must have in common. Raises `StreamError` naming what differs and where."""
        everyone = self.gather(dict(parts))
        for what, mine in everyone[0].items():
            others = [rank for rank, theirs in enumerate(everyone) if theirs.get(what) != mine]
            if others:
                other = everyone[others[0]].get(what)
                raise StreamError(
                    f"the ranks of the mesh differ in their {what}: rank 0 has {mine}, rank"
                    f" {', '.join(map(str, others))} {other}. All ranks of this dimension need the same"
                )

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        """Run a block on every rank; if it fails on one, raise on all (rule 3)."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(failures):
            if message is not None:
                raise StreamError(f"rank {rank} of the mesh failed: {message}")

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        smallest: int = min(self.gather(value))
        return smallest

    def exchange(self, whole: torch.Tensor, boxes: Sequence[Sequence[Subscript]]) -> None:
        """Complete a result of which every rank has its own boxes; `boxes` are those of each rank."""
        for rank, of_rank in enumerate(boxes):
            if not of_rank:
                continue
            if rank == self.rank:
                values = torch.cat([whole[box].reshape(-1) for box in of_rank])
            else:
                count = sum(whole[box].numel() for box in of_rank)
                values = torch.empty(count, dtype=whole.dtype, device=whole.device)
            self._broadcast(values, rank)
            if rank != self.rank:
                parts = values.split([whole[box].numel() for box in of_rank])
                for box, part in zip(of_rank, parts, strict=True):
                    whole[box] = part.view(whole[box].shape)

    def gather_rows(self, rows: Sequence[torch.Tensor], counts: Sequence[int]) -> tuple[Rows, Rows]:
        """The rows of the ranks before and of those behind this one, each row with its count."""
        form = (tuple(rows[0].shape), rows[0].dtype, rows[0].device.type) if rows else None
        everyone = self.gather((list(counts), form))
        shape, dtype, kind = next(theirs for _, theirs in everyone if theirs is not None)
        device = rows[0].device if rows else current_device(kind)
        before: Rows = []
        behind: Rows = []
        for rank, (theirs, _) in enumerate(everyone):
            if not theirs:
                continue
            if rank == self.rank:
                values = torch.stack(list(rows))
            else:
                values = torch.empty((len(theirs), *shape), dtype=dtype, device=device)
            self._broadcast(values, rank)
            if rank != self.rank:
                side = before if rank < self.rank else behind
                side += zip(values.unbind(), theirs, strict=True)
        return before, behind

    def add_up(self, sums: Iterable[torch.Tensor | None], like: Sequence[Any]) -> list[torch.Tensor | None]:
        """The sums over all ranks; None where no rank has anything. `like` are the tensors they belong to."""
        mine = list(sums)
        forms = self.gather([None if total is None else total.dtype for total in mine])
        totals: list[torch.Tensor | None] = []
        for total, tensor, types in zip(mine, like, zip(*forms, strict=True), strict=True):
            dtype = next((one for one in types if one is not None), None)
            if dtype is None:
                totals.append(None)
                continue
            total = torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) if total is None else total
            total = total.contiguous()
            with _reaching():
                dist.all_reduce(total, group=self._group)
            totals.append(total)
        return totals

    def gather(self, mine: Any) -> list[Any]:
        """The object of every rank, in their order."""
        everyone: list[Any] = [None] * self.count
        with _reaching():
            dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def _broadcast(self, values: torch.Tensor, rank: int) -> None:
        with _reaching():
            dist.broadcast(values, dist.get_global_rank(self._group, rank), group=self._group)


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Raises `StreamError` where a rank cannot be reached any more."""
    try:
        yield
    except RuntimeError as error:
        raise StreamError(
            f"a rank of the mesh is gone, its own output says why: {str(error).splitlines()[0]}"
        ) from error


def assigned(costs: Sequence[float], count: int) -> tuple[int, ...]:
    """The rank of each tile: the largest first, each to the rank that has the least so far.

    >>> assigned([1.0, 1.0, 2.0, 1.0, 1.0], 2)
    (1, 1, 0, 0, 1)
    """
    loads = [0.0] * count
    ranks = [0] * len(costs)
    for tile in sorted(range(len(costs)), key=lambda tile: -costs[tile]):
        rank = loads.index(min(loads))
        ranks[tile] = rank
        loads[rank] += costs[tile]
    return tuple(ranks)


def fingerprint(image: torch.Tensor | Source) -> str:
    """Shape, type and a sample of the values of an image, in few characters."""
    if isinstance(image, Source):
        sample = image.read(tuple(slice(0, min(size, SAMPLES)) for size in image.shape))
    else:
        sample = image.detach()[tuple(slice(None, None, -(-size // SAMPLES)) for size in image.shape)].cpu()
    values = sample.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{list(image.shape)} {image.dtype} #{digest(values)}"


def digest(values: bytes) -> str:
    """A few characters that differ where the values do."""
    return hashlib.sha256(values).hexdigest()[:8]


def together(ranks: Ranks | None) -> contextlib.AbstractContextManager[None]:
    """A block that every rank runs; if it fails on one, all raise. Without ranks it is any block."""
    return contextlib.nullcontext() if ranks is None else ranks.raise_together()
