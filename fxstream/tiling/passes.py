"""All passes that make a segment cheaper, in their order."""

from __future__ import annotations

from fxstream.tiling.fuse import fuse_batch_norms
from fxstream.tiling.reuse import halve_volumes, reuse_memory, skip_convolutions
from fxstream.tiling.segment import Segment, isolated

__all__ = ["optimised"]


def optimised(segment: Segment) -> Segment:
    """The segment in a graph of its own, BatchNorms fused, memory reused, and convolutions skipped or halved."""
    return halve_volumes(skip_convolutions(reuse_memory(fuse_batch_norms(isolated(segment)))))
