"""Operators known to need the whole feature map, each with its reason, so that the report can say it.

They end a streamed region. Where the result has the shape of the input, it keeps the stream axes, so that a
region may start again behind it.
"""

from __future__ import annotations

from functools import partial

from fxstream.rules.rule import Answer, Call, Kind, Refusal, RuleTable
from fxstream.rules.windowed import OPPOSITE

__all__ = ["add_rules"]

REDUCTIONS = {
    "adaptive_avg_pool1d": "pools the whole map",
    "adaptive_avg_pool2d": "pools the whole map",
    "adaptive_avg_pool3d": "pools the whole map",
    "_adaptive_avg_pool2d": "pools the whole map",
    "adaptive_max_pool1d": "pools the whole map",
    "adaptive_max_pool2d": "pools the whole map",
    "adaptive_max_pool3d": "pools the whole map",
    "group_norm": "normalises each group over the whole map",
    "native_group_norm": "normalises each group over the whole map",
    "instance_norm": "normalises each channel over the whole map",
}
MAPWIDE = {
    "bmm": "multiplies matrices that mix positions",
    "baddbmm": "multiplies matrices that mix positions",
    "addmm": "multiplies matrices that mix positions",
    "mm": "multiplies matrices that mix positions",
    "einsum": "contracts dims that may be positions",
    "scaled_dot_product_attention": "attends to all positions",
    "_pad_circular": OPPOSITE,
    "fft_fft2": "transforms the whole map",
    "fft_rfft2": "transforms the whole map",
    "grid_sample": "reads positions that depend on the data",
    "grid_sampler": "reads positions that depend on the data",
}


def add_rules(table: RuleTable) -> None:
    """One refusal per operator."""
    for name, reason in REDUCTIONS.items():
        table.add(f"aten::{name}", "map-wide", partial(refuse, Kind.REDUCE, reason))
    for name, reason in MAPWIDE.items():
        table.add(f"aten::{name}", "map-wide", partial(refuse, Kind.GLOBAL, reason))


def refuse(kind: Kind, reason: str, call: Call) -> Answer:
    """The refusal; stream axes survive where the result has the shape of the first input."""
    image = call.tensors()[0][2]
    return Refusal(kind, reason, image.dims if image.shape == call.shape else ())
