"""Resizing by two matrices is torch's antialiased bilinear, and nobody's picture depends on its batch mates."""

import pytest
import torch
import torch.nn.functional as F

from tiltscope.kernels.reference_preprocess import resize, resize_matrix


def pixels(num=3, size=(24, 20), dtype=torch.float64):
    return torch.randn(num, 3, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def resized(x, size):
    h, w = x.shape[2:]
    return resize(x, resize_matrix(h, size[0], x.dtype), resize_matrix(w, size[1], x.dtype))


@pytest.mark.parametrize("size", [(8, 10), (24, 7), (37, 50), (23, 21), (1, 3)], ids=str)
def test_it_is_torchs_antialiased_bilinear_with_its_gradient(size):
    x = pixels().requires_grad_()
    expected = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    found = resized(x, size)
    # 1e-6: torch computes the filter's weights in float32 whatever the picture is.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    cotangent = torch.cos(expected.detach())
    torch.testing.assert_close(*(torch.autograd.grad(y, x, cotangent)[0] for y in (found, expected)), rtol=0, atol=1e-6)


def test_one_size_is_the_identity_and_a_constant_stays():
    assert torch.equal(resize_matrix(9, 9), torch.eye(9))
    for outputs in (4, 9, 30):
        torch.testing.assert_close(resize_matrix(9, outputs).sum(1), torch.ones(outputs))


def test_batch_mates_change_no_bit():
    x = pixels(5, dtype=torch.float32)
    assert torch.equal(resized(x, (10, 9))[1:], resized(torch.cat([3 * x[:1], x[1:]]), (10, 9))[1:])
