"""Closed forms of a tile: every number by hand."""

import math
from fractions import Fraction

from torch import nn

import fxstream
from fxstream.graph.fields import demands, main_image, receptive_fields
from fxstream.report.closed_form import TILE, TILE_OUT, tile_forms


def test_forms_of_a_tile():
    """Two 3x3 convolutions, the second with stride 2: every number by hand."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1))
    analysis = fxstream.analyze(model, 64, channels=3, batch=2)
    graph, (region,) = analysis.graph, analysis.regions
    source, output = main_image(graph), region.nodes[-1]
    fields = receptive_fields(graph, region.nodes, source)
    macs = {n: graph[n].macs / math.prod(graph.value(n).extents) for n in region.nodes}
    per_pixel = {n: Fraction(m) for n, m in macs.items()}
    forms = tile_forms(demands(graph, region.nodes, output), fields[output], [source], per_pixel, per_pixel)
    assert fields[output][0].size == 5
    assert [str(form) for form in forms.box[source]] == ["2*t + 3", "2*t + 3"]
    assert str(forms.owned[0]) == "floor((T - 5)/2) + 1"
    assert forms.owned[0].subs(TILE, 21) == 9
    assert str(forms.overlap[0]) == "3/T"
    t = 9
    held, owned = (2 * t + 1) ** 2 * per_pixel[region.nodes[0]], t**2 * per_pixel[output]
    assert forms.macs.subs(TILE_OUT, t) == held + owned
    assert forms.overhead.subs(TILE_OUT, t) == (held + owned) / (4 * t**2 * per_pixel[region.nodes[0]] + owned)
    assert forms.evaluate(21)["owned"] == 9
