"""The real tick may be captured in a CUDA graph, for every solver, lift, readout and log-tilt; what may not be is refused.

Runs the tiny bundle's networks on the CPU under a recorder, and once on the meta device. That capture itself works is left to
tests/runtime/test_graphs.py on a GPU.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import RunnerError
from tiltscope.engine.prepare import prepare
from tiltscope.engine.prior.network import NetworkDenoiser
from tiltscope.engine.runtime.capture_safety import check_capture
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.engine.sampler.lifts import LIFTS
from tiltscope.engine.sampler.replay import StaticSlots, step_into
from tiltscope.engine.sampler.solvers import SOLVERS
from tiltscope.engine.sampler.state import Need, admit
from tiltscope.engine.tilt.log_tilt import LOG_TILTS
from tiltscope.kernels import reference

META = torch.device("meta")
NUM, STEPS = 2, 4
GUIDED, UNGUIDED, BOTH = Need(False, True, False), Need(True, False, False), Need(True, True, False)
FEATURE = "blocks.1:sae:3"
TILTS = {"zscored": "zscored(mean=0.1, sd=2.0)", "capped": "capped(cap=1.0)"} | {
    name: f"{name}(c=0.3)" for name in ("hinge", "target", "smooth_cap", "soft_hard")
}


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(str(tiny_bundle))


# In place of the networks where a test is about the rest of the tick: some sixty operators instead of a thousand.
PRIOR = tiltscope.Prior(lambda x, sigma: 0.3 * x + torch.tanh(x), shape=(3, 4, 4), name="small")
SMALL = tiltscope.Feature(lambda x0: (x0 * x0).flatten(1).mean(1), name="small")


def judged(prior, feature, needs, change=None, **settings):
    """The verdict on the real tick. change(slots, programme, written): what a test plants in the step, done after it."""
    run = prepare(
        prior, feature, SampleConfig(**({"num": NUM, "lam": 1.0, "steps": STEPS, "kernels": "reference"} | settings))
    )
    work, bucket = run.programme, NUM * run.config.particles
    work = replace(work, bucket=None)

    def fresh(turn):
        lam = np.full(NUM, (0.5, -3.0, 40.0)[turn])
        state = admit(
            work, seed=turn, indices=np.arange(turn, NUM + turn), lam=lam, readout=run.feature.readout, bucket=bucket
        )
        # Small, then large values: both sides of every threshold; other rows, one slot that failed, another that is done.
        ok, row = torch.ones(bucket, dtype=torch.bool), torch.full((bucket,), turn)
        ok[0], row[-1] = turn != 1, (1, 2, run.plan.num_rows)[turn]
        return replace(state, x=state.x * 10.0 ** (turn - 1), row=row, ok=ok)

    slots = StaticSlots.like(fresh(0))
    meta = StaticSlots.like(fresh(0)).to(META)
    prior, vision = run.prior.to(torch.float32, META), run.feature.to(torch.float32, META)
    there = replace(work, device=META, step=TorchStep(prior, vision))
    # Made once, as a warm-up makes them.
    _ = there.coefficients, there.num_rows, there.guided_rows, there.levels, there.log_variance

    def step(slots, programme):
        written = step_into(slots, programme, needs)
        return written if change is None else change(slots, programme, written)

    return check_capture(
        lambda: step(slots, work),
        slots.tensors(),
        lambda turn: slots.load(fresh(turn)),
        on_meta=lambda: step(meta, there),
    )


@pytest.mark.parametrize("lift", ["dps", "none", pytest.param("covariance", marks=pytest.mark.slow)])
def test_a_tick_of_the_real_networks_may_be_captured(bundle, lift):
    verdict = judged(bundle.prior, bundle.feature(FEATURE), [BOTH], lift=lift)
    assert verdict.problems == ()
    assert verdict.num_operators > 200  # both networks, forward and backward, are in what was looked at


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"renoise", "ddpm_learned_range"}))
def test_a_tick_of_every_solver_may_be_captured(solver):
    assert judged(PRIOR, SMALL, [GUIDED], solver=solver).problems == ()


class Both(torch.nn.Module):
    """A network of learned range: two outputs a channel."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, return_dict):
        return (torch.cat([torch.tanh(x), self.scale * x], 1),)


def test_a_tick_that_adds_a_learned_noise_may_be_captured():
    denoiser = NetworkDenoiser(Both(), levels=np.linspace(0.99, 0.1, 20), prediction="sample", learned_range=True)
    prior = tiltscope.Prior.from_network(denoiser, shape=(3, 4, 4), name="learned", identity="sha256:0")
    assert judged(prior, SMALL, [BOTH], solver="ddpm_learned_range", grid="angle").problems == ()


@pytest.mark.parametrize("lift", [*LIFTS, "dps(clip=True, batch_mean=True)", "dps(diversity=0.5)"])
def test_a_tick_of_every_lift_may_be_captured(lift):
    assert judged(PRIOR, SMALL, [GUIDED], lift=lift).problems == ()


@pytest.mark.parametrize("needs", [UNGUIDED, GUIDED, BOTH], ids=["unguided", "guided", "both"])
def test_a_tick_of_every_graph_kind_may_be_captured(needs):
    assert judged(PRIOR, SMALL, [needs]).problems == ()


@pytest.mark.parametrize("needs", [GUIDED, Need(True, False, True), Need(True, True, True)])
def test_weighing_and_resampling_may_be_captured(needs):
    assert judged(PRIOR, SMALL, [needs], particles=3).problems == ()


