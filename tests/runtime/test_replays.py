"""Tiles that are replayed: the results and gradients of the plain model, whatever changes between calls."""

import copy
import functools
import gc
import itertools
import math
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from compare import assert_same, integer_image, make_integer, step, streams
from replaying import HostReplayer
from small_networks import CASES, Doubled, Function
from torch import nn

import fxstream
from fxstream.machine.replay import Replayer
from fxstream.runtime.replays.slots import Form, Slots, form_of
from fxstream.runtime.tile_run import Inputs
from fxstream.tiling import segment_plan


def indices_that_exist(self, name, form, get):
    """A static tensor; one of indices has valid ones, with which a host computes when it makes a replay."""
    tensor = get(self, name, form)
    return tensor if form.dtype.is_floating_point else tensor.zero_()


@pytest.fixture(autouse=True)
def replayer(monkeypatch):
    """Replays on the host, which are counted."""
    monkeypatch.setattr(Replayer, "of", staticmethod(lambda device: HostReplayer()))
    monkeypatch.setattr("fxstream.compiler.shared.can_replay", lambda device: True)
    monkeypatch.setattr(Slots, "get", functools.partialmethod(indices_that_exist, get=Slots.get))
    HostReplayer.made = HostReplayer.runs = 0
    return HostReplayer


def compiled(model, **options):
    return fxstream.compile(model, **{"tile": 13, "segments": 1, "cuda_graphs": True, "verify": False, **options})


def network(*more):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2), *more]
    return make_integer(nn.Sequential(*layers))


@pytest.mark.filterwarnings("ignore:.*bound to the size of its input")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.campaign] * (k % 3 > 0)) for k, name in enumerate(CASES)]
)
def test_small_networks(name, replayer):
    model = make_integer(CASES[name]).eval()
    first = model.a if name == "positional parameter" else next(m for m in model.modules() if hasattr(m, "groups"))
    plain, module = copy.deepcopy(model), compiled(model)
    is_bound = name == "positional parameter"
    for batch in (2, 2) if is_bound else (2, 2, 1):
        image = integer_image(batch, first.in_channels, *((21, 17) if is_bound else (49, 41)))
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
    assert replayer.runs >= replayer.made > 0


def test_calls_are_fewer_than_tiles(replayer):
    """Nine classes in both passes, each of which runs by itself once."""
    module, image = compiled(network()), integer_image(1, 3, 96, 96)
    step(module, module, [image])
    tiles = module.plan.segments[0].tile_count
    assert (replayer.made, replayer.runs) == (2 * 5, 2 * (tiles - 9))
    step(module, module, [image])
    assert (replayer.made, replayer.runs) == (2 * 9, 2 * (2 * tiles - 9))


def test_tiles_of_one_shape(monkeypatch, replayer):
    """One class in both passes, whatever a tile owns of it."""
    monkeypatch.setattr(segment_plan, "MOST_EXTRA", math.inf)
    monkeypatch.setattr(torch, "compile", lambda program, **options: program)
    model = network()
    plain, module, tiles = copy.deepcopy(model), compiled(model, tile=24, compile_tiles=True), 0
    for size in (96, 96, 128):
        image = integer_image(1, 3, size, size)
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
        (part,) = module.plan.segments
        assert part.is_uniform
        tiles += part.tile_count
    assert (replayer.made, replayer.runs) == (2, 2 * (tiles - 1))


def test_weights_that_change(replayer):
    model = network()
    plain, module, image = copy.deepcopy(model), compiled(model), integer_image(1, 3, 49, 41)
    for _ in range(3):
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
        with torch.no_grad():
            for one in (model, plain):
                for parameter in one.parameters():
                    parameter.add_(1)
    model[0].weight = nn.Parameter(model[0].weight.detach() - 1)
    plain[0].weight = nn.Parameter(plain[0].weight.detach() - 1)
    assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
    assert replayer.runs


def two_results(module, image):
    first = module.a(image)
    return module.b(first), first


def test_gradients_that_are_asked_for(replayer):
    """Of the image or not, of some weights, of one result of two."""
    model = Function(two_results, a=nn.Conv2d(3, 4, 3, padding=1), b=nn.Conv2d(4, 4, 3, padding=1))
    plain = copy.deepcopy(make_integer(model))
    module = compiled(model)
    for asks, frozen, k in itertools.product((False, True), ("", "a", "b"), (0, 1)):
        image = integer_image(1, 3, 41, 49).detach().requires_grad_(asks)
        gradients = []
        for called, one in ((module, model), (plain, plain)):
            for name, parameter in one.named_parameters():
                parameter.requires_grad_(not frozen or not name.startswith(frozen))
                parameter.grad = None
            image.grad = None
            output = called(image)[k]
            if output.requires_grad:
                output.square().sum().backward()
            gradients.append([image.grad, *(p.grad for p in one.parameters())])
        for streamed, expected in zip(*gradients, strict=True):
            assert (streamed is None) == (expected is None)
            assert streamed is None or torch.equal(streamed, expected)
    assert replayer.runs


