"""Tiles of one shape: that one program serves all of them, with the results and gradients of the plain network."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, backward_step, integer_image, make_integer, streams
from small_networks import CASES, Function, conv
from torch import nn

import fxstream
from fxstream.compiler.module import StreamedModule
from fxstream.compiler.shared import Options
from fxstream.machine.meter import measure
from fxstream.planning.decision import DecidedSpan
from fxstream.tiling import segment_plan
from fxstream.tiling.request import Request


@pytest.fixture(autouse=True)
def _whatever_it_costs(monkeypatch):
    monkeypatch.setattr(segment_plan, "MOST_EXTRA", 1e9)
    monkeypatch.setattr(segment_plan, "MOST_TRIED", 30)


def uniform(model, **request):
    return StreamedModule(
        model, Options(Request(**{"segments": 1, "compile_tiles": True, **request}), verify=False)
    )


def stepped(module, model, image):
    """Output and gradients of one step whose output gradient is not constant."""
    model.zero_grad()
    image.grad = None
    outputs = module(image)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        weights = torch.arange(output.numel(), dtype=output.dtype).view(output.shape) % 7 - 3
        (output * weights).sum().backward(retain_graph=True)
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output.detach(), "image": image.grad, **named}


def image_of(model, *size, batch=2):
    first = next(m for m in model.modules() if hasattr(m, "groups"))
    return integer_image(batch, first.in_channels, *size)


def channels_first(m, x):
    return m.b(m.a(x.permute(0, 3, 1, 2)).relu()).permute(0, 2, 3, 1)


def nothing_in_some(m, x):
    """An output so small that some tiles own none of it."""
    y = m.a(x)
    return y, m.b(y)


MORE = {
    "volume": nn.Sequential(nn.Conv3d(2, 3, 3, 2, 1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(3, 2, 3, padding=1)),
    "signal": nn.Sequential(nn.Conv1d(2, 3, 5, 2, 2), nn.ReLU(), nn.Conv1d(3, 2, 3, padding=1)),
    "up, unpadded": nn.Sequential(conv(2, 2, 1), nn.Upsample(scale_factor=2), conv(2, 2)),
    "up, wide": nn.Sequential(conv(2, 2, 1), nn.Upsample(scale_factor=3), conv(2, 2, 5, stride=2)),
    "several": Function(nothing_in_some, a=conv(2, 3, padding=1), b=conv(3, 2, 5, stride=9)),
}
SIZES = {"volume": (24, 17, 21), "signal": (101,), "unet": (45, 37)}


IN_CAMPAIGN = [name for k, name in enumerate(CASES) if k % 3 and not name.startswith("average")]


@pytest.mark.parametrize(
    "name", [*MORE, *(pytest.param(n, marks=[pytest.mark.campaign] * (n in IN_CAMPAIGN)) for n in CASES)]
)
@pytest.mark.filterwarnings("ignore::fxstream.errors.StreamingWarning")
def test_bit_equal_to_the_plain_network(name):
    """At two sizes, of which one leaves a rest behind every stride."""
    model = make_integer((CASES | MORE)[name]).eval()
    if name == "positional parameter":
        pytest.skip("it is bound to its size")
    module, plain = uniform(model, tile=16), copy.deepcopy(model)
    sizes = [SIZES.get(name, (40, 33)), tuple(n + 12 for n in SIZES.get(name, (40, 33)))]
    for size in sizes:
        image = image_of(model, *size)
        assert_same(stepped(module, model, image), stepped(plain, plain, image), 0.0)


def network(*more):
    layers = [
        conv(2, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        conv(3, 2, padding=1),
    ]
    return make_integer(nn.Sequential(*layers, *more))


def run(model, image, **request):
    module = uniform(model, **{"tile": 24, **request})
    assert_same(stepped(module, model, image), stepped(model, model, image), 0.0)
    return module


@pytest.mark.parametrize("extent, tile", [(50, 24), (51, 21), (52, 22), (53, 23), (54, 25), (60, 26), (77, 27)])
def test_one_program_on_boxes_of_one_shape_inside_the_image(extent, tile):
    module = run(network(), integer_image(1, 2, extent, 61), tile=tile)
    (stream,) = streams(module)
    tasks = stream.schedule.tasks
    assert len(stream.schedule.programs) == 1 < len(tasks)
    (rows,), (columns,) = (
        {part.stop - part.start for part in along} for along in zip(*[t.reads[0][2:] for t in tasks])
    )
    assert max(rows, columns) <= tile
    assert all(part.stop <= size for t in tasks for part, size in zip(t.reads[0][2:], (extent, 61), strict=True))
    written = torch.zeros(stream.outputs[0].shape)
    for task in tasks:
        written[task.outputs[0]] += 1
    assert torch.equal(written, torch.ones_like(written))


@pytest.mark.parametrize("name, size, tile", [("network", 130, 40), ("up, unpadded", 23, 8), ("up, wide", 60, 12)])
def test_boxes_have_those_of_ordinary_tiles_in_them(name, size, tile):
    model = network() if name == "network" else MORE[name]
    (part,) = fxstream.plan(model, size, channels=2, tile=tile, segments=1, compile_tiles=True).segments
    assert part.is_uniform
    for tiles in part.axes:
        walk = tiles._tiles._walk
        assert [ordinary.boxes for ordinary in tiles._tiles] == [walk.boxes(one.outputs) for one in tiles]
        assert len(tiles) == len(list(tiles)) > 2
        for i, made in enumerate(tiles):
            assert made.outputs == tiles[i].outputs
            for node, box in walk.boxes(made.outputs).items():
                assert made.boxes[node].start <= box.start < box.stop <= made.boxes[node].stop
                assert len(made.boxes[node]) == tiles.largest(node)
        for node in part.segment.nodes:
            assert tiles.total(node) == len(tiles) * tiles.largest(node)


def test_border_tiles_own_more():
    """They have no halo beyond the border: so boxes are no larger than those of as many ordinary tiles."""
    (part,) = fxstream.plan(network(), (400, 400), channels=2, tile=60, segments=1, compile_tiles=True).segments
    (other,) = fxstream.plan(network(), (400, 400), channels=2, tile=60, segments=1).segments
    owned = [len(tile.outputs[0]) for tile in part.axes[0]]
    assert owned[0] > owned[1] == part.axes[0].length
    assert len(part.axes[0]) == len(other.axes[0])
    assert max(part.largest("_0")) <= max(other.largest("_0"))


@pytest.fixture
def made():
    """The graphs that a stand-in of Inductor was given, and that stand-in."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    return graphs, backend


