"""Operators that need the whole feature map, each with its reason, and products of two maps.

They end a streamed region. Where the result has the shape of the input, it keeps the tiled dims, so that a region
may start again after it. `fxstream::contract` is an einsum of two operands whose positions are dims of their own:
where all tiled dims are summed it is a reduction over space (attention pooling); where they stay, and one operand
has none, it is local (attention of each position to a few tokens). Partial sums have 32 bits at least.
`fxstream::attention` is local in its queries where keys and values are whole (`fxstream::whole`), or in the same
windows.
"""

from __future__ import annotations

from functools import partial

import torch

from fxstream.geometry.receptive_field import BROADCAST, IDENTITY, AxisExtent, AxisMap
from fxstream.machine.operators import wide
from fxstream.rules.access import Read, Value
from fxstream.rules.patterns import Pointwise, Windowed
from fxstream.rules.pointwise import aligned_read
from fxstream.rules.reasons import NotTileable, Reason
from fxstream.rules.reductions import reduced, sums_of_tiles
from fxstream.rules.rule import Answer, Call, RuleTable

__all__ = ["add_rules"]

ARGUMENTS = ("self", "other")
MANY_WINDOWS, SMALL_WINDOW = 16, 4
"""Windows along an axis of an adaptive pooling, and pixels of one, of which a tile can hold whole ones."""
REDUCING = {
    "adaptive_max_pool1d": Reason.POOLS_MAP,
    "adaptive_max_pool2d": Reason.POOLS_MAP,
    "adaptive_max_pool3d": Reason.POOLS_MAP,
    "group_norm": Reason.NORMALISES_GROUPS,
    "native_group_norm": Reason.NORMALISES_GROUPS,
    "instance_norm": Reason.NORMALISES_CHANNELS,
    "fused_moving_avg_obs_fake_quant": Reason.OBSERVES_RANGE,
}
MIXING = {
    "bmm": Reason.MIXES_POSITIONS,
    "baddbmm": Reason.MIXES_POSITIONS,
    "addmm": Reason.MIXES_POSITIONS,
    "mm": Reason.MIXES_POSITIONS,
    "einsum": Reason.CONTRACTS_POSITIONS,
    "scaled_dot_product_attention": Reason.ATTENDS,
    "_pad_circular": Reason.PADS_OPPOSITE,
}


