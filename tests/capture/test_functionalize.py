"""What of a captured graph is changed in place, what draws, and how an export treats the rest of the process."""

import threading

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import convert_frame

from fxstream.capture.aten import to_aten
from fxstream.capture.capture import capture
from fxstream.capture.size_symbols import explain_sizes, size_dependent_constants
from fxstream.capture.trace import Tracer
from fxstream.graph.effects import UNSTREAMED, is_random, mutated_inputs, ordered_nodes


class Function(nn.Module):
    """A function of the input as a model."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def nodes(function):
    graph = capture(Function(function), (torch.zeros(2, 3, 8, 8),), {})[0].graph
    return {str(node.target).removeprefix("aten."): node for node in graph.nodes if node.op == "call_function"}


def test_an_in_place_operator_is_replaced_and_keeps_the_type():
    by_target = nodes(lambda x: (x > 0).half().mul_(x) + (x * 1).relu_())
    assert not any(map(mutated_inputs, by_target.values()))
    assert {"mul.Tensor", "to.dtype", "relu.default"} <= by_target.keys()


def test_what_shares_storage_with_a_value_changed_in_place_is_unstreamed():
    def through_view(x):
        y = x + 1
        z = y.view(2, -1)
        z += 1
        return y.exp(), x.sin()

    by_target = nodes(through_view)
    assert [name for name in by_target if UNSTREAMED in by_target[name].meta] == [
        "add.Tensor",
        "view.default",
        "add_.Tensor",
    ]
    assert "changed in place by `add_`" in by_target["add.Tensor"].meta[UNSTREAMED]


def test_a_view_that_nothing_reads_later_does_not_keep_an_operator_in_place():
    def before(x):
        y = x + 1
        z = y.view(2, -1).sum()
        return y.relu_() * z

    by_target = nodes(before)
    assert "relu.default" in by_target
    assert not any(UNSTREAMED in node.meta for node in by_target.values())


def test_random_operators_are_those_that_draw():
    by_target = nodes(
        lambda x: F.rrelu(F.dropout(x, 0.5, False), training=False) + F.dropout(x, 0.0) + torch.rand_like(x)
    )
    assert [name for name in by_target if is_random(by_target[name])] == ["rand_like.default"]


def test_draws_and_effects_keep_their_order():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.ReLU())
    graph = capture(model, (torch.zeros(2, 3, 8, 8),), {})[0].graph
    assert [str(node.target) for node in ordered_nodes(graph)] == [
        "aten.add_.Tensor",
        "aten.batch_norm.default",
        "aten.dropout.default",
    ]


def captures(function):
    sizes = [(2, 3, 12, 20), (3, 3, 45, 117), (3, 3, 111, 311)]
    traced = [Tracer().trace(Function(function), (torch.zeros(size),), {}).graph for size in sizes]
    return [to_aten(graph, graph.examples).graph for graph in traced]


def test_sizes_products_and_fractions_are_explained():
    graphs = captures(
        lambda x: F.interpolate(x.reshape(x.shape[0], -1, x.shape[2] * x.shape[3])[..., None], (7, 1))
    )
    constants = size_dependent_constants(graphs)
    assert [constant.values for constant in constants] == [(2, 3, 3), (240, 5265, 34521)]
    assert explain_sizes(graphs)
    graphs = captures(
        lambda x: x[..., : x.shape[3] * 2 // 4 * 2] if x.shape[3] % 2 else F.pad(x, (x.shape[2] * 2, 0))
    )
    assert size_dependent_constants(graphs) is None
    graphs = captures(lambda x: F.pad(x, (x.shape[2] * 2, 0)))
    assert explain_sizes(graphs)
    assert "floordiv" in [node.name for node in graphs[0].nodes]


def test_an_integer_without_explanation_leaves_the_graph_unchanged():
    graphs = captures(lambda x: x[..., : x.shape[3] - x.shape[2] ** 2 % 7])
    before = str(graphs[0])
    assert not explain_sizes(graphs)
    assert str(graphs[0]) == before


class Reversed(torch.autograd.Function):
    """Turns the gradient round."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def test_an_autograd_function_of_the_user_is_one_node_with_its_backward():
    captured, _ = capture(
        Function(lambda x: Reversed.apply(x * 2)), (torch.zeros(1, 1, 4, requires_grad=True),), {}
    )
    x = torch.ones(1, 1, 4, requires_grad=True)
    (result,) = captured.module(x)
    result.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, -2))
    assert [n.name for n in captured.graph.nodes if n.op == "call_function"] == [
        "mul",
        "autograd_function_1",
        "getitem",
    ]


def test_one_thread_traces_at_a_time(monkeypatch):
    inside, most, original = [], [], convert_frame.fullgraph_capture

    def watched(*args):
        inside.append(args)
        most.append(len(inside))
        result = original(*args)
        inside.pop()
        return result

    monkeypatch.setattr(convert_frame, "fullgraph_capture", watched)
    arguments = (Function(lambda x: x * 2), (torch.zeros(1, 1, 4),), {})
    threads = [threading.Thread(target=capture, args=arguments) for _ in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