def test_the_same_program_at_another_size(made):
    """A decision has tiles of one size, and programs are of tiles."""
    graphs, backend = made
    decision = fxstream.Decision((DecidedSpan("conv2d", "conv2d_1", ((9, 9),)),))
    options = {"memory": "1GiB", "plan": decision, "compile_tiles": {"backend": backend}, "verify": False}
    model, counts = network(), []
    module = fxstream.compile(model, **options)
    for size in ((98, 101), (130, 141), (138, 117)):
        image = integer_image(1, 2, *size)
        assert_same(stepped(module, model, image), stepped(model, model, image), 0.0)
        (part,) = module.plan.segments
        assert part.is_uniform
        counts.append((part.tile_count, len(graphs)))
    assert len({tiles for tiles, _ in counts}) == 3
    assert [programs for _, programs in counts] == [counts[0][1]] * 3


@pytest.mark.parametrize("is_dynamic", [False, True])
def test_programs_for_tiles_of_any_size(made, is_dynamic):
    """With the option `dynamic` programs serve tiles of other shapes too."""
    graphs, backend = made
    model, options = (
        make_integer(nn.Sequential(conv(2, 3, padding=1), nn.ReLU(), conv(3, 2))),
        {"backend": backend},
    )
    module = fxstream.compile(
        model, tile=24, segments=1, compile_tiles=options | {"dynamic": is_dynamic}, verify=False
    )
    boxes, counts = set(), []
    for size in ((40, 61), (45, 53), (50, 71), (60, 66)):
        image = integer_image(1, 2, *size)
        assert_same(stepped(module, model, image), stepped(model, model, image), 0.0)
        (part,) = module.plan.segments
        assert part.is_uniform
        boxes.add(part.largest("input_1"))
        counts.append(len(graphs))
    assert len(boxes) == 4, boxes
    assert counts == ([2] * 4 if is_dynamic else [2, 4, 6, 8])


@pytest.mark.parametrize(
    "layer, request_",
    [
        (Function(lambda m, x: x.square().add(1).sqrt()), {}),  # one with an infinite derivative
        (Function(lambda m, x: 1 / x.square().add(1)), {}),
        (nn.AdaptiveAvgPool2d(1), {}),  # a sum over tiles
        (Function(lambda m, x: F.interpolate(x, scale_factor=1.5, mode="bilinear")), {}),  # a table
        (nn.ReLU(), {"compile_tiles": False}),
    ],
)
def test_what_is_not_uniform(layer, request_):
    model = nn.Sequential(network(), layer).double()
    module = uniform(model, tile=40, **request_)
    image = integer_image(1, 2, 90, 101)
    assert_same(stepped(module, model, image), stepped(model, model, image), 1e-10)
    assert not any(part.is_uniform for part in module.plan.segments)
    assert not any(map(any, (task.cuts for stream in streams(module) for task in stream.schedule.tasks)))


