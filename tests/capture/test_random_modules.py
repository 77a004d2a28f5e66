"""Random modules whose forward is full of Python: compiled and plain do the same in every call."""

import copy
import warnings

import pytest
import torch
from random_modules import Scenario

import fxstream


def state(model):
    """Everything that a forward may have changed."""
    values = {name: value for name, value in vars(model).items() if not name.startswith("_") and name != "pieces"}
    return values | dict(model.named_buffers())


def equal(one, other):
    """Whether two values are of the same type and the same, tensors up to rounding."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.requires_grad == other.requires_grad and torch.allclose(one, other, rtol=1e-9, atol=1e-11)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def run(seed, calls=20):
    """Compare a random module with its copy over some calls; returns how many were streamed."""
    scenario, streamed = Scenario(seed, calls), 0
    model = scenario.model
    plain = copy.deepcopy(model)
    module = fxstream.compile(model, tile=12, verify=False)
    for i in range(calls):
        scenario.change(model, plain)
        image, options, records, draws = scenario.call()
        results = []
        for one in (module, plain):
            torch.manual_seed(draws)
            with torch.set_grad_enabled(records):
                results.append(one(image, **options))
        assert equal(*results), (seed, i)
        mine, theirs = state(model), state(plain)
        assert mine.keys() == theirs.keys()
        wrong = [name for name in mine if not equal(mine[name], theirs[name])]
        assert not wrong, (seed, i, wrong)
        if records:
            for result in results:
                sum(t.square().sum() for t in result).backward()
            for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert equal(a.grad, b.grad), (seed, i, name)
            model.zero_grad(), plain.zero_grad()
        streamed += not module.plan.is_trivial
    return streamed


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(n, marks=pytest.mark.campaign) for n in range(5, 2000))]
)
def test_compiled_and_plain_do_the_same(seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxstream.StreamingWarning)
        assert run(seed)
