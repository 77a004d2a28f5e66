"""Integers along one axis, and products of axes: intervals and boxes, access maps, receptive fields.

Owns everything that is true of pixel coordinates without a graph or a tensor. Imports nothing of the package but
`errors`. Hands on frozen values: `Box`, `AxisMap`, `AxisExtent`, `ReceptiveField`.
"""
