"""Our decompositions alone, against autograd in float64: every stride, padding, dilation and grouping a trunk or a prior uses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltscope.export.decompositions import (
    convolution_input_gradient,
    group_norm_gradient,
    layer_norm,
    layer_norm_gradient,
    slice_gradient,
    softmax_gradient,
    table,
)
from tiltscope.export.simplify import simplify

aten = torch.ops.aten


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_grad(function, cotangent):
    """x -> f(x) and the gradient of <f(x), cotangent(x, f(x))>, the cotangent held fixed."""

    def both(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = function(x)
            (grad,) = torch.autograd.grad(y, x, cotangent(x.detach(), y.detach()))
        return y.detach(), grad

    return both


GAIN, OFFSET = numbers(5, seed=5), numbers(5, seed=6)


def gradients(x, weight, stride, padding, dilation, groups):
    """(autograd's, ours) input gradient of one convolution under a random cotangent."""
    x = x.requires_grad_()
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    grad = numbers(*y.shape, seed=2)
    (expected,) = torch.autograd.grad(y, x, grad)
    ours, _, _ = convolution_input_gradient(
        grad, x.detach(), weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
    )
    return expected, ours


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "padding", "dilation", "groups", "size"),
    [
        (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 9)),  # a U-Net's
        (4, 6, (3, 3), (2, 2), (1, 1), (1, 1), 1, (8, 8)),  # its downsampling
        (4, 6, (3, 3), (2, 2), (0, 0), (1, 1), 1, (9, 7)),
        (4, 6, (3, 3), (2, 2), (1, 1), (1, 1), 1, (9, 10)),  # a stride that does not divide
        (3, 8, (4, 4), (4, 4), (0, 0), (1, 1), 1, (12, 16)),  # a patch embedding
        (3, 8, (4, 4), (4, 4), (0, 0), (1, 1), 1, (14, 17)),  # one with pixels left over
        (6, 6, (7, 7), (1, 1), (3, 3), (1, 1), 6, (10, 10)),  # ConvNeXt's depthwise
        (8, 12, (3, 3), (1, 1), (1, 1), (1, 1), 4, (6, 6)),  # grouped
        (8, 12, (2, 2), (2, 2), (0, 0), (1, 1), 4, (6, 6)),  # grouped patches
        (4, 5, (3, 3), (1, 1), (2, 2), (2, 2), 1, (9, 9)),  # dilated
        (4, 5, (1, 1), (1, 1), (0, 0), (1, 1), 1, (5, 5)),
        (4, 5, (7, 7), (1, 1), (3, 3), (1, 1), 1, (8, 8)),  # the published convolutional SAE
        (4, 6, (3, 1), (2, 1), (1, 0), (1, 1), 2, (7, 5)),
    ],
)
def test_a_convolutions_input_gradient(inputs, outputs, kernel, stride, padding, dilation, groups, size):
    x, weight = numbers(2, inputs, *size), numbers(outputs, inputs // groups, *kernel, seed=1)
    expected, ours = gradients(x, weight, list(stride), list(padding), list(dilation), groups)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 2), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=60)
