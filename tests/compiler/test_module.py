"""The compiled module in the places where the plain one is used (invariant 4)."""

import copy
import io
import pickle
import socket
import warnings

import pytest
import torch
import torch.ao.quantization as tq
import torch.distributed as dist
import torch.nn.functional as F
from compare import assert_same, integer_image, make_integer, relative_error, step
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fxstream


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, stride=2)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(F.relu(self.body(F.relu(self.bn(self.stem(x))))).mean((2, 3)))


def frozen() -> nn.Module:
    return fxstream.freeze_batch_norm(Net()).double().train()


def compiled(model, verify=False) -> fxstream.StreamedModule:
    return fxstream.compile(model, tile=16, verify=verify)


def image(batch=2):
    return torch.randn(batch, 2, 37, 30, dtype=torch.double, requires_grad=True)


def check(module, model, x) -> None:
    plain = copy.deepcopy(model)
    assert_same(step(module, model, [x]), step(plain, plain, [x]), 1e-12)
    assert not module.plan.is_trivial


def test_parameters_are_the_same_objects():
    model = frozen()
    module = compiled(model)
    assert all(a is b for a, b in zip(module.parameters(), model.parameters(), strict=True))
    assert list(module.state_dict()) == list(model.state_dict())
    assert [n for n, _ in module.named_modules()] == [n for n, _ in model.named_modules()]


def test_state_dict_round_trip():
    model, other = frozen(), frozen()
    module = compiled(model)
    module(image())
    module.load_state_dict(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    check(module, model, image())


def test_optimiser_step_and_dtype_change():
    model = frozen()
    module = compiled(model)
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):
        check(module, model, image())
        optimiser.step()
    module.float()
    x = image().detach().float()
    assert model.stem.weight.dtype == torch.float32
    assert relative_error(module(x).detach(), model(x).detach()) < 1e-5


def test_deepcopy_and_pickle():
    module = compiled(frozen())
    module(image())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.stem.weight is not module.stem.weight
        assert not other.bn.training
        assert not other.train().bn.training
        check(other, other.model, image())


def test_train_and_eval():
    model = Net().double()
    module = compiled(model, verify=True)
    assert module.eval().model.training is False
    check(module, model, image())
    module.train()
    assert model.bn.training
    plain = copy.deepcopy(model)
    x = image()
    assert_same(step(module, model, [x]), step(plain, plain, [x]), 1e-10)
    module(image())
    module(image(1))
    assert int(model.bn.num_batches_tracked) == 3


def test_global_operators_may_end_the_stream():
    model = Net().double().train()
    module = fxstream.compile(model, tile=20, global_ops="cut")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(module, model, [image()])
        module(image())
    assert len([w for w in caught if w.category is fxstream.StreamingWarning]) == 1
    assert "freeze_batch_norm" in str(caught[0].message)
    assert "`bn`" in str(caught[0].message)
    with pytest.raises(fxstream.InputError, match="global_ops must be one of 'auto', 'stream', 'cut'"):
        fxstream.compile(model, tile=20, global_ops="all")


def test_running_statistics_are_updated_once_when_a_part_is_streamed():
    parts = [
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3),
    ]
    model = nn.Sequential(*parts).double().train()
    plain, x = copy.deepcopy(model), image()
    module = fxstream.compile(model, tile=20, segments=1)
    assert_same(step(module, model, [x]), step(plain, plain, [x]), 1e-12)
    assert int(model[3].num_batches_tracked) == 1
    assert len(module.plan.segments) == 2  # statistics first, then everything


def test_small_images_take_the_plain_path():
    model = frozen()
    module = fxstream.compile(model, tile=64)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    module(image())  # captures
    calls.clear()
    module(image())
    assert calls == [1]
    assert module.plan.is_trivial


