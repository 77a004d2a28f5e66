"""The schedule: what runs how often, and what is kept. And the oracle itself, shown to fail on seeded faults."""

import gc
import math
import types

import pytest
import torch
from compare import assert_same, assert_streams, integer_image, make_integer, step
from torch import nn

import fxstream
from fxstream.geometry import receptive_field
from fxstream.machine.meter import PeakMemory, measure
from fxstream.planning import plan as planning
from fxstream.runtime import backward, forward
from fxstream.runtime import stream as stream_module
from fxstream.tiling import reuse as economy
from fxstream.tiling.axes import bounds as demand


def network() -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 2, 3, padding=1)]
    return make_integer(nn.Sequential(*layers))


def streams(module) -> list[stream_module.Stream]:
    return [m.stream for m in fxstream.inspect(module).last.streamed.modules() if hasattr(m, "stream")]


@pytest.mark.parametrize("segments", [1, 2])
def test_each_output_pixel_is_written_once(segments):
    module = fxstream.compile(network(), tile=13, segments=segments)
    module(integer_image(1, 2, 31, 26))
    assert len(streams(module)) == segments
    for stream in streams(module):
        for k, shape in enumerate(stream.outputs):
            written = torch.zeros(shape.shape)
            for call in stream.schedule.tasks:
                written[call.outputs[k]] += 1
            assert torch.equal(written, torch.ones(shape.shape))


def test_each_tile_is_computed_once_forward_and_once_backward(monkeypatch):
    module = fxstream.compile(network(), tile=13, segments=1, verify=False)
    image = integer_image(1, 2, 31, 26)
    module(image)
    (stream,) = streams(module)
    calls = {"forward": [], "recomputation": []}
    for i, program in enumerate(stream.schedule.programs):
        assert program.forward is not program.recomputation  # it ends in a convolution
        for kind, found in calls.items():
            module_of_kind = getattr(program, kind)
            run = module_of_kind.forward
            monkeypatch.setattr(module_of_kind, "forward", lambda *a, i=i, f=run, c=found: (c.append(i), f(*a))[1])
    expected = sorted(call.program for call in stream.schedule.tasks)
    y = module(image)
    assert (sorted(calls["forward"]), calls["recomputation"]) == (expected, [])
    y.sum().backward()
    assert (sorted(calls["forward"]), sorted(calls["recomputation"])) == (expected, expected)


def test_a_convolution_at_the_end_is_not_recomputed():
    model = make_integer(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)))
    module, image = fxstream.compile(model, tile=13, segments=1), integer_image(2, 2, 31, 26)
    assert_same(step(module, model, [image]), step(model, model, [image]), 0.0)
    (stream,) = streams(module)
    for program in stream.schedule.programs:
        assert program.forward.code.count("aten.conv2d.default") == 2
        assert program.recomputation.code.count("aten.conv2d.default") == 1
        assert program.recomputation.code.count("uncomputed_convolution(") == 1
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = module(image.float()), model(image.float())
        (found,) = torch.autograd.grad(y.float().sum(), model[0].weight)
        (wanted,) = torch.autograd.grad(wanted.float().sum(), model[0].weight)
    assert torch.allclose(found, wanted, rtol=0.05, atol=8.0)


@pytest.mark.parametrize("arguments", [(), (2,), ([2, 1], [1, 0]), (1, 2, [1, 2])])
def test_what_is_not_recomputed_is_cast_as_autocast_does(arguments):
    """Without a dilation behind its stride it once failed under autocast."""
    given = [torch.randn(shape, requires_grad=True) for shape in ((1, 2, 9, 8), (3, 2, 3, 3), (3,))]
    found = []
    for convolution in (torch.nn.functional.conv2d, economy.uncomputed_convolution):
        with torch.autocast("cpu", torch.bfloat16):
            y = convolution(*given, *arguments)
        found.append((y.dtype, y.shape, *torch.autograd.grad(y.sum(), given)))
    assert found[0][:2] == found[1][:2]
    for wanted, mine in zip(found[0][2:], found[1][2:], strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, wanted)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")  # bound to its size: it has no batch to vary