@pytest.mark.parametrize(
    "address",
    [
        "blocks.1:neuron:5@max",
        "blocks.1:sae:7@mean",
        "blocks.2:neuron:1@lse",
        "norm:cls:7",
        "blocks.1:neuron:3@2,1",
        "sum",
    ],
)
def test_a_tick_of_every_readout_may_be_captured(bundle, address):
    """Under a prior that is one product: what is looked at is the trunk and the readout, forward and backward."""
    read = bundle.feature(FEATURE if address == "sum" else address)
    feature = read * 2.0 - bundle.feature("blocks.1:sae:7") if address == "sum" else read
    wide = tiltscope.Prior(lambda x, sigma: 0.7 * x, shape=(3, 64, 64), name="wide")
    assert judged(wide, feature, [GUIDED]).problems == ()


@pytest.mark.parametrize("name", sorted(set(LOG_TILTS) - {"linear"}))
def test_a_tick_of_every_log_tilt_may_be_captured(name):
    assert judged(PRIOR, SMALL, [GUIDED], log_tilt=TILTS[name]).problems == ()


def reads_a_value(slots, programme, written):
    if slots.seen.grad_norm_sq.max().item() > 1.0:
        slots.state.x.mul_(0.5)
    return written


def picks_by_a_mask(slots, programme, written):
    slots.state.x.mul_(slots.state.lam[slots.state.ok].sum())
    return written


def reads_behind_the_dispatcher(slots, programme, written):
    slots.state.x.add_(slots.state.x, alpha=0.0 if slots.state.row.tolist() else 1.0)
    return written


def makes_a_constant(slots, programme, written):
    slots.state.x.mul_(torch.tensor([0.5]))
    return written


def writes_elsewhere(slots, programme, written):
    return written | {"x": slots.state.x * 0.5}


def counts_in_python(slots, programme, written):
    counts_in_python.count += 1
    slots.state.x.mul_(1 / counts_in_python.count)
    return written


counts_in_python.count = 0


def takes_a_mask_from_the_host(slots, programme, written):
    """What the tick did before: which slots are guided, built on the host each time."""
    guided = torch.from_numpy(np.array([True, False]))
    slots.state.x.copy_(torch.where(guided[:, None, None, None], slots.state.x, 0.0))
    return written


def draws_from_the_global_generator(slots, programme, written):
    slots.state.x.add_(torch.randn_like(slots.state.x))
    return written


TABLE = torch.ones(1, 9)


def keeps_a_table_on_the_host(slots, programme, written):
    """The same memory every time, and the meta device itself lets it pass."""
    slots.state.x.mul_(TABLE[slots.state.plan, slots.state.row][:, None, None, None])
    return written


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (reads_a_value, "_local_scalar_dense.default waits for the device"),
        (picks_by_a_mask, "with a mask waits"),
        (reads_behind_the_dispatcher, "on meta"),
        (makes_a_constant, "from host data"),
        (writes_elsewhere, "output x is not a static buffer"),
        (counts_in_python, "differs between runs"),
        (takes_a_mask_from_the_host, "at other addresses"),
        (draws_from_the_global_generator, "global generator"),
        (keeps_a_table_on_the_host, "left on the host"),
    ],
)
def test_an_unsafe_step_is_refused(planted, words):
    verdict = judged(PRIOR, SMALL, [GUIDED], change=planted)
    assert any(words in problem for problem in verdict.problems), verdict.problems
    with pytest.raises(RunnerError, match="cannot be captured"):
        verdict.require("the planted step")


def test_the_definitions_behind_the_opaque_ops_may_be_captured():
    """In the tick an op is one entry; here its plain torch is looked into."""
    batch, shape = 3, (3, 4, 4)
    buffers = {name: torch.zeros(batch, *shape) for name in ("x", "x0_hat", "grad_a", "history")}
    buffers |= {"row": torch.zeros(batch, dtype=torch.int64), "ok": torch.ones(batch, dtype=torch.bool)}
    buffers |= {"log_weight": torch.zeros(2, 5), "u": torch.zeros(2), "ancestor": torch.zeros(2, 5, dtype=torch.int64)}
    fixed = {
        "table": torch.rand(1, 4, 11),
        "num_rows": torch.tensor([4]),
        "plan": torch.zeros(batch, dtype=torch.int64),
        "per_slot": torch.ones(batch),
        "guided": torch.tensor([True, False, True]),
        "key": torch.zeros(batch, 2, dtype=torch.int64),
    }

    def step(held, given):
        pictures = [held[name] for name in ("x", "x0_hat", "grad_a", "history")]
        plans = [given[name] for name in ("table", "num_rows", "plan")]
        scalars = [held["row"], held["ok"], given["per_slot"], given["per_slot"], given["guided"]]
        noise = [given["key"], given["plan"], given["plan"]]
        moved = reference.guided_step(reference.StepInputs(*pictures, *plans, *scalars, *noise))
        found = reference.resample(held["log_weight"], held["u"])
        named = {"x": moved.x, "history": moved.history, "row": moved.row, "ok": moved.ok, "ancestor": found.ancestor}
        return {name: held[name].copy_(made) for name, made in named.items()}

    def fill(turn):
        generator = torch.Generator().manual_seed(turn)
        for name in ("x", "x0_hat", "grad_a", "history", "log_weight", "u"):
            buffers[name].uniform_(generator=generator).mul_(10.0**turn)
        buffers["row"].fill_(turn)
        buffers["ok"].copy_(torch.tensor([True, turn == 1, turn != 1]))

    def meta(tensors):
        return {name: each.to(META) for name, each in tensors.items()}

    there = meta(buffers), meta(fixed)
    verdict = check_capture(lambda: step(buffers, fixed), buffers, fill, on_meta=lambda: step(*there))
    assert verdict.problems == ()
    assert verdict.num_operators > 100
