"""The batcher's contract: every picture is its solo run's, bit for bit, and nobody's end touches another's samples."""

import asyncio
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tiltscope
from tiltscope.engine.batching.engine import Engine
from tiltscope.engine.errors import BundleError, BusyError, ConfigError, DeadlineError, RunnerError
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.engine.tilt.worlds import GaussianWorld

WORLD = GaussianWorld(s=1.3, shape=(3, 4, 4))
# Unlike in every respect: feature, lambda, log-tilt, solver, steps, seed, lift, particles.
MIXED = (
    ("blocks.1:sae:3", {"num": 3, "lam": 2.0, "steps": 5, "seed": 1}),
    ("blocks.1:sae:5@max", {"num": 2, "lam": (0.0, -1.5), "solver": "heun", "steps": 3, "seed": 1}),
    ("blocks.1:sae:7", {"num": 2, "lam": 1.0, "solver": "dpmpp_2m", "steps": 6, "log_tilt": "capped(cap=0.2)"}),
    ("blocks.1:neuron:4", {"num": 5, "lam": 0.5, "steps": 4, "guidance_interval": (0.2, 0.8)}),
    ("blocks.1:sae:3", {"num": 2, "lam": 2.0, "steps": 4, "particles": 3}),
    ("blocks.1:sae:9", {"num": 1, "lam": 1.0, "steps": 4, "lift": "none"}),
)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiltscope.load(tiny_bundle)


def solo(bundle, feature, settings):
    return tiltscope.sample(bundle.prior, bundle.feature(feature), batch_size=4, **settings)


def assert_same(got, expected):
    for name in ("x0", "activation", "index", "lam", "nfe", "n_vjp", "ok"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)


def test_every_request_of_a_mixed_stream_equals_its_solo_run_bit_for_bit(bundle):
    with Engine(bundle, max_batch=4) as engine:
        tickets = [engine.submit(feature, **settings) for feature, settings in MIXED]
        answers = [ticket.result(timeout=300) for ticket in tickets]
    for answer, (feature, settings) in zip(answers, MIXED, strict=True):
        expected = solo(bundle, feature, settings)
        assert_same(answer, expected)
        assert answer.manifest["identity"] == expected.manifest["identity"]
    particles = solo(bundle, *MIXED[4])
    torch.testing.assert_close(answers[4].weights, particles.weights, rtol=0, atol=0)
    assert answers[4].manifest["log_z"] == particles.manifest["log_z"]


def test_unguided_first_rows_ride_in_the_guided_call_of_their_batch_mates(bundle, monkeypatch):
    """D of the guided graph is theirs bit for bit, so a request that joins late costs no call of its own."""
    feature, sizes = "blocks.1:sae:3", {"guided": [], "unguided": []}
    asked = [{"num": 1, "lam": 0.7, "steps": steps, "seed": steps} for steps in (9, 3, 4)]
    alone = [solo(bundle, feature, settings) for settings in asked]
    with Engine(bundle, max_batch=4) as engine:
        engine.submit(feature, **asked[0]).result(timeout=300)  # whatever is tried once has been
        all_asked = threading.Event()

        def count(name):
            real = getattr(TorchStep, name)

            def counted(self, x, *given):
                sizes[name].append(len(x))
                all_asked.wait(30)
                return real(self, x, *given)

            monkeypatch.setattr(TorchStep, name, counted)

        for name in sizes:
            count(name)
        tickets = [engine.submit(feature, **asked[0])]
        while not sizes["unguided"]:
            time.sleep(0.01)
        tickets += [engine.submit(feature, **settings) for settings in asked[1:]]
        all_asked.set()
        answers = [ticket.result(timeout=300) for ticket in tickets]
    for answer, expected in zip(answers, alone, strict=True):
        assert_same(answer, expected)
    # The first request's first row, alone; its eight others, in which both late ones find room.
    assert sizes == {"guided": [4] * 8, "unguided": [4]}


class Gate:
    """A denoiser that a test can hold, so that requests meet in the batch as the test wants; counts its calls' samples."""

    def __init__(self):
        self.open, self.entered, self.sizes = threading.Event(), threading.Event(), []
        self.open.set()

    def __call__(self, x, sigma):
        self.entered.set()
        self.open.wait(30)
        self.sizes.append(len(x))
        return WORLD.prior.denoise(x, sigma)


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def prior(gate):
    return tiltscope.Prior(gate, shape=WORLD.shape, name="held")


def held(gate):
    """From here on the next tick waits until gate.open is set."""
    gate.open.clear()
    gate.entered.clear()


def test_cancelling_leaves_the_others_bitwise_untouched(prior, gate):
    with Engine(prior, max_batch=4) as engine:
        first = engine.submit(WORLD.feature, num=1, lam=0.5, steps=40, seed=9)
        first.result(timeout=60)
        held(gate)
        tickets = [engine.submit(WORLD.feature, num=2, lam=0.5, steps=40, seed=seed) for seed in range(6)]
        assert gate.entered.wait(30)
        assert all(ticket.cancel() for ticket in tickets[::2])
        gate.open.set()
        answers = [ticket.result(timeout=60) for ticket in tickets[1::2]]
        assert all(ticket.cancelled() for ticket in tickets[::2])
    for answer, seed in zip(answers, (1, 3, 5), strict=True):
        assert_same(
            answer, tiltscope.sample(WORLD.prior, WORLD.feature, num=2, lam=0.5, steps=40, seed=seed, batch_size=4)
        )