@pytest.mark.parametrize("shape", [(2, 31, 26), (2, 13, 17, 26)])
def test_an_image_without_its_batch_dim(shape):
    """Layers of torch take one; the last convolution is not recomputed."""
    layer = nn.Conv2d if len(shape) == 3 else nn.Conv3d
    model = make_integer(nn.Sequential(layer(2, 3, 3, padding=1), nn.ReLU(), layer(3, 2, 3)))
    module, image = fxstream.compile(model, tile=13), integer_image(*shape)
    assert_same(step(module, model, [image]), step(model, model, [image]), 0.0)
    assert sum(len(stream.schedule.tasks) for stream in streams(module)) > 1


def test_relu_takes_over_the_memory_of_its_input_where_nothing_else_needs_it():
    model = make_integer(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Sigmoid()))
    module = fxstream.compile(model, tile=20, segments=1)
    module(integer_image(1, 2, 40, 40))
    assert "relu_.default" in streams(module)[0].schedule.programs[0].forward.code
    for keeps in (nn.SiLU(), nn.Hardtanh(0.0, 6.0), nn.GELU()):  # their backward needs their input
        model = make_integer(nn.Sequential(nn.Conv2d(2, 3, 3), keeps, nn.Conv2d(3, 2, 3)))
        module, image = fxstream.compile(model, tile=20, segments=1), integer_image(1, 2, 40, 40)
        assert_same(step(module, model, [image]), step(model, model, [image]), 1e-12)
        assert "_.default" not in streams(module)[0].schedule.programs[0].forward.code


def test_interior_tiles_share_one_program():
    module = fxstream.compile(network(), tile=20, segments=1, verify=False)
    module(integer_image(1, 2, 160, 160))
    (stream,) = streams(module)
    assert len(stream.schedule.tasks) > 60
    assert len(stream.schedule.programs) <= 16


def test_a_tile_program_prints_its_crops_and_pads():
    module = fxstream.compile(network(), tile=13, segments=1, verify=False)
    module(integer_image(1, 2, 31, 26))
    code = streams(module)[0].schedule.programs[0].forward.code
    assert "constant_pad_nd" in code
    assert "conv2d" in code


def test_a_convolution_pads_by_itself_where_that_computes_little_in_vain():
    model = make_integer(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)))
    image = integer_image(1, 2, 96, 90)
    for tile, copies in ((50, False), (7, True)):
        module = fxstream.compile(model, tile=tile, segments=1)
        assert_same(step(module, model, [image]), step(model, model, [image]), 0.0)
        assert copies == any(
            "constant_pad_nd" in program.forward.code for program in streams(module)[0].schedule.programs
        )


def test_the_rewritten_graph_has_one_call_per_segment():
    module = fxstream.compile(network(), tile=13, segments=2, verify=False)
    module(integer_image(1, 2, 31, 26))
    assert [n.name for n in module.graph.nodes if n.op == "call_module"] == ["segment_0", "segment_1"]


def test_nothing_is_kept_beyond_leaves_output_and_their_gradients():
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 1, 3, stride=4)
    )
    module = fxstream.compile(model, tile=40, segments=1, verify=False)
    module(torch.randn(1, 2, 200, 200))
    with PeakMemory() as memory:
        y = module(torch.randn(1, 2, 200, 200, requires_grad=True))
    gc.collect()
    assert memory.live == y.numel() * 4 + 2 * 200 * 200 * 4


