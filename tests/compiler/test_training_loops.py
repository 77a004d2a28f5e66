"""Inside the loops that people use, unmodified: the weights after some steps are those of the plain model."""

import copy
import logging
import warnings

import pytest
import torch
from compare import assert_same, assert_streams, captures, relative_error, step
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import fxstream


class Net(nn.Module):
    """Batch statistics; no bias in front of them, for it would have no gradient but rounding."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.body, self.head = nn.Conv2d(4, 4, 3, stride=2), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.bn(self.stem(x))))).mean((2, 3)))


def pair() -> tuple[nn.Module, fxstream.StreamedModule, nn.Module]:
    """A model, the same compiled, and a copy that stays plain."""
    model = Net().double()
    return model, fxstream.compile(model, tile=16), copy.deepcopy(model)


def loader(dtype=torch.double) -> DataLoader:
    images = torch.randn(6, 2, 37, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    return DataLoader(TensorDataset(images, images.mean((1, 2, 3))), batch_size=2)


def assert_same_weights(model, plain, tolerance=1e-10):
    assert_same(dict(model.state_dict()), dict(plain.state_dict()), tolerance)


def loss_of(net, batch):
    images, targets = batch
    return (net(images).sum(1) - targets).square().mean()


def test_lightning():
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Task(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, _):
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    model, module, plain = pair()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for net in (module, plain):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lightning.Trainer(
                max_epochs=1, accelerator="cpu", gradient_clip_val=1.0, accumulate_grad_batches=2, **quiet
            ).fit(Task(net), loader())
    assert not module.plan.is_trivial
    assert_same_weights(model, plain)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    accelerate = pytest.importorskip("accelerate")
    model, module, plain = pair()
    if precision == "bf16":
        model.float(), plain.float()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for net in (module, plain):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        optimiser = torch.optim.SGD(net.parameters(), 0.05)
        prepared, optimiser, batches = accelerator.prepare(net, optimiser, loader(next(net.parameters()).dtype))
        for batch in batches:
            optimiser.zero_grad()
            accelerator.backward(loss_of(prepared, batch))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimiser.step()
        assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is net
    assert not module.plan.is_trivial
    assert_same_weights(model, plain, 1e-10 if precision == "no" else 0.02)


def test_a_plain_loop_with_an_average_of_the_weights():
    model, module, plain = pair()
    averages = []
    for net in (module, plain):
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
        for batch in loader():
            optimiser.zero_grad()
            loss_of(net, batch).backward()
            optimiser.step()
            average.update_parameters(net)
        averages.append(average.eval())
    assert_same_weights(model, plain, 1e-7)  # Adam divides by the smallest of gradients
    assert list(averages[0].state_dict()) == list(averages[1].state_dict())
    x = loader().dataset.tensors[0]
    assert relative_error(*(average(x).detach() for average in averages)) < 1e-7
    assert not averages[0].module.plan.is_trivial
    assert averages[0].module.stem.weight is not model.stem.weight


def spectral(module):
    return parametrizations.spectral_norm(module)


def pruned(module):
    return prune.random_unstructured(module, "weight", 0.5)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, spectral, weight_norm, pruned])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed(change):
    model, module, plain = pair()
    for net in (model, plain):
        torch.manual_seed(3)
        change(net.body)
    for net in (module, plain):
        optimiser = torch.optim.SGD(net.parameters(), 0.05)
        for batch in loader():
            optimiser.zero_grad()
            loss_of(net, batch).backward()
            optimiser.step()
    assert not module.plan.is_trivial
    assert captures(module) <= 2
    assert_same_weights(model, plain)


def test_hooks_that_change_a_result():
    model = fxstream.freeze_batch_norm(Net().double())
    model.stem.register_forward_pre_hook(lambda _, given: (2 * given[0],))
    model.body.register_forward_hook(lambda _, given, result: result + given[0].mean())
    assert_streams(model, loader().dataset.tensors[0][:2], tile=16)


def test_hooks_on_the_compiled_module_and_on_its_parameters():
    _, module, plain = pair()
    seen = [[], []]
    for net, calls in zip((module, plain), seen, strict=True):
        net.register_forward_hook(lambda *_, calls=calls: calls.append("forward"))
        net.register_full_backward_hook(lambda *_, calls=calls: calls.append("backward"))
        net.body.weight.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append(p.shape))
        net.body.weight.register_hook(lambda grad: 3 * grad)
    x = loader().dataset.tensors[0][:2].requires_grad_()
    assert_same(step(module, module, [x]), step(plain, plain, [x]), 1e-10)
    assert sorted(map(str, seen[0])) == sorted(map(str, seen[1]))
    assert len(seen[0]) == 3


def test_the_logger_is_silent_until_asked(caplog, capsys):
    _, module, _ = pair()
    x = loader().dataset.tensors[0]
    module(x)
    assert capsys.readouterr() == ("", "")
    caplog.set_level(logging.INFO, "fxstream")
    module(x[:, :, 1:])
    told = [record.getMessage() for record in caplog.records if record.name == "fxstream"]
    assert told[:-1] == ["Net: plan", "Net: probe", "Net: tile programs"]
    assert "segments, " in told[-1]
    caplog.clear()
    module(x[:, :, 1:])
    assert caplog.records == []
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("fxstream").handlers)
