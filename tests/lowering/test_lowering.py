"""Proxies write the operators that torch itself would call; copies of graphs and bound arguments."""

import operator

import pytest
import torch
from torch import fx

from fxstream.graph.nodes import bind, bind_to, call_with, copy_graph, name_of
from fxstream.lowering.proxy import Draft, Operator
from fxstream.rules import Value

aten = torch.ops.aten


@pytest.fixture
def op():
    """A softmax of a map [2, 3, 8, 9] that is lowered."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.softmax.int, (x, 1))
    node.meta["stack_trace"] = "line of the user"
    graph.output(node)
    value = Value("x", (2, 3, 8, 9), torch.bfloat16, (2, 3), True)
    with graph.inserting_before(node):
        yield Operator(node, Draft(graph, {x: value, node: value}, {}))


def written(op):
    """The targets of what was written in front of the operator, in order."""
    nodes = [node for node in op.draft.graph.nodes if node.op == "call_function"]
    assert nodes[-1] is op.node
    assert all(node.meta == {"stack_trace": "line of the user"} for node in nodes)
    return [node.target for node in nodes[:-1]]


@pytest.mark.parametrize(
    "code, targets",
    [
        (lambda x: (1 - x + 2) * x / x, [aten.rsub.Scalar, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor]),
        (lambda x: -x.mean(), [aten.mean.default, aten.neg.default]),
        (lambda x: x.mean([2, 3], True).select(0, 1), [aten.mean.dim, aten.select.int]),
        (lambda x: x.sum(dtype=torch.float32), [aten.sum.default]),
        (lambda x: x.masked_fill(x.eq(0), 1), [aten.eq.Scalar, aten.masked_fill.Scalar]),
        (lambda x: x.to(torch.bfloat16).to(torch.float32), [aten.to.dtype]),
        (lambda x: x.flatten(1, 2).softmax(1), [aten.flatten.using_ints, aten.softmax.int]),
        (lambda x: x.expand([x.size(0), -1]), [aten.sym_size.int, aten.expand.default]),
        (lambda x: x.size(2) * x.size(3) // 2, [aten.sym_size.int] * 2 + [operator.mul, operator.floordiv]),
        (lambda x: x.moments([2]), [torch.ops.fxstream.moments.default] + [aten.select.int] * 3),
    ],
)
def test_proxies_write_what_torch_would_call(op, code, targets):
    code(op.self)
    assert written(op) == targets


def test_an_operator_knows_its_arguments_and_result(op):
    assert (op.self.shape, op.self.dims, op.self.dtype, op.dim) == ((2, 3, 8, 9), (2, 3), torch.bfloat16, 1)
    assert op.wide == torch.float32
    op.narrow(op.again(dim=2, dtype=op.wide))
    again = op.node.prev.prev
    assert (again.target, again.args[1:]) == (op.node.target, (2, torch.float32))
    assert op.node.prev.args == (again, torch.bfloat16)


def test_what_does_not_exist_is_refused(op):
    with pytest.raises(AttributeError, match="no method 'rsqroot'"):
        op.self.rsqroot()
    with pytest.raises(AttributeError, match="no argument 'weight'"):
        op.weight  # noqa: B018
    with pytest.raises(RuntimeError, match="select"):
        op.self.select("channels")


def test_bound_arguments_give_the_same_call():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.var.correction, (x, [1]), {"keepdim": True})
    assert bind(node) == {"self": x, "dim": [1], "correction": None, "keepdim": True}
    again = call_with(graph, node.target, bind(node))
    assert (again.args, again.kwargs) == ((x, [1]), {"correction": None, "keepdim": True})
    assert (name_of(node), name_of(x), bind(x)) == ("var", "", {})
    assert bind_to(aten.relu.default, (), {"self": 3}) == {"self": 3}


def test_copies_keep_names():
    graph = fx.Graph()
    x = graph.placeholder("input")
    x.name = "input"
    graph.output(graph.call_function(aten.relu.default, (x,)))
    copy, nodes = copy_graph(graph)
    assert [node.name for node in copy.nodes] == ["input", "relu_default", "output"]
    assert nodes[x].name == "input"
    assert nodes[x] is not x