def test_any_convolution(kernel, stride, padding, dilation, more_rows, more_columns):
    size = dilation * (kernel - 1) + 1
    x = numbers(1, 4, size + more_rows, size + more_columns)
    pads = [min(padding, dilation * (kernel - 1))] * 2
    expected, ours = gradients(x, numbers(6, 2, kernel, kernel, seed=1), [stride] * 2, pads, [dilation] * 2, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_group_norms_parameters_have_no_gradient_here():
    x, each = numbers(2, 4, 3), numbers(2, 2)
    with pytest.raises(NotImplementedError, match="parameters"):
        group_norm_gradient(x, x, each, each, None, 2, 4, 3, 2, [True, True, False])
    assert group_norm_gradient(x, x, each, each, None, 2, 4, 3, 2, [False] * 3) == (None, None, None)


def test_a_layer_norms_parameters_have_no_gradient_here():
    x, each, gain = numbers(2, 4, 5), numbers(2, 4, 1), numbers(5)
    with pytest.raises(NotImplementedError, match="parameters"):
        layer_norm_gradient(x, x, [5], each, each, gain, gain, [True, True, False])
    assert layer_norm_gradient(x, x, [5], each, each, gain, gain, [False] * 3) == (None, None, None)


def test_a_slice_with_steps_has_no_gradient_here():
    with pytest.raises(NotImplementedError, match="step 2"):
        slice_gradient(numbers(2, 2), [2, 4], 1, 0, 4, 2)


def test_what_has_no_gradient_here_says_so():
    x, weight = numbers(1, 2, 4, 4), numbers(2, 2, 3, 3)
    rest = ([1, 1], [1, 1], [1, 1])
    with pytest.raises(NotImplementedError, match="transposed"):
        convolution_input_gradient(x, x, weight, None, *rest, True, [0, 0], 1, [True, False, False])
    with pytest.raises(NotImplementedError, match="parameters"):
        convolution_input_gradient(x, x, weight, None, *rest, False, [0, 0], 1, [True, True, False])
    assert convolution_input_gradient(x, x, weight, None, *rest, False, [0, 0], 1, [False] * 3) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "function", "shape"),
    [
        ("group norm", lambda x: F.group_norm(x, 2, GAIN[:4], OFFSET[:4]), (2, 4, 3, 3)),
        ("group norm without weights", lambda x: F.group_norm(x, 2), (2, 4, 3, 3)),
        ("group norm of tokens", lambda x: F.group_norm(x, 2, GAIN[:4], OFFSET[:4], 1e-2), (2, 4, 5)),
        ("layer norm", lambda x: F.layer_norm(x, (5,), GAIN, OFFSET), (2, 3, 5)),
        ("layer norm over two dimensions", lambda x: F.layer_norm(x, (3, 5)), (2, 3, 5)),
        ("softmax", lambda x: torch.softmax(x, -1), (2, 3, 5)),
        ("gelu", F.gelu, (2, 7)),
        ("tanh gelu", lambda x: F.gelu(x, approximate="tanh"), (2, 7)),
        ("silu", F.silu, (2, 7)),
        ("max over tokens", lambda x: x.amax(-1), (2, 3, 6)),
        ("average pool", lambda x: F.avg_pool2d(x, 2), (2, 3, 6, 6)),
        ("overlapping average pool", lambda x: F.avg_pool2d(x, 3, 2, 1), (2, 3, 7, 6)),
        ("slices", lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1), (2, 6)),
        ("slices from both ends", lambda x: x[:, 1:-1, -4:] * x[:, 2:, :4], (2, 5, 6)),
        ("selected places", lambda x: x[:, 1] * x[:, -1] + x.select(-1, 0).sum(), (2, 3, 3)),
        ("a shifted sum", lambda x: sum(F.pad(x, [1, 1])[..., at : at + 5] * at for at in range(3)), (2, 3, 5)),
        ("jump relu", lambda x: torch.where(x > 0.3, x, torch.zeros_like(x)), (2, 9)),
        ("roll", lambda x: x.roll(2, -1) * x.roll(-1, 0), (3, 5)),
        ("roll of all as one", lambda x: x.roll(4), (3, 5)),
        ("roll along two dimensions", lambda x: x.roll((1, 2), (0, 1)), (3, 5)),
        ("rms norm", lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6), (2, 9)),
    ],
)
@pytest.mark.parametrize("coarse", [False, True])
def test_the_table_leaves_no_backward_operator_and_the_gradient_is_autograds(name, function, shape, coarse):
    """Each operation of the networks alone, traced as the step is."""
    both = value_and_grad(function, lambda x, y: y.cos())
    x = numbers(*shape)
    traced = make_fx(both, decomposition_table=table(coarse=coarse), tracing_mode="real")(x)
    left = [str(node.target) for node in traced.graph.nodes]
    assert not [name for name in left if "backward" in name or "scatter" in name or "strided" in name]
    other = numbers(*shape, seed=9)
    for found, expected in zip(traced(other), both(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [-1, 1])
def test_the_gradient_of_a_softmax_along_any_dimension(dim):
    x, grad = numbers(2, 5, 7).requires_grad_(), numbers(2, 5, 7, seed=1)
    y = torch.softmax(x, dim)
    (expected,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(softmax_gradient(grad, y.detach(), dim, y.dtype), expected, rtol=1e-12, atol=1e-12)


def test_a_layer_norm_of_half_precision_is_computed_in_float32():
    x, gain, offset = (numbers(*shape, seed=seed).half() for shape, seed in (((3, 64), 1), ((64,), 2), ((64,), 3)))
    x = 100 * x
    out, mean, rstd = layer_norm(x, [64], gain, offset, 1e-5)
    expected = F.layer_norm(x.float(), [64], gain.float(), offset.float(), 1e-5)
    assert (out.dtype, mean.dtype, rstd.dtype) == (torch.float16, torch.float32, torch.float32)
    torch.testing.assert_close(out, expected.half(), rtol=0, atol=0)
    found = operators_of(lambda x: F.layer_norm(x, [64]), x)
    assert found.index("aten._to_copy.default") < found.index("aten.native_layer_norm.default")


def operators_of(function, *example):
    """What a coarse trace leaves of it, by name."""
    traced = make_fx(function, decomposition_table=table(coarse=True))(*example)
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]


def test_a_trace_keeps_what_engines_have_a_kernel_for():
    """Each of these in parts is a copy of the whole tensor for every part."""
    x = torch.zeros(2, 8, 4, 4)
    assert operators_of(lambda x: F.layer_norm(x, [4]), x).count("aten.native_layer_norm.default") == 1
    assert operators_of(lambda x: F.group_norm(x, 2), x).count("aten.native_layer_norm.default") == 1
    assert "aten.add.Tensor" not in operators_of(lambda x: F.group_norm(x, 2), x)
    with sdpa_kernel(SDPBackend.MATH):
        attention = operators_of(lambda x: F.scaled_dot_product_attention(x, x, x), x)
    assert "aten._softmax.default" in attention
    assert not [name for name in attention if "where" in name or "logical" in name]


def test_no_sum_over_a_row_is_left_to_an_engine_in_the_gradient_of_a_softmax():
    both = value_and_grad(lambda x: torch.softmax(x, -1), lambda x, y: x)
    found = operators_of(both, torch.zeros(2, 3, 5))
    assert [name for name in found if "_softmax" in name] == ["aten._softmax.default"]
    assert not [name for name in found if "sum.dim" in name]


@pytest.mark.parametrize("function", [F.silu, F.gelu])
@pytest.mark.parametrize("coarse", [False, True])
def test_half_precision_is_computed_in_float32(function, coarse):
    """Rounded once, as stock does: within half of bfloat16's last place."""
    both = value_and_grad(function, lambda x, y: torch.ones_like(x))
    x = torch.linspace(-8, 8, 4001).bfloat16()
    traced = make_fx(both, decomposition_table=table(coarse=coarse))(x)
    for found, exact in zip(traced(x), both(x.double()), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_coarse_graph_computes_nothing_twice_for_a_gradient():
    """Once an engine has made equal operators one, which every one does: these are what is left to run."""

    def gradient_of(function):
        both = value_and_grad(function, lambda x, y: x)
        traced = make_fx(both, decomposition_table=table(coarse=True))(torch.zeros(2, 5))
        simplify(traced)
        shared = CSEPass()(traced).graph_module
        return sorted(str(node.target).split(".")[1] for node in shared.graph.nodes if node.op == "call_function")

    assert gradient_of(F.silu) == ["add", "mul", "mul", "mul", "sigmoid", "sub"]
    assert "gelu" not in gradient_of(F.gelu)
    assert gradient_of(F.gelu).count("erf") == gradient_of(F.gelu).count("exp") == 1
    assert len(gradient_of(F.gelu)) == 11


def operators_of_a_convolutions_gradient(kernel, padding, size):
    weight, x, grad = torch.zeros(5, 4, kernel, kernel), torch.zeros(2, 4, size, size), torch.zeros(2, 5, size, size)
    fixed = (x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False])
    return operators_of(lambda grad: convolution_input_gradient(grad, *fixed)[0], grad)


def test_a_convolutions_gradient_leaves_the_border_to_the_convolution():
    """A tensor with a border is a copy."""
    assert not [name for name in operators_of_a_convolutions_gradient(3, 1, 6) if "pad" in name]


def test_a_convolution_of_one_pixel_is_a_convolution_backwards_too():
    """As a product it takes two copies with the channels last and back."""
    found = operators_of_a_convolutions_gradient(1, 0, 3)
    assert [name for name in found if "conv" in name] == ["aten.convolution.default"]
    assert not [name for name in found if "mm" in name or "pad" in name or "clone" in name]
