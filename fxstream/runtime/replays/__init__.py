"""Tiles that a device does again in one launch: their static tensors, and the sweeps that use them."""
