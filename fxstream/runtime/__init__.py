"""Plans run: programs of tiles, the tile loop and its gradient, prefetch, accumulation, ranks.

Owns everything that happens while a segment computes, and the rewritten graph that calls it. May import `planning`
and below. Hands on an `fx.GraphModule` that takes and returns what the captured graph does.
"""
