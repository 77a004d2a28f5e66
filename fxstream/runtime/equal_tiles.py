"""Tiles that read the same constant of every input, as the blank of a slide: they are computed once.

NOTE [what is shared, and why that is exact]
1. Two tiles of one program (their class) get the same results if the boxes of all spatial inputs have the same
   bits, and they take the same values from tables and own the same part of what the program makes: whole inputs
   are the same for all tiles of a call, and no tile draws random numbers. Boxes are compared where they are
   constant along the tiled dims. Masks of dropout are made of positions, which are a spatial input that is never
   constant.
2. The product of a tile's Jacobian with the gradient of its outputs is linear in the latter. Tiles of equal inputs
   have one Jacobian for the whole inputs, so that these get their gradients by one product with the sum of the
   tiles' gradients. Spatial inputs do not, since each tile's goes to another place: where one asks for a gradient,
   every tile is pulled back.
3. Only operators of torch and of this package are known to have such a derivative. A sum of gradients in float16
   may overflow where none of them does: these are not summed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Sequence

import torch

from fxstream.machine.operators import has_values
from fxstream.rules.access import Lookup
from fxstream.runtime.schedule import TileTask
from fxstream.runtime.stream import Stream
from fxstream.tiling.segment import runs_operators_alone

__all__ = ["Constant", "constant_values", "may_sum", "summed", "tile_key"]

Constant = tuple[bytes, ...]

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FEW = 8
"""Pixels along each axis that are compared before all are."""
TABLES = 4096
"""So many tables of tiles are remembered by their values."""


def constant_values(box: torch.Tensor, dims: tuple[int, ...] | None) -> bytes | None:
    """The bytes of a box in host memory that is constant along `dims`; None of one that is not, and without dims.

    A fake tensor has no values.

    >>> box = torch.tensor([[7, 7, 7], [8, 8, 8]], dtype=torch.uint8)
    >>> constant_values(box, (1,)), constant_values(box, (0, 1))
    (b'\\x07\\x08', None)
    """
    if dims is None or not box.numel() or box.itemsize not in BITS or not has_values(box):
        return None
    bits = box.detach().view(BITS[box.itemsize])
    few, one = bits, bits
    for dim in dims:
        few = few[(slice(None),) * dim + (slice(None, None, -(-bits.shape[dim] // FEW)),)]
        one = one.narrow(dim, 0, 1)
    if not all(torch.equal(pixels, one.expand_as(pixels)) for pixels in (few, bits)):
        return None
    return one.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def tile_key(task: TileTask, constant: Constant | None, device: torch.device) -> Hashable | None:
    """What tiles with the same results have in common (rule 1); None for a tile that reads no constant."""
    if constant is None:
        return None
    return task.program, task.cuts, constant, tuple(_table_digest(lookup, device) for lookup in task.lookups)


@functools.lru_cache(TABLES)
def _table_digest(lookup: Lookup, device: torch.device) -> bytes:
    digest = hashlib.sha256()
    for tensor in lookup.tensors(device):
        values = tensor.cpu().contiguous()
        digest.update(str((values.dtype, values.shape)).encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def may_sum(stream: Stream, needs_grad: Sequence[bool], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether equal tiles may be pulled back as one (rules 2 and 3)."""
    return (
        not any(needs_grad[: stream.spatial_count])
        and torch.float16 not in dtypes
        and runs_operators_alone(stream.plan.segment)
    )


def summed(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of gradients in their type, summed in float32 at least."""
    if len(gradients) == 1:
        return gradients[0]
    dtype = gradients[0].dtype
    total = gradients[0].to(torch.promote_types(dtype, torch.float32), copy=True)
    for gradient in gradients[1:]:
        total += gradient
    return total.to(dtype)
