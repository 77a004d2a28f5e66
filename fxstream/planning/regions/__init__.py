"""The regions of a network with all ways to run their spans: within a tile, or within a memory."""
