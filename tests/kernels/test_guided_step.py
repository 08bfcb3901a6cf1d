"""The torch definition of a guided step against the design's formula written out in numpy, one slot at a time."""

import numpy as np
import pytest
import torch
from kernel_cases import guided_case

from tiltscope.engine.sampler import noise
from tiltscope.engine.sampler.row import COLUMNS
from tiltscope.kernels import reference
from tiltscope.kernels.reference import guided_update

SEEDS = [0, 2**40 + 7, 3]


def example(shape, dtype):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((len(SEEDS), *shape)) for _ in range(4)]
    coefficients = rng.uniform(-1.5, 1.5, (len(SEEDS), len(COLUMNS)))
    strength = np.array([2.0, -0.7, 0.0])
    tensors = [torch.from_numpy(each).to(dtype) for each in (*arrays, coefficients, strength)]
    keys = torch.tensor([noise.seed_key(seed) for seed in SEEDS])
    index, row, particle = torch.tensor([0, 5, 9]), torch.tensor([0, 3, 77]), torch.tensor([0, 2, 0])
    return (*arrays, coefficients, strength), tensors, (keys, index, row, particle)


def by_hand(arrays, slot, guided, row, index, particle, shape):
    x, x0_hat, grad_a, history, coefficients, strength = (each[slot] for each in arrays)
    k = dict(zip(COLUMNS, coefficients, strict=True))
    z = noise.normal(SEEDS[slot], index, row, noise.STREAM_STEP, particle=particle, shape=shape)
    push = strength * grad_a if guided else np.zeros(shape)
    delta = k["e"] * push
    moved = k["a"] * x + k["b"] * x0_hat + delta + k["c"] * z + k["d"] * history
    remembered = k["p"] * x + k["q"] * x0_hat + k["f"] * push + k["r"] * history
    return moved, remembered, (grad_a**2).sum(), (delta**2).sum(), (z * delta).sum()


def test_the_columns_are_the_plans():
    at = {name: getattr(reference, name.upper()) for name in COLUMNS}
    assert at == {name: place for place, name in enumerate(COLUMNS)}


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 5, 7), (2, 8, 8)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_a_step_is_the_formula(shape, dtype, rtol):
    arrays, tensors, (keys, index, row, particle) = example(shape, dtype)
    guided = torch.tensor([True, True, False])
    got = guided_update(*tensors, guided, keys, index, row, particle)
    for slot in range(len(SEEDS)):
        place = int(row[slot]), int(index[slot]), int(particle[slot])
        expected = by_hand(arrays, slot, bool(guided[slot]), *place, shape)
        for mine, theirs in zip(got[:5], expected, strict=True):
            scale = max(1.0, float(np.abs(theirs).max()))
            np.testing.assert_allclose(mine[slot].double().numpy(), theirs, atol=rtol * 10 * scale, rtol=0)


def test_an_unguided_slot_ignores_a_gradient_that_is_not_finite():
    _, tensors, addresses = example((4,), torch.float32)
    tensors[2][2] = torch.nan
    got = guided_update(*tensors, torch.tensor([True, True, False]), *addresses)
    assert got.finite.tolist() == [True, True, True]
    assert float(got.delta_norm_sq[2]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_a_gradient_every_slot_is_an_unguided_one_bit_for_bit(dtype):
    case = guided_case(9, (3, 5, 7)).to(dtype)
    case = case._replace(drive=torch.full_like(case.drive, torch.nan))
    bare = reference.guided_step(case._replace(grad_a=None))
    unguided = reference.guided_step(case._replace(guided=torch.zeros_like(case.guided)))
    for name in ("x", "history", "row", "ok", "delta_norm_sq", "z_dot_delta"):
        assert torch.equal(getattr(bare, name), getattr(unguided, name)), name
    assert bare.grad_norm_sq.tolist() == [0.0] * 9
    assert bare.ok.tolist() == case.ok.tolist()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_a_non_finite_input_is_seen_in_its_own_slot_only(bad, argument):
    _, tensors, addresses = example((4,), torch.float32)
    tensors[argument][1, 2] = bad
    got = guided_update(*tensors, torch.ones(3, dtype=torch.bool), *addresses)
    assert got.finite.tolist() == [True, False, True]


def test_no_argument_is_written_to():
    _, tensors, addresses = example((4,), torch.float32)
    before = [each.clone() for each in (*tensors, *addresses)]
    guided_update(*tensors, torch.ones(3, dtype=torch.bool), *addresses)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, *addresses), strict=True))