def test_peak_memory_does_not_grow_with_the_image():
    layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 1, 3, stride=8)]
    model = nn.Sequential(*layers)
    module = fxstream.compile(model, tile=96, segments=1, verify=False)
    peaks = []
    for size in (192, 384, 768):
        image = torch.randn(1, 1, size, size)
        module(image)
        kept = 3 * 4 * (size // 8) ** 2  # output, its gradient, and a margin of one more
        peaks.append(measure(lambda image=image: module(image).sum().backward()).peak_bytes - kept)
    assert max(peaks) < 1.1 * min(peaks)
    plain = measure(lambda: model(image).sum().backward()).peak_bytes
    assert max(peaks) < plain / 10


# Faults: each must be caught by the comparison.


def caught() -> bool:
    try:
        assert_streams(network(), integer_image(2, 2, 31, 26), tile=15, segments=1, tolerance=0.0, verify=False)
    except (AssertionError, RuntimeError):
        return True
    return False


def test_no_fault_is_not_caught():
    assert not caught()


def test_dropped_halo_is_caught(monkeypatch):
    window = receptive_field.AxisMap.window.__func__

    def narrow(cls, kernel, stride, padding, dilation=1):
        full = window(cls, kernel, stride, padding, dilation)
        return cls(full.num, full.den, full.first + 1, full.last) if kernel > 1 else full

    monkeypatch.setattr(receptive_field.AxisMap, "window", classmethod(narrow))
    assert caught()


def test_shifted_map_is_caught(monkeypatch):
    window = receptive_field.AxisMap.window.__func__

    def shifted(cls, kernel, stride, padding, dilation=1):
        full = window(cls, kernel, stride, padding, dilation)
        return cls(full.num, full.den, full.first + 1, full.last + 1)

    monkeypatch.setattr(receptive_field.AxisMap, "window", classmethod(shifted))
    assert caught()


def without_last_tile(stream: stream_module.Stream) -> stream_module.Stream:
    stream.schedule.tasks = stream.schedule.tasks[:-1]
    return stream


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_skipped_tile_is_caught(monkeypatch, when):
    allocate = forward._allocate
    monkeypatch.setattr(
        forward, "_allocate", lambda *a: allocate(*a).fill_(7)
    )  # not a leftover of the right answer
    build = stream_module.build_stream
    if when == "forward":
        monkeypatch.setattr(
            "fxstream.runtime.rewrite.build_stream", lambda *a, **k: without_last_tile(build(*a, **k))
        )
    else:
        run = backward.Backward.run
        monkeypatch.setattr(backward.Backward, "run", lambda self, turns, *rest: run(self, turns[:-1], *rest))
    assert caught()


def test_stale_plan_is_caught(monkeypatch):
    known = {}
    real = planning.make_plan
    monkeypatch.setattr(
        "fxstream.compiler.pipeline.make_plan", lambda *a, **k: known.setdefault("plan", real(*a, **k))
    )
    model = network()
    module = fxstream.compile(model, tile=15, segments=1, verify=False)
    assert torch.equal(module(image := integer_image(1, 2, 31, 26)), model(image))
    with pytest.raises((RuntimeError, AssertionError)):
        assert torch.equal(module(other := integer_image(1, 2, 37, 40)), model(other))


def test_wrong_fill_is_caught(monkeypatch):
    monkeypatch.setattr("fxstream.rules.windowed.math", types.SimpleNamespace(inf=0.0, prod=math.prod))
    model = make_integer(nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(3, 2, 1)))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-9.0)
    with pytest.raises(AssertionError):
        assert_streams(model, integer_image(1, 1, 21, 21), tile=9, segments=1, tolerance=0.0, verify=False)


def test_box_that_starts_late_is_caught(monkeypatch):
    walk = demand.BoundsPass._walk

    def shifted(self, *arguments):
        starts, stops, is_outside = walk(self, *arguments)
        return [s + (1 if 0 < s < e - 1 else 0) for s, e in zip(starts, stops, strict=True)], stops, is_outside

    monkeypatch.setattr(demand.BoundsPass, "_walk", shifted)
    assert caught()