def test_batch_statistics(replayer):
    """Several passes, whose partial results outlast the tile, and running statistics."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)).double().train()
    plain = copy.deepcopy(model)
    module, image = compiled(model, segments=None), torch.randn(2, 3, 61, 53, dtype=torch.float64).requires_grad_()
    for _ in range(2):
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 1e-10)
        assert_same(dict(model.named_buffers()), dict(plain.named_buffers()), 1e-12)
    assert replayer.runs


def test_resampling_by_tables(replayer):
    model = network(nn.Upsample(size=(33, 29), mode="bilinear"), nn.Conv2d(4, 2, 3, padding=1))
    plain, module = copy.deepcopy(model), compiled(model, tile=20)
    for _ in range(2):
        image = torch.randn(1, 3, 64, 56, dtype=torch.float64).requires_grad_()
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 1e-12)
    assert replayer.runs


def test_autocast(replayer):
    """A replay is of one state of autocast."""
    model = network().float()
    module, without = compiled(model), compiled(model, cuda_graphs=False)
    image = torch.randn(1, 3, 49, 41).requires_grad_()
    for enabled in (True, False, True):
        results = []
        for one in (module, without):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append(step(one, model, [image]))
        assert_same(*results, 0.0)
    assert replayer.runs


def test_images_of_two_memory_formats_and_sizes(replayer):
    model = network()
    plain, module = copy.deepcopy(model), compiled(model)
    for shape in [(1, 3, 49, 41), (1, 3, 60, 70), (1, 3, 49, 41)]:
        for layout in (torch.contiguous_format, torch.channels_last):
            image = integer_image(*shape).detach().contiguous(memory_format=layout).requires_grad_()
            assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
    assert replayer.runs


def test_calls_in_inference_mode(replayer):
    """Static tensors that are made there serve a training step."""
    model = network()
    plain, module, image = copy.deepcopy(model), compiled(model), integer_image(1, 3, 49, 41)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(module(image), plain(image))
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
    assert replayer.runs


def test_a_result_is_not_written_again():
    """What a call returned, and its gradients, are not the static tensors of later calls."""
    module, image = compiled(network()), integer_image(1, 3, 49, 41)
    kept = step(module, module, [image])
    first = {name: value.clone() for name, value in kept.items()}
    step(module, module, [image.detach().mul(2).requires_grad_()])
    assert_same(kept, first, 0.0)


def test_two_backwards_of_two_forwards():
    """The passes of several calls may come in any order."""
    model = network()
    module, images = compiled(model), [integer_image(1, 3, 49, 41) for _ in range(2)]
    outputs = [module(image) for image in images]
    for k in (1, 0):
        model.zero_grad()
        outputs[k].square().sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        assert torch.equal(outputs[k], model(images[k]))
        model.zero_grad()
        model(images[k]).square().sum().backward()
        assert_same(gradients, {name: p.grad for name, p in model.named_parameters()}, 0.0)


def test_a_function_of_the_user_is_not_replayed(replayer):
    model = Function(lambda m, x: m.b(Doubled.apply(m.a(x))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 3))
    plain, image = copy.deepcopy(make_integer(model)), integer_image(1, 3, 49, 41)
    assert_same(step(compiled(model), model, [image]), step(plain, plain, [image]), 0.0)
    assert replayer.made == 0


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_replayed(monkeypatch, kind):
    """Then tiles run operator by operator, with a warning, once."""
    model = network()
    plain, module, image = copy.deepcopy(model), compiled(model), integer_image(1, 3, 49, 41)

    def fails(self, function):
        function()
        raise kind("not permitted\nwhen capturing")

    monkeypatch.setattr(HostReplayer, "replay_of", fails)
    with pytest.warns(
        fxstream.StreamingWarning, match="`segment_0`: tiles run operator by operator.*not permitted$"
    ):
        assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)
    assert_same(step(module, model, [image]), step(plain, plain, [image]), 0.0)


@pytest.mark.filterwarnings("ignore::fxstream.StreamingWarning")
@pytest.mark.parametrize("at", range(1, 14))
@pytest.mark.parametrize("what", ["run", "recorded"])
def test_memory_that_runs_out(monkeypatch, what, at, replayer):
    """Replays are given up before tiles are halved, and nothing is counted twice."""
    model = network(nn.AdaptiveAvgPool2d(1))
    plain, module, image = copy.deepcopy(model), compiled(model), integer_image(1, 3, 49, 41)
    original, calls, made = getattr(Inputs, what), [], []

    def fails_once(*args):
        calls.append(1)
        if len(calls) == at:
            made.append(replayer.made)
            raise torch.OutOfMemoryError("out of memory, as a test")
        return original(*args)

    monkeypatch.setattr(Inputs, what, fails_once)
    expected = step(plain, plain, [image])
    for _ in range(2):
        assert_same(step(module, model, [image]), expected, 1e-12)
    (stream,) = streams(module)
    assert made
    assert not (stream.schedule.is_reduced and made != [0])


def test_memory_is_given_back(monkeypatch):
    module, image = compiled(network()), integer_image(1, 3, 49, 41)
    step(module, module, [image])
    kept = fxstream.inspect(module).shared.replays._kept[image.device]
    storage = weakref.ref(next(iter(kept.slots._memory.values())))
    monkeypatch.setattr(Inputs, "run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(fxstream.StreamError):
            module(integer_image(1, 3, 50, 41))
    assert "without CUDA graphs" in str(caught[0].message)
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize("size", [(61, 53), (96, 70)])
def test_static_tensors_are_of_the_largest_tile(size, replayer):
    """Classes share them, and what is predicted has room for them and the copies of the weights."""
    model = network()
    module, image = compiled(model), integer_image(2, 3, *size)
    step(module, model, [image])
    (plan,) = module.plan.segments
    request = fxstream.plan(model, size, tile=13, segments=1, batch=2, device="cuda", cuda_graphs=True)
    unit = request.prediction.peak
    weights = sum(parameter.nbytes for parameter in model.parameters())
    count = fxstream.inspect(module).shared.replays.bytes
    assert plan.tile_count == request.segments[0].tile_count
    assert weights < count <= unit.replays - unit.unit
    kept = fxstream.inspect(module).shared.replays._kept[image.device]
    boxes = {one.arguments[0].untyped_storage().data_ptr() for one in kept.replays.values()}
    assert boxes == {kept.slots._memory[("box", 0), torch.float64].data_ptr()}
    assert kept.slots._memory[("box", 0), torch.float64].numel() == 2 * 3 * 13 * 13


def test_threads(replayer):
    """One of two threads uses the replays, the other runs operator by operator."""
    model = network()
    module, images = compiled(model), [integer_image(1, 3, 49, 41 + 8 * k).detach() for k in range(4)]
    expected, results = [model(image) for image in images], {}

    def call(k):
        with torch.no_grad():
            for _ in range(5):
                results[k] = module(images[k])

    threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, wanted in enumerate(expected):
        assert torch.equal(results[k], wanted)
    assert replayer.runs


def test_copies_have_replays_of_their_own():
    module, image = compiled(network()), integer_image(1, 3, 49, 41)
    first = step(module, module, [image])
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(step(other, other, [image]), first, 0.0)


def test_slots_share_memory():
    slots = Slots(torch.device("cpu"))
    slots.reserve("box", 12)
    small, large = (
        slots.get("box", Form(shape, strides, torch.float32))
        for shape, strides in [((2,), (1,)), ((3, 4), (4, 1))]
    )
    assert small.data_ptr() == large.data_ptr()
    other = slots.get("box", Form((2,), (1,), torch.float64))
    assert other.data_ptr() != small.data_ptr()
    assert slots.get("box", Form((13,), (1,), torch.float32)).data_ptr() != small.data_ptr()


def test_forms_are_dense():
    image = torch.zeros(2, 3, 8, 10)
    assert form_of(image[..., 1:5, 2:8]) == Form((2, 3, 4, 6), (72, 24, 6, 1), torch.float32)
    last = image.contiguous(memory_format=torch.channels_last)
    assert form_of(last[..., 1:5, 2:8]) == Form((2, 3, 4, 6), (72, 1, 18, 3), torch.float32)


def test_a_device_without_graphs(monkeypatch):
    monkeypatch.undo()
    module = compiled(network())
    with pytest.warns(fxstream.StreamingWarning, match="cuda_graphs changes nothing on cpu"):
        module(integer_image(1, 3, 49, 41))
