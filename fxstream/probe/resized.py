"""A part of the graph with two images and other extents, as a strip needs it, and where its batch is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxstream.errors import FxstreamError
from fxstream.graph.nodes import name_of
from fxstream.graph.shapes import fake_tensor_log_silenced
from fxstream.probe.findings import MIXES_IMAGES, UnprobedError
from fxstream.probe.subgraph import Subgraph
from fxstream.tiling.segment import Segment

__all__ = ["Extents", "batch_dims", "extents_at", "typed_at"]

Extents = Mapping[str, tuple[int, ...]]
SLIDING = ("conv", "pool")
"""In the names of operators whose windows slide along all dims behind the batch and the channels."""


def batch_dims(part: Subgraph, segment: Segment, extents: Extents) -> dict[str, int]:
    """The dim of each node that is twice as large with twice as many batch entries; without those of no batch."""
    twice = typed_at(part, extents, 4)
    dims: dict[str, int] = {}
    for name in (*extents, *segment.nodes):
        reads = () if name in extents else segment.graph.pattern(name).reads
        if not (any(read.value.name in dims for read in reads) if reads else part.has_batch(name)):
            continue
        shape = segment.graph.value(name).shape
        other = () if twice is None else twice.graph.value(name).shape
        differing = [d for d, (one, more) in enumerate(zip(shape, other, strict=False)) if one != more]
        is_twice = len(differing) == 1 and other[differing[0]] == 2 * shape[differing[0]]
        slides = any(kind in name_of(segment.graph[name].node) for kind in SLIDING)
        if not is_twice or shape[differing[0]] % 2 or (slides and differing != [0]):
            raise UnprobedError(MIXES_IMAGES)
        dims[name] = differing[0]
    return dims


def typed_at(part: Subgraph, extents: Extents, batch: int = 2) -> Segment | None:
    """The segment at these extents of its inputs with two batch entries; None where an operator refuses them."""
    shapes = {name: part.input_shape(name, batch, sizes) for name, sizes in extents.items()}
    try:
        with fake_tensor_log_silenced():
            return part.at(shapes)
    except FxstreamError:
        return None


def extents_at(real: Extents, extents: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Extents of all inputs where the largest has `extents`, rounded up; a broadcast axis stays one."""
    full = [max(sizes) for sizes in zip(*real.values(), strict=True)]
    return {
        name: tuple(
            1 if pixels == 1 < most else -(-extent * pixels // most)
            for pixels, most, extent in zip(sizes, full, extents, strict=True)
        )
        for name, sizes in real.items()
    }
