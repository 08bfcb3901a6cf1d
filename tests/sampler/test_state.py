"""Slots and ticks: unlike plans share a batch, a failing sample stops alone, and each row costs what it must."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.errors import NonFiniteError
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.engine.sampler import tick as tick_module
from tiltscope.engine.sampler.plan import make_plan
from tiltscope.engine.sampler.state import Programme, admit
from tiltscope.engine.sampler.tick import tick
from tiltscope.engine.tilt.log_tilt import Capped, Linear
from tiltscope.engine.tilt.worlds import GaussianWorld

WORLD = GaussianWorld(s=1.3, shape=(3, 4, 4))


@dataclass(frozen=True)
class Counting:
    """A step that counts its calls."""

    inner: TorchStep
    calls: list[str]
    name: str = "counting"
    has_own_threads: bool = False

    def unguided(self, x, sigma, alpha):
        self.calls.append("unguided")
        return self.inner.unguided(x, sigma, alpha)

    def guided(self, x, sigma, alpha, readout):
        self.calls.append("guided")
        return self.inner.guided(x, sigma, alpha, readout)

    def measure(self, x0, readout):
        return self.inner.measure(x0, readout)

    def linearise(self, x, sigma):
        return self.inner.linearise(x, sigma)

    def gradient(self, x0, readout):
        return self.inner.gradient(x0, readout)


LINEAR = Linear()


def programme(*plans, log_tilts=(LINEAR,)):
    step = Counting(TorchStep(WORLD.prior, WORLD.feature), [])
    return Programme(plans=plans, log_tilts=log_tilts, step=step, shape=WORLD.shape, dtype=torch.float64)


def fresh(work, lam, seed=0):
    indices = np.arange(len(lam))
    return admit(work, seed=seed, indices=indices, lam=np.array(lam), readout=None, bucket=len(lam))


def run(work, state, rows):
    for _ in range(rows):
        state, _ = tick(state, work)
    return state


def test_unlike_plans_in_one_batch_equal_each_alone():
    plans = make_plan("ddpm", steps=7, grid="angle"), make_plan("heun", steps=5, grid="angle")
    alone = [run(programme(plan), fresh(programme(plan), [0.8, 0.8]), plan.num_rows) for plan in plans]
    both = programme(*plans)
    state = fresh(both, [0.8, 0.8])
    state = replace(state, plan=torch.tensor([0, 1]), host=replace(state.host, plan=(0, 1)))
    state = run(both, state, max(plan.num_rows for plan in plans))
    assert state.row.tolist() == [7, 9]
    torch.testing.assert_close(state.x[0], alone[0].x[0], rtol=0, atol=0)
    torch.testing.assert_close(state.x[1], alone[1].x[1], rtol=0, atol=0)


def test_unlike_log_tilts_in_one_batch_equal_each_alone():
    plan = make_plan("ddpm", steps=7, grid="angle")
    tilts = Linear(), Capped(0.1)
    both = programme(plan, log_tilts=tilts)
    state = run(both, replace(fresh(both, [2.0, 2.0]), log_tilt=torch.tensor([0, 1])), 7)
    for slot, tilt in enumerate(tilts):
        only = programme(plan, log_tilts=(tilt,))
        assert torch.equal(state.x[slot], run(only, fresh(only, [2.0, 2.0]), 7).x[slot])


def test_a_finished_slot_stays_as_it_is():
    work = programme(make_plan("ddpm", steps=4, grid="angle"))
    done = run(work, fresh(work, [1.0, 0.0]), 4)
    later = run(work, done, 3)
    assert torch.equal(done.x, later.x)
    assert later.row.tolist() == [4, 4]
    assert work.step.calls[8:] == []


def test_a_checkpoint_continues_bitwise():
    work = programme(make_plan("dpmpp_2m", steps=8, grid="angle"))
    straight = run(work, fresh(work, [1.0, -1.0]), 8)
    half = run(work, fresh(work, [1.0, -1.0]), 3)
    copied = replace(half, x=half.x.clone(), history=half.history.clone(), row=half.row.clone())
    assert torch.equal(run(work, copied, 5).x, straight.x)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [([1.0, 1.0], ["guided"]), ([0.0, 0.0], ["unguided"]), ([1.0, 0.0], ["unguided", "guided"])],
)
def test_a_row_runs_only_the_graphs_it_needs(lam, expected):
    work = programme(make_plan("ddpm", steps=4, grid="angle"))
    tick(fresh(work, lam), work)
    assert work.step.calls == expected


@pytest.mark.parametrize(
    ("lam", "bucket", "gradient"),
    [([0.0, 0.0], None, False), ([1.0, 0.0], None, True), ([0.0, 0.0], 1, False), ([1.0, 0.0], 1, True)],
)
def test_rows_without_a_guided_slot_have_no_gradient_and_buckets_without_one_none_that_pushes(
    lam, bucket, gradient, monkeypatch
):
    given = []
    real = tick_module.guided_step
    monkeypatch.setattr(tick_module, "guided_step", lambda i, **asked: given.append(i.grad_a) or real(i, **asked))
    work = replace(programme(make_plan("ddpm", steps=4, grid="angle")), bucket=bucket)
    state = run(work, fresh(work, lam), 4)
    assert [each is not None for each in given] == [gradient] * 4
    if gradient and bucket:
        assert not any(each[1].any() for each in given)
        assert all(each[0].any() for each in given)
    alone = [run(work, fresh(work, [each] * 2), 4) for each in lam]
    assert all(torch.equal(state.x[at], each.x[at]) for at, each in enumerate(alone))


def test_levels_are_the_rows_own_and_a_slot_that_has_done_its_plan_stays_at_its_last():
    plans = make_plan("ddpm", steps=7, grid="angle"), make_plan("heun", steps=2, grid="angle")
    for table, name in zip(programme(*plans).levels, ("sigma", "alpha"), strict=True):
        for own, plan in zip(table.tolist(), plans, strict=True):
            column = plan.column(name).tolist()
            assert own == column + [column[-1]] * (8 - plan.num_rows)


def test_a_tick_writes_into_no_tensor_of_the_state():
    work = programme(make_plan("dpmpp_2m", steps=4, grid="angle"))
    state = run(work, fresh(work, [1.0, 0.0]), 1)
    before = [value.clone() for value in vars(state).values() if isinstance(value, torch.Tensor)]
    tick(state, work)
    after = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_sample_that_becomes_non_finite_stops_alone_with_its_last_good_state():
    settings = {"num": 4, "steps": 12, "dtype": "float64"}
    good = tiltscope.sample(WORLD.prior, WORLD.feature, lam=0.5, **settings)
    calls = []

    def blow_up(x0):
        """NaN for the third slot from the seventh call on."""
        a = WORLD.feature.activation(x0)
        calls.append(len(x0))
        hit = (torch.arange(len(x0)) == 2) & (len(calls) >= 7)
        return a.masked_fill(hit, torch.nan)

    samples = tiltscope.sample(WORLD.prior, tiltscope.Feature(blow_up, name="blows up"), lam=0.5, **settings)
    assert samples.ok.tolist() == [True, True, False, True]
    keep = [0, 1, 3]
    torch.testing.assert_close(samples.x0[keep], good.x0[keep])
    assert torch.isfinite(samples.x0).all()
    (failure,) = samples.manifest["failures"]
    assert failure["index"] == 2
    assert 0 < failure["row"] < 12
    assert 0 < failure["sigma"] < 1


def test_all_samples_failing_is_an_error_that_names_row_and_sigma():
    calls = []

    def activation(x0):
        calls.append(1)
        return WORLD.feature.activation(x0) * (torch.nan if len(calls) > 4 else 1.0)

    with pytest.raises(NonFiniteError, match=r"index 0, at row \d+ \(sigma 0\.\d+\)"):
        tiltscope.sample(WORLD.prior, tiltscope.Feature(activation, name="nan"), num=3, lam=1.0, steps=10)


def test_on_step_sees_every_row_and_may_stop():
    seen = []

    def on_step(progress):
        seen.append((progress.row, progress.sigma, progress.preview.shape))
        return "stop" if progress.row == 5 else None

    samples = tiltscope.sample(WORLD.prior, WORLD.feature, num=2, lam=0.3, steps=9, on_step=on_step)
    assert [row for row, _, _ in seen] == list(range(6))
    assert all(earlier > later for (_, earlier, _), (_, later, _) in pairwise(seen))
    assert samples.ok.tolist() == [False, False]
    assert samples.nfe.tolist() == [6, 6]