def test_only_where_it_costs_little(monkeypatch):
    model = network(*(conv(2, 2, 3, padding=1) for _ in range(4)))
    costs = []
    for share in (0.0, 1e9):
        monkeypatch.setattr(segment_plan, "MOST_EXTRA", share)
        (part,) = fxstream.plan(model, 200, channels=2, tile=60, segments=1, compile_tiles=True).segments
        assert part.is_uniform == (share > 0)
        costs.append(part.streamed_arithmetic)
    for share in (0.99, 1.01):
        monkeypatch.setattr(segment_plan, "MOST_EXTRA", share * (costs[1] / costs[0] - 1))
        (part,) = fxstream.plan(model, 200, channels=2, tile=60, segments=1, compile_tiles=True).segments
        assert part.is_uniform == (share > 1)


def test_within_a_memory_they_are_counted():
    """Where uniform tiles do not fit, the plan has others; the prediction holds for either."""
    model, image = network(*(nn.Tanh() for _ in range(3))), integer_image(1, 2, 256, 256, requires_grad=False)
    plain, kinds = fxstream.plan(model, 256, channels=2, memory="1GiB").prediction.plain_bytes, set()
    for share in (0.3, 0.4, 0.5, 0.6):
        module = fxstream.compile(
            model, memory=int(share * plain), compile_tiles={"backend": "eager"}, verify=False
        )
        module(image).sum().backward()
        found = measure(lambda m=module: m(image).sum().backward()).peak_bytes
        plan = module.plan
        assert found <= plan.prediction.bytes * 1.02 + 2**12 <= share * plain * 1.02 + 2**12, plan
        kinds |= {part.is_uniform for part in plan.segments}
    assert True in kinds


def test_what_is_copied_is_counted():
    """A gradient of many channels, in zeros, and the box of an image in host memory."""
    model = nn.Sequential(conv(2, 8, 3, padding=1), nn.ReLU(), conv(8, 48, 1)).double()
    module, image = uniform(model, tile=40), integer_image(1, 2, 150, 130, requires_grad=False)
    module(image).sum().backward()
    found = measure(lambda: backward_step(module, model, image)).peak_bytes
    assert module.plan.segments[0].is_uniform
    assert module.plan.prediction.bytes == pytest.approx(found, rel=1e-4)


def test_the_least_memory_is_that_of_other_tiles():
    model, least = network(*(layer for _ in range(4) for layer in (conv(2, 2, padding=1), nn.ReLU()))), []
    for compiles in (False, True):
        with pytest.raises(fxstream.PlanError) as refused:
            fxstream.plan(model, 256, channels=2, memory="1KiB", compile_tiles=compiles)
        least.append(refused.value.least_bytes)
        assert fxstream.plan(model, 256, channels=2, memory=least[0], compile_tiles=compiles).segments
    assert least[0] == least[1]


def test_blank_tiles_that_own_other_parts_of_a_result_are_not_equal():
    """A constant image: all boxes are equal, but those at borders are cut otherwise."""
    model = network()
    image = torch.full((1, 2, 101, 90), 2.0, dtype=torch.float64)
    module, plain = uniform(model, tile=24), copy.deepcopy(model)
    found, wanted = stepped(module, model, image), stepped(plain, plain, image)
    del found["image"], wanted["image"]
    assert_same(found, wanted, 0.0)
    (stream,) = streams(module)
    cuts = {task.cuts for task in stream.schedule.tasks}
    assert 1 < len(cuts) == len(stream.schedule.tasks) - stream.schedule.repeated


def test_the_format_of_a_map_is_that_of_its_tiles():
    model = network().to(memory_format=torch.channels_last)
    image = integer_image(2, 2, 60, 70).detach().to(memory_format=torch.channels_last).requires_grad_()
    module = run(model, image)
    assert module(image).is_contiguous(memory_format=torch.channels_last)
    assert len({task.cuts for stream in streams(module) for task in stream.schedule.tasks}) > 1


def test_graphs_that_are_kept():
    model, image = network(), integer_image(1, 2, 60, 70)
    module = uniform(model, tile=24)
    module(image)
    for stream in streams(module):
        stream.schedule.tasks = tuple(dataclasses.replace(task, is_kept=True) for task in stream.schedule.tasks)
    assert_same(stepped(module, model, image), stepped(model, model, image), 0.0)


def test_halves_where_memory_runs_out():
    """Of a uniform tile they are ordinary ones."""
    model, image = network(), integer_image(1, 2, 60, 70)
    module = uniform(model, tile=40)
    module(image)
    (stream,) = streams(module)
    for task in stream.schedule.tasks[:2]:
        stream.schedule.put(stream.schedule.halves(task), task)
    assert len(stream.schedule.programs) > 1
    assert_same(stepped(module, model, image), stepped(model, model, image), 0.0)


def test_tiles_that_write_elsewhere():
    model, image = network().eval(), integer_image(1, 2, 90, 70, requires_grad=False)
    module = fxstream.compile(model, tile=24, segments=1, compile_tiles={"backend": "eager"}, verify=False)
    with torch.no_grad():
        wanted = model(image).numpy()
    out = np.zeros_like(wanted)
    fxstream.infer(module, image, out=out)
    assert np.array_equal(out, wanted)
    assert any(part.is_uniform for part in module.plan.segments)
