"""All passes that make a segment cheaper, in their order."""

from __future__ import annotations

from fxstream.tiling.fuse import fuse_batch_norms
from fxstream.tiling.reuse import reuse_memory, skip_convolutions
from fxstream.tiling.segment import Segment, isolated

__all__ = ["optimised"]


def optimised(segment: Segment) -> Segment:
    """The segment with a graph of its own, its BatchNorms fused, memory reused, and convolutions skipped."""
    return skip_convolutions(reuse_memory(fuse_batch_norms(isolated(segment))))
