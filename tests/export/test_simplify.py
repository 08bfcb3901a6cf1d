"""What simplify() removes, and that nothing else changes: every value bit for bit."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tiltscope.export.decompositions import table
from tiltscope.export.simplify import simplify


def names(traced):
    return [str(node.target).split(".")[1] for node in traced.graph.nodes if node.op == "call_function"]


def before_and_after(function, *example, sizes="fake"):
    """(operators before, operators after) of a trace whose values are seen to be the same. sizes: "symbolic" or those of X."""
    traced = make_fx(function, tracing_mode=sizes, decomposition_table=table())(*example)
    expected, before = traced(*example), names(traced)
    simplify(traced)
    found = traced(*example)
    assert torch.equal(found, expected)
    assert all("val" in node.meta for node in traced.graph.nodes if node.op == "call_function")
    return before, names(traced)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: x.expand(x.shape[0], 3, 8) * 2, ["mul"]),
        (lambda x: x.narrow(1, 0, 1).expand(-1, 3, -1) * 2, ["slice", "expand", "mul"]),
        (lambda x: x.reshape(-1, 4, 6).reshape(-1, 24).reshape(-1, 2, 12) * 2, ["reshape", "mul"]),
        (lambda x: x.reshape(-1, 24).reshape(-1, 3, 8) * 2, ["mul"]),
        (lambda x: x.reshape(-1, 24).detach().reshape(-1, 3, 8) * 2, ["mul"]),
        (lambda x: x.permute(0, 2, 1).permute(0, 2, 1) * 2, ["mul"]),
        (lambda x: x.permute(1, 2, 0).permute(1, 0, 2) * 2, ["permute", "mul"]),
        (lambda x: x.permute(1, 2, 0).permute(2, 0, 1) * 2, ["mul"]),
        (lambda x: x.permute(1, -1, 0).permute(1, 2, 0) * 2, ["permute", "mul"]),
        (lambda x: x.permute(0, -1, -2).permute(0, 2, 1) * 2, ["mul"]),
        (lambda x: (x.transpose(1, 2) @ x).transpose(1, 2) * 2, ["permute", "bmm", "mul"]),
        (lambda x: (x @ x.transpose(1, 2)).transpose(1, 2) * 2, ["permute", "bmm", "mul"]),
    ],
)
def test_what_is_left(function, left):
    _, found = before_and_after(function, X)
    assert found == left


def test_a_view_of_what_a_turned_product_lies_like():
    """Laid out as the product was, this needs no copy; turned, it does."""
    _, after = before_and_after(lambda x: (x.transpose(1, 2) @ x).transpose(1, 2).mul(2).transpose(1, 2).view(2, 64), X)
    assert after == ["permute", "bmm", "mul", "permute", "reshape"]


def test_a_product_that_others_read_too_is_not_computed_twice():
    def function(x):
        product = x @ x.transpose(1, 2)
        return product.transpose(1, 2) + product

    before, after = before_and_after(function, X)
    assert before.count("bmm") == after.count("bmm") == 1


@pytest.mark.parametrize("writes", ["to what a product was made of", "to a view"])
def test_where_an_operator_writes_to_its_input_products_stay(writes):
    def function(x):
        first = x * 1
        product = first @ first.transpose(1, 2)
        if writes == "to a view":
            turned = product.transpose(1, 2).mul(2).transpose(1, 2)
            turned.view(2, 9).add_(1)
            return turned
        first.mul_(2)
        return product.transpose(1, 2) * 2

    before_and_after(function, X)


def test_beside_a_symbolic_batch_an_expansion_is_kept_where_there_is_one():
    for function, left in (
        (lambda x: x.expand(x.shape[0], -1, -1) * 2, 0),
        (lambda x: x.narrow(0, 0, 1).expand(x.shape[0], -1, -1) * 2, 1),
    ):
        before, after = before_and_after(function, X, sizes="symbolic")
        assert (before.count("expand"), after.count("expand")) == (1, left)
