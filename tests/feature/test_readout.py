"""The readout against its definition written as loops, its laws, and its independence of batch mates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.feature.readout import LSE_TEMPERATURE, Readout, pool_latents, read, token_map

INF = math.inf


def random_readout(seed, *, batch=2, rows=3, width=7, tokens=11, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    threshold = torch.rand(batch, rows, generator=g, dtype=dtype)
    threshold[:, -1] = -INF
    mask = torch.rand(batch, rows, tokens, generator=g) < 0.6
    mask[..., 0] = True
    return Readout(
        direction=torch.randn(batch, rows, width, generator=g, dtype=dtype),
        bias=torch.randn(batch, rows, generator=g, dtype=dtype),
        threshold=threshold,
        weight=torch.randn(batch, rows, generator=g, dtype=dtype),
        pooling=torch.rand(batch, rows, 3, generator=g, dtype=dtype),
        mask=mask,
    )


def random_tokens(seed, *, batch=2, tokens=11, width=7, dtype=torch.float64):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_pool(values, mixture):
    largest, mean = max(values), sum(values) / len(values)
    t = LSE_TEMPERATURE
    lse = t * math.log(sum(math.exp(v / t) for v in values) / len(values))
    return mixture[0] * largest + mixture[1] * mean + mixture[2] * lse


def slow_read(tokens, readout):
    """The module docstring of readout.py, one number at a time."""
    activation, drive, heat = [], [], []
    for b in range(tokens.shape[0]):
        total_a = total_d = 0.0
        where = [0.0] * tokens.shape[1]
        for k in range(readout.num_rows):
            pre = [
                sum(float(x) * float(w) for x, w in zip(token, readout.direction[b, k], strict=True))
                + float(readout.bias[b, k])
                for token in tokens[b]
            ]
            latent = [p if p > float(readout.threshold[b, k]) else 0.0 for p in pre]
            kept = [i for i in range(len(pre)) if readout.mask[b, k, i]]
            mixture, weight = readout.pooling[b, k].tolist(), float(readout.weight[b, k])
            total_a += weight * slow_pool([latent[i] for i in kept], mixture)
            total_d += weight * slow_pool([pre[i] for i in kept], mixture)
            where = [h + weight * v for h, v in zip(where, latent, strict=True)]
        activation.append(total_a)
        drive.append(total_d)
        heat.append(where)
    return tuple(torch.tensor(v, dtype=torch.float64) for v in (activation, drive, heat))


@pytest.mark.parametrize("seed", range(3))
def test_read_is_its_definition(seed):
    tokens, readout = random_tokens(seed), random_readout(seed + 10)
    activation, drive, heat = slow_read(tokens, readout)
    got_activation, got_drive = read(tokens, readout)
    # 1e-12: sums of some ten float64 numbers of order ten.
    torch.testing.assert_close(got_activation, activation, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_drive, drive, rtol=0, atol=1e-12)
    torch.testing.assert_close(token_map(tokens, readout), heat, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    readout = random_readout(1)
    tokens = random_tokens(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: read(t, readout), tokens)


def silent(rows=1, tokens=5, width=4, pooling=(0.7, 0.3, 0.0)):
    """A latent that no token of this size can reach."""
    return Readout(
        direction=torch.ones(1, rows, width),
        bias=torch.zeros(1, rows),
        threshold=torch.full((1, rows), 1e3),
        weight=torch.ones(1, rows),
        pooling=torch.tensor(pooling).expand(1, rows, 3),
        mask=torch.ones(1, rows, tokens, dtype=torch.bool),
    )


def test_drive_has_a_gradient_where_activation_is_flat_zero():
    tokens = random_tokens(0, tokens=5, width=4, dtype=torch.float32).requires_grad_()
    activation, drive = read(tokens, silent())
    assert torch.equal(activation, torch.zeros(2))
    assert not torch.autograd.grad(activation.sum(), tokens, retain_graph=True)[0].any()
    gradient = torch.autograd.grad(drive.sum(), tokens)[0]
    assert gradient.flatten(1).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("pooling", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_a_silent_feature_reads_zero_under_every_pooling(pooling):
    assert torch.equal(read(random_tokens(0, tokens=5, width=4).float(), silent(pooling=pooling))[0], torch.zeros(2))


@given(st.integers(0, 2**31), st.floats(-3, 3, allow_nan=False))
def test_readouts_form_a_vector_space(seed, factor):
    tokens = random_tokens(seed)
    one, other = random_readout(seed), random_readout(seed + 1)
    together = read(tokens, Readout.concat([one.scale(factor), other]))
    for i in range(2):
        apart = factor * read(tokens, one)[i] + read(tokens, other)[i]
        torch.testing.assert_close(together[i], apart, rtol=1e-12, atol=1e-12)


def test_lse_lies_between_mean_and_max():
    tokens = random_tokens(3)
    base = random_readout(4, rows=1)

    def pooled(*mixture):
        weights = torch.tensor(mixture, dtype=torch.float64).expand(2, 1, 3)
        return pool_latents(tokens, Readout(base.direction, base.bias, base.threshold, base.weight, weights, base.mask))

    largest, mean, lse = pooled(1.0, 0.0, 0.0), pooled(0.0, 1.0, 0.0), pooled(0.0, 0.0, 1.0)
    assert (mean < lse).all()
    assert (lse < largest).all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_masked_tokens_reach_neither_value_nor_gradient(size):
    readout = random_readout(5, dtype=torch.float32)
    tokens = random_tokens(6, dtype=torch.float32)
    readout = Readout(
        *(getattr(readout, n) for n in ("direction", "bias", "threshold", "weight", "pooling")), readout.mask
    )
    hidden = ~readout.mask.any(dim=1)  # [b, tokens] pooled by no row
    hidden[:, 3] = True
    mask = readout.mask & ~hidden[:, None]
    readout = Readout(readout.direction, readout.bias, readout.threshold, readout.weight, readout.pooling, mask)
    loud = torch.where(hidden[..., None], torch.full_like(tokens, size), tokens).requires_grad_()
    quiet = tokens.detach().requires_grad_()
    for i in range(2):
        assert torch.equal(read(loud, readout)[i], read(quiet, readout)[i])
    gradient = torch.autograd.grad(read(loud, readout)[1].sum(), loud)[0]
    assert gradient.isfinite().all()
    assert not gradient[hidden].any()


@pytest.mark.parametrize("pooling", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_a_very_negative_pre_activation_is_still_the_largest_of_its_mask(pooling):
    readout = silent(pooling=pooling)
    readout.mask[..., 2:] = False
    tokens = torch.full((1, 5, 4), -1e8, requires_grad=True)
    drive = read(tokens, readout)[1]
    assert drive.item() == pytest.approx(-4e8)
    gradient = torch.autograd.grad(drive.sum(), tokens)[0][0]
    assert gradient[:2].any()
    assert not gradient[2:].any()


def test_a_large_pre_activation_does_not_overflow_lse():
    readout = silent(pooling=(0.0, 0.0, 1.0))
    tokens = torch.full((1, 5, 4), 1e6, requires_grad=True)
    drive = read(tokens, readout)[1]
    assert drive.item() == pytest.approx(4e6)
    assert torch.autograd.grad(drive.sum(), tokens)[0].isfinite().all()


def test_padding_adds_nothing_and_stacking_keeps_each_feature():
    tokens = random_tokens(7, batch=3)
    short, long = random_readout(8, batch=1, rows=2), random_readout(9, batch=2, rows=5)
    stacked = Readout.stack([short, long])
    assert stacked.num_rows == 5
    for i in range(2):
        torch.testing.assert_close(read(tokens, stacked)[i][:1], read(tokens[:1], short)[i], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(read(tokens, stacked)[i][1:], read(tokens[1:], long)[i], rtol=1e-14, atol=1e-14)
    gradient = torch.autograd.grad(read(tokens.requires_grad_(), stacked)[1].sum(), tokens)[0]
    assert gradient.isfinite().all()


def test_one_feature_serves_a_batch_and_a_wrong_batch_is_refused():
    tokens, one = random_tokens(1, batch=4), random_readout(2, batch=1)
    assert torch.equal(read(tokens, one)[0], read(tokens, one.expand(4))[0])
    with pytest.raises(ValueError, match="batch 2"):
        random_readout(2, batch=2).expand(3)


def test_half_precision_tokens_are_widened():
    tokens, readout = random_tokens(1).half(), random_readout(2).to(torch.float32)
    activation, drive = read(tokens, readout)
    assert activation.dtype == drive.dtype == torch.float32
    assert torch.equal(activation, read(tokens.float(), readout)[0])


def value_and_gradient(tokens, readout):
    tokens = tokens.detach().requires_grad_()
    activation, drive = read(tokens, readout)
    return activation.detach(), drive.detach(), torch.autograd.grad(drive.sum(), tokens)[0]


def take(readout, rows):
    return Readout(
        *(getattr(readout, n)[rows] for n in ("direction", "bias", "threshold", "weight", "pooling", "mask"))
    )


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("batch", [2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_mates_change_no_bit(rows, batch, dtype):
    """Kernels pick their blocking by shape, so a fixed batch shape is what is promised; measured at the bundle's sizes."""
    tokens = random_tokens(0, batch=batch, tokens=69, width=192, dtype=dtype)
    readout = random_readout(1, batch=batch, rows=rows, tokens=69, width=192, dtype=dtype)
    base = value_and_gradient(tokens, readout)
    order = torch.arange(batch).roll(1)
    permuted = value_and_gradient(tokens[order], take(readout, order))
    other_tokens = random_tokens(3, batch=batch, tokens=69, width=192, dtype=dtype) * 100
    other = random_readout(4, batch=batch, rows=rows, tokens=69, width=192, dtype=dtype)
    other_tokens[1] = tokens[1]
    mixed = Readout(*(torch.where(_is(1, a), a, b) for a, b in zip(_fields(readout), _fields(other), strict=True)))
    company = value_and_gradient(other_tokens, mixed)
    for before, after, among in zip(base, permuted, company, strict=True):
        assert torch.equal(after, before[order])
        assert torch.equal(among[1], before[1])


def _fields(readout):
    return [getattr(readout, n) for n in ("direction", "bias", "threshold", "weight", "pooling", "mask")]


def _is(index, tensor):
    return (torch.arange(tensor.shape[0]) == index).view(-1, *(1,) * (tensor.ndim - 1))


def test_reading_does_not_write_into_its_arguments():
    tokens, readout = random_tokens(1), random_readout(2)
    before = [tokens.clone(), *(t.clone() for t in _fields(readout))]
    read(tokens, readout)
    token_map(tokens, readout)
    for was, now in zip(before, [tokens, *_fields(readout)], strict=True):
        assert torch.equal(was, now)