class CheckpointedNorm(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.a, self.norm, self.c = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.a(x)
        if self.use_reentrant is None:
            return self.c(self.block(x))
        return self.c(checkpoint(self.block, x, use_reentrant=self.use_reentrant))

    def block(self, x):
        return torch.relu(self.norm(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_statistics_in_a_checkpoint_of_the_model_are_updated_once(use_reentrant):
    """In eager mode the block runs twice, and updates them twice."""
    model = CheckpointedNorm(use_reentrant).double()
    plain = copy.deepcopy(model)
    plain.use_reentrant = None
    image = torch.randn(2, 3, 24, 24).double().requires_grad_()
    assert_same(step(fxstream.compile(model, tile=12), model, [image]), step(plain, plain, [image]), 1e-10)
    assert model.norm.num_batches_tracked == plain.norm.num_batches_tracked == 1
    assert torch.allclose(model.norm.running_var, plain.norm.running_var, rtol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_checkpoint(use_reentrant):
    model = frozen()
    module, x = compiled(model), image()
    plain = copy.deepcopy(model)
    found = step(lambda x: checkpoint(module, x, use_reentrant=use_reentrant), model, [x])
    assert_same(found, step(plain, plain, [x]), 1e-12)


def test_autocast():
    torch.manual_seed(3)
    model = fxstream.freeze_batch_norm(Net(16)).train()
    module, x = fxstream.compile(model, tile=16), torch.randn(2, 2, 37, 30)

    def gradients(net, reference=False):
        model.zero_grad()
        if reference:
            net(x.double()).square().sum().backward()
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = net(x)
            assert out.dtype == torch.bfloat16
            out.square().sum().backward()
        return {n: p.grad for n, p in net.named_parameters()}

    plain = gradients(copy.deepcopy(model))
    exact = gradients(copy.deepcopy(model).double(), reference=True)
    streamed = gradients(module)
    for name, wanted in exact.items():
        error, plain_error = (relative_error(g[name].double(), wanted) for g in (streamed, plain))
        assert error <= 2 * plain_error + 1e-3, name
    assert model.stem.weight.grad.dtype == torch.float32


def test_autocast_cache_does_not_lose_gradients():
    """A weight cast without recording must not be reused by a recorded use in the same autocast region."""
    model = nn.Conv2d(2, 2, 3, padding=1)
    module = fxstream.compile(model, tile=12, segments=1)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(1, 2, 30, 30)
        loss = module(x).sum() + model(x).sum()
    loss.backward()
    streamed = model.weight.grad.clone()
    model.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        (2 * model(x).sum()).backward()
    assert relative_error(streamed, model.weight.grad) < 0.02


def test_low_precision_parameters_are_summed_in_float32():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)).bfloat16()
    x = torch.randn(1, 1, 60, 60, dtype=torch.bfloat16)
    exact = step(*[copy.deepcopy(model).double()] * 2, [x.double()])
    plain = step(*[copy.deepcopy(model)] * 2, [x])
    streamed = step(fxstream.compile(model, tile=10), model, [x])
    for name in ("grad of 0.weight", "grad of 2.weight", "grad of 0.bias"):
        wanted = exact[name]
        errors = [relative_error(r[name].double(), wanted) for r in (streamed, plain)]
        assert errors[0] <= 2 * errors[1], name
        assert streamed[name].dtype == torch.bfloat16


def test_no_grad_and_inference_mode():
    model = frozen()
    module, x = compiled(model), image().detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert relative_error(module(x), model(x)) < 1e-12
    assert torch.is_grad_enabled()


def test_frozen_stem_returns_no_gradient():
    model = frozen()
    model.stem.requires_grad_(False)
    x = image().detach()
    module = compiled(model)
    module(x).sum().backward()
    assert model.stem.weight.grad is None
    check(module, model, x)


def test_retain_graph_and_two_backwards():
    model = make_integer(nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3)))
    y = fxstream.compile(model, tile=10)(integer_image(1, 2, 20, 20)).sum()
    y.backward(retain_graph=True)
    once = model[0].weight.grad.clone()
    y.backward()
    assert torch.equal(model[0].weight.grad, 2 * once)


def test_no_files_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compiled(frozen())(image()).sum().backward()
    assert list(tmp_path.iterdir()) == []


