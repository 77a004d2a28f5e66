"""The fastest plan that fits: what operators cost, where regions are cut, which grid each segment gets.

Owns the cost model (`cost`, `lifetimes`, `copies`, `estimate`) and the `search` over partitions, whose constraint
is a tile or a memory (`regions`). May import `tiling` and below. Hands on a `Plan` with its predicted seconds and
bytes.
"""
