"""The least time that a device could take for a training step, if all but its multiply-accumulates were free.

That is the larger of two times: the multiply-accumulates of forward and backward at the rate of a product of large
matrices on this device, and the bytes that no fusion saves (inputs and weights are read; results, and gradients of
weights and inputs, are written) at the rate at which it adds two maps.
"""

from __future__ import annotations

import torch

from fxstream.graph.typed_graph import TypedGraph
from fxstream.machine.calibration import best_seconds

__all__ = ["roofline_seconds"]

SIDES = {"cpu": 1024}
"""Rows of the matrices by type of device; `SIDE` elsewhere."""
SIDE = 8192
PASSES = 3
"""A step has the arithmetic of the forward pass, and as much for the gradients of inputs and of weights."""


def roofline_seconds(graph: TypedGraph, device: torch.device) -> float:
    """Seconds of a step of this graph on a device that is there, at least; measured in about a second."""
    macs = PASSES * sum(graph[name].macs for name in graph.nodes)
    results = [value for name in graph.nodes if graph.is_result(name) for value in graph[name].values]
    parameters = [value for node in graph.nodes.values() if node.is_parameter for value in node.values]
    with_gradients = 2 * [*graph.images, *parameters]
    moved = sum(value.bytes for value in (*with_gradients, *results))
    dtype = next((value.dtype for value in graph.images if value.dtype.is_floating_point), torch.float32)
    side = SIDES.get(device.type, SIDE)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    rate = side**3 / best_seconds(lambda: torch.mm(matrix, matrix), device)
    bandwidth = 3 * matrix.nbytes / best_seconds(lambda: torch.add(matrix, matrix), device)
    return max(macs / rate, moved / bandwidth)
