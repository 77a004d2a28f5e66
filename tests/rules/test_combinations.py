"""Every reduction combined from tiles: its value and its gradient are those of the whole map, ties included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, integer_image, step
from small_networks import Function
from torch import nn

import fxstream
from fxstream.rules import rules
from fxstream.rules.reductions import REDUCERS

A = torch.ops.aten
OVER = [2, 3]
SAMPLES = {
    "sum": lambda x: A.sum(x, OVER),
    "mean": lambda x: A.mean(x, OVER, True),
    "amax": lambda x: A.amax(x, OVER),
    "amin": lambda x: A.amin(x, [-1, -2], True),
    "max": lambda x: A.max(x),
    "min": lambda x: A.min(x),
    "logsumexp": lambda x: A.logsumexp(x, OVER),
    "linalg_vector_norm": lambda x: (
        A.linalg_vector_norm(x, 1, OVER),
        A.linalg_vector_norm(x, 2, [1, 2, 3]),
        A.linalg_vector_norm(x, float("inf"), OVER, True),
    ),
    "any": lambda x: A.any(x > 1) * x + A.any(x > 1, 2, True) * x + A.any(x > 1, 3, True),
    "all": lambda x: A.all(x < 1) * x + A.all(x < 1, 2, True) * x + A.all(x < 1, 3, True),
    "prod": lambda x: (A.prod((x + 5) / 4), A.prod((x - 2) / 2, 3), A.prod((x - 2) / 2, 2)),
    "fxstream::moments": lambda x: (A.var_mean(x, OVER, correction=0), A.var(x, [1, 2, 3])),
    "fxstream::window_sums": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "fxstream::window_maxima": lambda x: F.adaptive_max_pool2d(x, (2, 3)),
}
"""By the operator that is a reduction in the lowered graph."""
OF_ROWS = {
    "sum": lambda x: (A.sum(x, [2]), A.sum(x, [1, 3], True)),
    "mean": lambda x: (A.mean(x, [3]), A.mean(x, [2], True), A.mean(A.mean(x, [2]), [2])),
    "amax": lambda x: (A.amax(x, [2]), A.amax(x, [-1], True)),
    "amin": lambda x: (A.amin(x, [1, 2]), A.amin(x, [3], True)),
    "logsumexp": lambda x: (A.logsumexp(x, [2]), x.softmax(-1), x.log_softmax(2)),
    "linalg_vector_norm": lambda x: (
        A.linalg_vector_norm(x, 1, [2]),
        A.linalg_vector_norm(x, 2, [0, 3], True),
        A.linalg_vector_norm(x, float("inf"), [2]),
        F.normalize(x + 3, dim=2),
    ),
    "sum variance": lambda x: (A.var(x, [2]), A.std(x, [3], True), *A.var_mean(x, [2], correction=0)),
    "mean strips": lambda x: F.adaptive_avg_pool2d(x, (None, 1)) * F.adaptive_avg_pool2d(x, (1, None)),
}
"""Reductions along one axis, whose result keeps the other."""


def test_every_reduction_has_a_sample():
    tagged = {row.operator for row in rules() if row.family == "reduction"}
    assert set(REDUCERS) | tagged <= set(SAMPLES)


@pytest.mark.parametrize("values", ["0 and 1", "small integers"])
@pytest.mark.parametrize("name", SAMPLES)
def test_value_and_gradient_are_those_of_the_whole(name, values):
    """Tiles of unequal size, so that one that is weighed as another is shows."""
    assert_combined(SAMPLES[name], name, values)


@pytest.mark.parametrize("values", ["0 and 1", "small integers"])
@pytest.mark.parametrize("name", OF_ROWS)
def test_a_reduction_along_one_axis_keeps_the_other(name, values):
    assert_combined(OF_ROWS[name], name.split()[0], values)


def assert_combined(function, name, values):
    """Streamed as plain, and `name` among the operators of the tiles."""
    image = integer_image(2, 3, 13, 11)
    if values == "0 and 1":
        image = (image.detach() > 0).double().requires_grad_()
    model = Function(lambda m, x: function(x * 1))
    module = fxstream.compile(model, tile=5, segments=1)
    assert_same(step(module, model, [image]), step(copy.deepcopy(model), model, [image]), 1e-12)
    assert max(segment.tile_count for segment in module.plan.segments) >= 9
    streamed = {node for segment in module.plan.segments for node in segment.segment.nodes}
    operators = {
        verdict.operator.removeprefix("aten::") for verdict in module.verdicts if verdict.node in streamed
    }
    assert name in operators


def test_coordinate_attention_streams_at_any_size():
    """Strips of rows and columns, joined, mixed, and apart again."""

    def forward(m, x):
        x = m.a(x)
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        mixed = F.relu(m.b(torch.cat([rows, columns], 2)))
        of_rows, of_columns = mixed.split([x.shape[2], x.shape[3]], 2)
        return m.c(x * of_rows.sigmoid() * of_columns.transpose(2, 3).sigmoid())

    parts = {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1), "c": nn.Conv2d(4, 2, 3, padding=1)}
    model = Function(forward, **parts).double()
    plain, module = copy.deepcopy(model), fxstream.compile(model, tile=16)
    for size in ((33, 29), (26, 40)):
        image = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 1e-10)
        assert max(segment.tile_count for segment in module.plan.segments) >= 6
        assert module.plan.streamed_share > 0.8
