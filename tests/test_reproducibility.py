"""(bundle, config, seed, index) addresses one picture: bitwise in any company inside one batch shape."""

import pytest
import torch

import tiltscope
from tiltscope.engine.sampler.solvers import SOLVERS
from tiltscope.engine.tilt.worlds import GaussianWorld

# RMS over a picture, across batch shapes (design: reproducibility). Kernels pick their blocking by shape, so the last bits
# differ; guidance amplifies them by sigma^2/alpha at the first rows.
ACROSS_BUCKETS = {"unguided": 1e-5, "guided": 1e-3}
FEATURE, OTHER = "blocks.1:sae:3", "blocks.1:sae:7@max"
SETTINGS = {"steps": 6, "solver": "ddpm"}


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(str(tiny_bundle))


def draw(bundle, feature=FEATURE, **settings):
    return tiltscope.sample(bundle.prior, bundle.feature(feature), **(SETTINGS | {"lam": 3.0} | settings))


def rms(a, b):
    return float((a - b).square().mean().sqrt())


@pytest.fixture(scope="module")
def eight(bundle):
    return draw(bundle, num=8)


def test_the_same_request_gives_the_same_bits(bundle, eight):
    assert torch.equal(draw(bundle, num=8).x0, eight.x0)


def test_permuted_indices_give_the_same_pictures_bitwise(bundle, eight):
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    assert torch.equal(draw(bundle, num=8, indices=order).x0, eight.x0[order])


def test_other_batch_mates_change_no_bit(bundle, eight):
    company = draw(
        bundle, num=8, indices=[2, 90, 91, 5, 92, 93, 94, 95], lam=[3.0, 0.0, -9.0, 3.0, 50.0, 0.0, 1.0, 7.0]
    )
    assert torch.equal(company.x0[[0, 3]], eight.x0[[2, 5]])


def test_the_first_four_of_eight(bundle, eight):
    assert torch.equal(draw(bundle, num=4, batch_size=8).x0, eight.x0[:4])
    assert rms(draw(bundle, num=4).x0, eight.x0[:4]) < ACROSS_BUCKETS["guided"]


def test_one_index_alone_is_the_fifth_picture(bundle, eight):
    assert torch.equal(draw(bundle, num=1, indices=[4], batch_size=8).x0[0], eight.x0[4])
    assert rms(draw(bundle, num=1, indices=[4]).x0[0], eight.x0[4]) < ACROSS_BUCKETS["guided"]


def test_unguided_pictures_agree_across_buckets(bundle):
    one, eight = draw(bundle, num=1, lam=0.0), draw(bundle, num=8, lam=0.0)
    assert rms(one.x0[0], eight.x0[0]) < ACROSS_BUCKETS["unguided"]


def test_float64_agrees_across_buckets(bundle):
    one, eight = (draw(bundle, num=num, dtype="float64", steps=3) for num in (1, 8))
    assert rms(one.x0[0], eight.x0[0]) < 1e-6  # x0 is returned as float32


def test_seed_and_index_are_two_addresses():
    """(0, 1) and (1, 0) are unrelated pictures, told in a world whose pictures are noise."""
    world = GaussianWorld(s=1.0, shape=(3, 64, 64))

    def picture(seed, index):
        settings = {"num": 1, "steps": 3, "lam": 0.0, "seed": seed, "indices": [index]}
        return tiltscope.sample(world.prior, world.feature, **settings).x0.flatten()

    pair = torch.stack([picture(0, 1), picture(1, 0)])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / pair.shape[1] ** 0.5


@pytest.mark.parametrize("solver", [*sorted(set(SOLVERS) - {"renoise", "ddpm_learned_range"}), "ddim(eta=0.5)"])
def test_lam_zero_is_the_unguided_prior_whatever_the_feature(bundle, solver):
    one, other = (draw(bundle, feature, num=2, lam=0.0, solver=solver) for feature in (FEATURE, OTHER))
    assert torch.equal(one.x0, other.x0)
    assert one.n_vjp.tolist() == [0, 0]


def test_a_tilt_is_not_the_prior(bundle, eight):
    assert not torch.equal(eight.x0, draw(bundle, num=8, lam=0.0).x0)


def test_counts_of_forwards_and_gradients(bundle):
    heun = draw(bundle, num=2, solver="heun", grid="angle", steps=4, lam=[3.0, 0.0])
    assert heun.nfe.tolist() == [7, 7]
    assert heun.n_vjp.tolist() == [7, 0]