def test_a_late_request_joins_the_running_batch_and_is_not_behind_a_long_one(prior, gate):
    with Engine(prior, max_batch=4) as engine:
        engine.submit(WORLD.feature, num=1, lam=0.5, steps=2).result(
            timeout=60
        )  # the steps are known, nothing is tried again
        held(gate)
        long = engine.submit(WORLD.feature, num=200, lam=0.5, steps=3)
        assert gate.entered.wait(30)
        short = engine.submit(WORLD.feature, num=1, lam=0.5, steps=3, seed=4)
        gate.open.set()
        short.result(timeout=60)
        assert not long.done()
        long.cancel()


def test_previews_show_what_is_being_drawn(prior, gate):
    with Engine(prior, max_batch=4) as engine:
        engine.submit(WORLD.feature, num=1, lam=0.5, steps=2).result(timeout=60)
        held(gate)
        ticket = engine.submit(WORLD.feature, num=2, lam=0.5, steps=50)
        assert gate.entered.wait(30)
        assert ticket.previews() == []
        gate.open.set()
        while not (seen := ticket.previews()):
            pass
        assert {each.index for each in seen} <= {0, 1}
        assert seen[0].num_rows == 50
        assert 1 <= seen[0].row <= 50
        assert seen[0].x0_hat.shape == WORLD.shape
        ticket.result(timeout=60)
        assert ticket.previews() == []


def test_a_deadline_ends_the_request_and_no_other(prior, gate):
    with Engine(prior, max_batch=4) as engine:
        engine.submit(WORLD.feature, num=1, lam=0.5, steps=2).result(timeout=60)
        held(gate)
        late = engine.submit(WORLD.feature, num=2, lam=0.5, steps=3, deadline_s=0.05)
        other = engine.submit(WORLD.feature, num=2, lam=0.5, steps=3)
        assert gate.entered.wait(30)
        threading.Event().wait(0.1)
        gate.open.set()
        with pytest.raises(DeadlineError, match="of 2 samples were done at its deadline"):
            late.result(timeout=60)
        assert other.result(timeout=60).ok.all()


def test_no_room_is_said_and_room_comes_back(prior, gate):
    with Engine(prior, max_batch=4, max_pending=4) as engine:
        engine.submit(WORLD.feature, num=1, lam=0.5, steps=2).result(timeout=60)
        held(gate)
        first = engine.submit(WORLD.feature, num=3, lam=0.5, steps=3)
        with pytest.raises(BusyError, match="3 samples are unanswered and 4 is the limit"):
            engine.submit(WORLD.feature, num=2, lam=0.5, steps=3)
        with pytest.raises(ConfigError, match="num: got 5, this engine holds at most 4"):
            engine.submit(WORLD.feature, num=5, lam=0.5, steps=3)
        gate.open.set()
        assert engine.submit(WORLD.feature, num=2, lam=0.5, steps=3, wait_s=30).result(timeout=60).ok.all()
        assert first.done()


def test_asyncio_awaits_and_cancels(prior):
    async def both():
        async with asyncio.timeout(60):
            wanted = asyncio.create_task(engine.sample(WORLD.feature, num=2, lam=0.5, steps=20))
            unwanted = asyncio.create_task(engine.sample(WORLD.feature, num=2000, lam=0.5, steps=20))
            answer = await wanted
            unwanted.cancel()
            await asyncio.wait([unwanted])
            assert unwanted.cancelled()
            return answer

    with Engine(prior, max_batch=4) as engine:
        answer = asyncio.run(both())
        while engine.counts().live:
            pass
        assert not engine.tickets
    assert answer.ok.all()


def test_a_network_that_fails_ends_its_requests_and_the_engine_goes_on():
    broken = threading.Event()

    def denoise(x, sigma):
        if broken.is_set():
            raise MemoryError("no room for the activations")
        return WORLD.prior.denoise(x, sigma)

    with Engine(tiltscope.Prior(denoise, shape=WORLD.shape, name="breaks"), max_batch=4) as engine:
        engine.submit(WORLD.feature, num=1, lam=0.5, steps=2).result(timeout=60)
        broken.set()
        with pytest.raises(MemoryError, match="no room"):
            engine.submit(WORLD.feature, num=2, lam=0.5, steps=3).result(timeout=60)
        broken.clear()
        assert engine.submit(WORLD.feature, num=2, lam=0.5, steps=3).result(timeout=60).ok.all()


def test_closing_answers_what_is_pending_and_takes_no_more(prior):
    engine = Engine(prior, max_batch=4)
    ticket = engine.submit(WORLD.feature, num=6, lam=0.5, steps=5)
    engine.close()
    assert ticket.result(timeout=0).ok.all()
    with pytest.raises(RunnerError, match="closed"):
        engine.submit(WORLD.feature, num=1, lam=0.5, steps=5)


