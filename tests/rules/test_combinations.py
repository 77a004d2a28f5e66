"""Every reduction combined from tiles: its value and its gradient are those of the whole map, ties included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, integer_image, step
from small_networks import Function

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
    "fxstream::moments": lambda x: (A.var_mean(x, OVER, correction=0), A.var(x, [1, 2, 3])),
    "fxstream::window_sums": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "fxstream::window_maxima": lambda x: F.adaptive_max_pool2d(x, (2, 3)),
}
"""By the operator that is a reduction in the lowered graph."""


def test_every_reduction_has_a_sample():
    tagged = {row.operator for row in rules() if row.family == "reduction"}
    assert set(REDUCERS) | tagged <= set(SAMPLES)


@pytest.mark.parametrize("values", ["0 and 1", "small integers"])
@pytest.mark.parametrize("name", SAMPLES)
def test_value_and_gradient_are_those_of_the_whole(name, values):
    """Tiles of unequal size, so that one that is weighed as another is shows."""
    image = integer_image(2, 3, 13, 11)
    if values == "0 and 1":
        image = (image.detach() > 0).double().requires_grad_()
    model = Function(lambda m, x: SAMPLES[name](x * 1))
    module = fxstream.compile(model, tile=5, segments=1, verify=False)
    assert_same(step(module, model, [image]), step(copy.deepcopy(model), model, [image]), 1e-12)
    assert max(segment.tile_count for segment in module.plan.segments) >= 9
    streamed = {node for segment in module.plan.segments for node in segment.segment.nodes}
    operators = {
        verdict.operator.removeprefix("aten::") for verdict in module.verdicts if verdict.node in streamed
    }
    assert name in operators