def add_rules(table: RuleTable) -> None:
    """One answer per operator, and the product."""
    for name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d"):
        table.add(f"aten::{name}", "map-wide", adaptive_mean)
    for name, reason in (REDUCING | MIXING).items():
        table.add(f"aten::{name}", "map-wide", partial(not_tileable, reason))
    for name in ("grid_sample", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"):
        table.add(f"aten::{name}", "map-wide", sampled)
    table.add("torchvision::deform_conv2d", "map-wide", partial(not_tileable, Reason.READS_DATA_POSITIONS))
    table.add("fxstream::contract", "contraction", contract)
    table.add("fxstream::attention", "contraction", attention)
    table.add("fxstream::wrapped", "map-wide", lambda call: NotTileable(Reason.PADS_OPPOSITE, call["self"].dims))
    table.add("fxstream::whole", "map-wide", lambda call: NotTileable(Reason.READ_WHOLE))


def adaptive_mean(call: Call) -> Answer:
    """A mean of windows: local where these are many, or small, and all of one size; else a reduction."""
    image: Value = call["self"]
    sizes = [(image.shape[dim], call.shape[dim]) for dim in image.dims]
    last = tuple(range(len(image.shape) - len(call["output_size"]), len(image.shape)))
    is_local = all(w > 1 and p % w == 0 and (w > MANY_WINDOWS or p // w <= SMALL_WINDOW) for p, w in sizes)
    if set(image.dims) != set(last) or not is_local:
        return not_tileable(Reason.POOLS_MAP, call)
    maps = tuple(AxisMap.window(pixels // windows, pixels // windows, 0) for pixels, windows in sizes)
    extents = tuple(AxisExtent(1, pixels // windows, 0) for pixels, windows in sizes)
    return Windowed(image.dims, (Read("self", image, image.dims, maps),), extents, size="output_size")


def not_tileable(reason: Reason, call: Call) -> Answer:
    """The reason; tiled dims survive where the result has the shape of the first input."""
    image = call.tensors()[0][2]
    return NotTileable(reason, image.dims if image.shape == call.shape else ())


def sampled(call: Call) -> Answer:
    """Positions that a tensor holds, which no rule sees."""
    _, (_, _, grid), *_ = call.tensors()
    return NotTileable(Reason.READS_DATA_POSITIONS if grid.image else Reason.READS_GRID_POSITIONS)


def contract(call: Call) -> Answer:
    """A reduction over all tiled dims, or a local product."""
    inputs, output = call["equation"].split("->")
    letters = dict(zip(ARGUMENTS, inputs.split(","), strict=True))
    axes = {tuple(letters[name][d] for d in call[name].dims) for name in ARGUMENTS if call[name].dims}
    if len(axes) != 1:
        return NotTileable(Reason.DIFFERENT_DIMS, (), (sorted(axes),))
    (space,) = axes
    sizes = {
        c: max(_size(call[n], letters[n], c) for n in ARGUMENTS) for c in {*letters["self"], *letters["other"]}
    }
    reads = [_read(call[name], name, letters[name], space, sizes) for name in ARGUMENTS]
    if any(isinstance(read, NotTileable) for read in reads):
        return NotTileable(Reason.SOME_DIMS_MISSING, (), (call["other"].name,))
    spatial = sorted((r for r in reads if isinstance(r, Read)), key=lambda read: BROADCAST in read.maps)
    if set(space) <= set(output):
        dims = tuple(output.index(c) for c in space)
        return Pointwise(dims, tuple(spatial))
    if set(space) & set(output):
        return NotTileable(Reason.SUMS_SOME_DIMS)
    if len(spatial) < len(ARGUMENTS):
        return NotTileable(Reason.SUMS_WITH_WHOLE)
    if spatial[0].argument != "self":
        return NotTileable(Reason.SUMS_WITH_ROW)
    return reduced(spatial, products, sums_of_tiles, call["equation"])


def attention(call: Call) -> Answer:
    """Local in the positions of the queries, to which all keys are given, and in windows, which all have."""
    query: Value = call["query"]
    dims, batch = query.dims, len(query.shape) - 1 - call["rows"]
    reads = [Read("query", query, dims, (IDENTITY,) * len(dims))]
    if not dims or len(query.shape) - 1 in dims:
        return NotTileable(Reason.ATTENDS)
    for name in ("key", "value"):
        tensor: Value = call[name]
        if tensor.dims != tuple(d for d in dims if d < batch) or (tensor.dims and tensor.dims != dims):
            return NotTileable(Reason.ATTENDS)
        if tensor.dims:
            reads.append(Read(name, tensor, dims, (IDENTITY,) * len(dims)))
    mask = aligned_read(call, "mask", None, call["mask"], dims) if call["mask"] is not None else None
    if isinstance(mask, NotTileable):
        return mask
    return Pointwise(dims, tuple(reads) if mask is None else (*reads, mask))


def products(one: torch.Tensor, other: torch.Tensor, equation: str) -> torch.Tensor:
    """A tile's sums of products."""
    return torch.einsum(equation, wide(one), wide(other))


def _size(value: Value, letters: str, letter: str) -> int:
    return value.shape[letters.index(letter)] if letter in letters else 1


def _read(
    value: Value, name: str, letters: str, space: tuple[str, ...], sizes: dict[str, int]
) -> Read | NotTileable | None:
    """How an operand is read; None where it is small and passed whole."""
    if not set(space) & set(letters):
        return None
    if not set(space) <= set(letters):
        return NotTileable(Reason.SOME_DIMS_MISSING, (), (value.name,))
    dims = tuple(letters.index(c) for c in space)
    maps = tuple(IDENTITY if value.shape[d] == sizes[letters[d]] else BROADCAST for d in dims)
    return Read(name, value, dims, maps)