def test_batches_are_full_while_there_is_enough_to_fill_them(prior):
    with Engine(prior, max_batch=4) as engine:
        tickets = [
            engine.submit(WORLD.feature, num=30, lam=lam, steps=steps, solver=solver)
            for lam, steps, solver in ((0.5, 7, "ddpm"), (0.0, 9, "ddpm"), (1.0, 5, "heun"), (0.2, 11, "dpmpp_2m"))
        ]
        for ticket in tickets:
            ticket.result(timeout=60)
        counts = engine.counts()
    assert counts.advanced == 30 * (7 + 9 + 9 + 11)
    assert counts.advanced / counts.slots > 0.9


@pytest.mark.parametrize("wrong", [{"batch_size": 3}, {"runner": "torch"}, {"nmu": 3}])
def test_what_the_engine_sets_itself_is_refused(prior, wrong):
    with Engine(prior) as engine, pytest.raises(ConfigError, match=next(iter(wrong))):
        engine.submit(WORLD.feature, lam=1.0, **wrong)


def test_samples_that_push_each_other_are_refused(bundle):
    with Engine(bundle, max_batch=4) as engine, pytest.raises(ConfigError, match="push each other"):
        engine.submit("blocks.1:sae:3", lam=1.0, lift="dps(diversity=0.1)")


def test_a_name_that_is_taken_is_refused(prior, gate):
    with Engine(prior, max_batch=4) as engine:
        held(gate)
        threading.Timer(0.2, gate.open.set).start()
        ticket = engine.submit(WORLD.feature, name="a", num=4, lam=0.5, steps=5)
        with pytest.raises(ConfigError, match="'a' is the name of an unanswered request"):
            engine.submit(WORLD.feature, name="a", num=4, lam=0.5, steps=5)
        gate.open.set()
        assert ticket.result(timeout=60).ok.all()


def checkpointed(bundle, path, asked):
    """An engine stopped in the middle of `asked`, its checkpoint, and how many rows had been done by then."""
    engine = Engine(bundle, max_batch=4)
    for at, (feature, settings) in enumerate(asked):
        engine.submit(feature, name=str(at), **settings)
    while engine.counts().advanced < 20:
        pass
    assert engine.tickets, "nothing is left to be checkpointed"
    engine.checkpoint(path)
    engine.close(cancel=True)


def test_a_checkpoint_goes_on_bit_for_bit(bundle, tmp_path):
    asked = [(feature, replace_steps(settings, 12)) for feature, settings in MIXED[:5]]
    checkpointed(bundle, tmp_path / "batch.safetensors", asked)
    with Engine.resume(bundle, tmp_path / "batch.safetensors", max_batch=4) as engine:
        tickets = dict(engine.tickets)
        assert tickets
        answers = {name: ticket.result(timeout=300) for name, ticket in tickets.items()}
    for name, answer in answers.items():
        assert_same(answer, solo(bundle, *asked[int(name)]))


def replace_steps(settings, steps):
    return settings | {"steps": steps}


def test_a_checkpoint_with_other_settings_or_of_another_bundle_is_refused(bundle, tmp_path):
    path = tmp_path / "batch.safetensors"
    checkpointed(bundle, path, [(MIXED[0][0], replace_steps(MIXED[0][1], 40))])
    with pytest.raises(ConfigError, match="batch_size"):
        Engine.resume(bundle, path, max_batch=8)
    with safe_open(path, "pt") as opened:
        facts, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, path, facts | {"requests": facts["requests"].replace(bundle.prior.identity, "sha256:0")})
    with pytest.raises(BundleError, match="written with another bundle"):
        Engine.resume(bundle, path, max_batch=4)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BundleError, match="no readable checkpoint"):
        Engine.resume(bundle, path, max_batch=4)


def test_a_function_cannot_be_checkpointed(prior, gate, tmp_path):
    with Engine(prior, max_batch=4) as engine:
        ticket = engine.submit(WORLD.feature, num=40, lam=0.5, steps=50)
        with pytest.raises(ConfigError, match="is a function, which no checkpoint can hold"):
            engine.checkpoint(tmp_path / "batch.safetensors")
        ticket.cancel()
    assert not (tmp_path / "batch.safetensors").exists()


def test_what_was_asked_during_a_tick_is_counted_as_waiting(prior, gate):
    with Engine(prior, max_batch=2) as engine:
        engine.submit(WORLD.feature, num=1, lam=0.5, steps=2).result(timeout=60)  # whatever is tried once has been
        held(gate)
        first = engine.submit(WORLD.feature, num=1, lam=0.5, steps=2)
        assert gate.entered.wait(30)
        tickets = [engine.submit(WORLD.feature, num=2, lam=0.5, steps=20) for _ in range(4)]
        threading.Timer(0.2, gate.open.set).start()
        assert engine.counts().waiting == 8
        for ticket in [first, *tickets]:
            ticket.result(timeout=60)
