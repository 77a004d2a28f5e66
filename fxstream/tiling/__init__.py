"""Segments of the graph and the boxes that their tiles read and write.

Owns how a span of nodes becomes a segment (`parts`), what its tiles need (`bounds`, `grid`), how it is made
cheaper (`fold`, `own_padding`, `reuse`) and what autograd saves of it (`autograd_saves`). May import `graph` and
below. Hands on `SegmentPlan`: a segment and its grid of tiles.
"""
