"""Segments of the graph and the boxes that their tiles read and write.

Owns how a span of nodes becomes a segment (`parts`), what its tiles need along each axis (`axes`), and how it is
made cheaper (`fuse`, `own_padding`, `reuse`). May import `graph` and below. Hands on `SegmentPlan`: a segment and
its grid of tiles.
"""