def _train(rank: int, port: int, state, images, results) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = frozen()
    model.load_state_dict(state)
    ddp = nn.parallel.DistributedDataParallel(fxstream.compile(model, tile=16))
    ddp(images[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        results.put({n: p.grad.numpy() for n, p in model.named_parameters()})
    dist.barrier()
    dist.destroy_process_group()


def test_ddp_over_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model, images = frozen(), image().detach()
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (port, model.state_dict(), images, results)
    processes = torch.multiprocessing.spawn(_train, arguments, nprocs=2, join=False)
    found = results.get()
    processes.join(120)
    model(images).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(torch.from_numpy(found[name]), parameter.grad) < 1e-12, name


def test_a_call_without_gradients_has_a_plan_of_its_own():
    """Within a memory that a prediction fits and a step does not: the step does not run by the first plan."""
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers)
    image = torch.randn(1, 3, 96, 96)
    plain = [fxstream.plan(model, 96, memory="1GiB", training=t).prediction.plain_bytes for t in (False, True)]
    assert 1.5 * plain[0] < plain[1]
    module = fxstream.compile(model, memory=int(1.2 * plain[0]), verify=False)
    with torch.no_grad():
        module(image)
    assert (module.plan.is_trivial, module.plan.prediction.training) == (True, False)
    module(image).sum().backward()
    assert (module.plan.is_trivial, module.plan.prediction.training) == (False, True)
    with torch.no_grad():
        module(image)
    assert module.plan.is_trivial


def test_an_image_whose_gradient_is_asked_for_has_a_plan_of_its_own():
    """Within a memory that gradient counts."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    plain = fxstream.plan(model, 64, memory="1GiB").prediction.plain_bytes
    module, image = fxstream.compile(model, memory=int(0.9 * plain), verify=False), torch.randn(1, 3, 64, 64)
    module(image)
    without = module.plan
    module(image.clone().requires_grad_())
    assert module.plan is not without
    module(image)
    assert module.plan is without


def test_every_size_has_a_plan_of_its_own():
    module = fxstream.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)), tile=20, verify=False)
    plans = {}
    for size in ((1, 40, 40), (1, 40, 41), (2, 40, 40), (1, 40, 40)):
        module(torch.randn(size[0], 3, *size[1:]))
        plans.setdefault(size, module.plan)
        assert module.plan is plans[size]
    assert len(set(map(id, plans.values()))) == 3


class Quantised(nn.Module):
    """As torch.ao.quantization makes them: weights packed into an object that is no tensor."""

    def __init__(self):
        super().__init__()
        model = nn.Sequential(tq.QuantStub(), nn.Conv2d(3, 8, 3), nn.ReLU(), tq.DeQuantStub()).eval()
        model.qconfig = tq.get_default_qconfig(torch.backends.quantized.engine)
        tq.prepare(model, inplace=True)(torch.randn(1, 3, 16, 16))
        self.layers = tq.convert(model)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_model_is_called_that():
    with pytest.raises(fxstream.CaptureError, match=r"`layers.0` \(Quantize\) is quantised to integers.*convert$"):
        fxstream.compile(Quantised(), tile=16)(torch.randn(1, 3, 40, 40))


TRACERS = {
    "TorchScript": lambda module, x: torch.jit.trace(module, x),
    "ONNX": lambda module, x: torch.onnx.export(module, (x,), io.BytesIO(), dynamo=False),
    "torch.export": lambda module, x: torch.export.export(module, (x,)),
    "make_fx": lambda module, x: make_fx(module)(x),
    "torch.fx": lambda module, x: torch.fx.symbolic_trace(nn.Sequential(module)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("ran", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_compiled_module_is_not_traced(tracer, ran):
    model, x = frozen().eval(), image()
    module = compiled(model)
    if ran:
        module(x)
    with pytest.raises(
        fxstream.InputError, match=r"cannot be traced or exported: export the model, .*inspect\(compiled\)\.model"
    ):
        TRACERS[tracer](module, x)
    assert relative_error(module(x), model(x)) < 1e-12
    assert not module.plan.is_trivial


def test_a_compiled_module_as_a_part_of_another_one():
    inner = frozen()
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1).double(), compiled(inner))
    x = image()
    streamed = fxstream.compile(model, tile=16, verify=False)
    plain = copy.deepcopy(nn.Sequential(model[0], inner))
    assert relative_error(streamed(x), plain(x)) < 1e-12
    assert not streamed.plan.is_trivial


def test_properties_of_the_last_call_before_the_first():
    module = compiled(frozen())
    assert not hasattr(module, "plan")
    with pytest.raises(fxstream.InputError, match="nothing is known before the first call"):
        module.plan  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        module.plans  # noqa: B018


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "DataParallel"])
def test_wrappers_for_several_devices_come_around_the_compiled_module(wrapper):
    wrapped = getattr(nn.parallel, wrapper).__new__(getattr(nn.parallel, wrapper))
    with pytest.raises(
        fxstream.InputError, match=r"wrap the compiled module: DistributedDataParallel\(fxstream\.c"
    ):
        fxstream.compile(wrapped, tile=16)
