"""Functions in plain operators: the stock function's values and gradient, and stock's own where they do not apply."""

import pytest
import torch
import torch.nn.functional as F

from tiltscope.export.plain import plain_functions


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(outputs, inputs):
    """Of each output under one random cotangent."""
    cotangent = numbers(*outputs[0].shape, seed=3)
    return [torch.autograd.grad(y, inputs, cotangent) for y in outputs]


@pytest.mark.parametrize("factor", [2, 3, 2.0])
def test_upsampling(factor):
    x = numbers(2, 3, 4, 5).requires_grad_()
    expected = F.interpolate(x, scale_factor=factor, mode="nearest")
    with plain_functions():
        found = F.interpolate(x, scale_factor=factor, mode="nearest")
        module = torch.nn.Upsample(scale_factor=factor)(x)  # which passes everything by place
        smooth = F.interpolate(x, scale_factor=2, mode="bilinear")
    assert torch.equal(found, expected)
    assert torch.equal(module, expected)
    assert "Upsample" in type(expected.grad_fn).__name__
    assert "Upsample" not in type(found.grad_fn).__name__
    torch.testing.assert_close(smooth, F.interpolate(x, scale_factor=2, mode="bilinear"))
    torch.testing.assert_close(*gradients((found, expected), x))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(scale):
    """Of queries and keys in other numbers, values of another width."""
    q, k, v = (numbers(2, 3, *size, seed=at).requires_grad_() for at, size in enumerate(((5, 4), (7, 4), (7, 6))))
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    with plain_functions():
        found = F.scaled_dot_product_attention(q, k, v, scale=scale)
    assert "ScaledDotProduct" not in type(found.grad_fn).__name__
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients((found, expected), (q, k, v)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("more", [{"is_causal": True}, {"attn_mask": torch.ones(5, 5).tril().bool()}])
def test_attention_of_another_kind_is_stock(more):
    x = numbers(2, 3, 5, 4)
    expected = F.scaled_dot_product_attention(x, x, x, **more)
    with plain_functions():
        found = F.scaled_dot_product_attention(x, x, x, **more)
        half = F.scaled_dot_product_attention(*[x.half()] * 3)
        broadcast = F.scaled_dot_product_attention(x, x[:1], x[:1])
    assert torch.equal(found, expected)
    assert torch.equal(broadcast, F.scaled_dot_product_attention(x, x[:1], x[:1]))
    assert torch.equal(half, F.scaled_dot_product_attention(*[x.half()] * 3))


def test_they_are_put_back_after_an_error():
    stock = F.interpolate, F.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), plain_functions():
        _ = 1 / 0
    assert (F.interpolate, F.scaled_dot_product_attention) == stock
