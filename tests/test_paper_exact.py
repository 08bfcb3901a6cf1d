"""The preset paper_exact against a plain transcription of the published update, in its own symbols, float64, state too."""

import numpy as np
import pytest
import torch

import tiltscope
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.presets import PRESETS
from tiltscope.engine.sampler.noise import STREAM_START, STREAM_STEP, normal
from tiltscope.engine.tilt.worlds import GaussianWorld

ROWS, SHAPE, SEED = 20, (3, 8, 8), 4
BETA = np.linspace(1e-4, 0.02, 1000)
# Twenty of the thousand levels as a chain of its own.
ALPHA_BAR = np.cumprod(1 - BETA)[np.linspace(999, 0, ROWS).round().astype(int)][::-1]
MIX = torch.linspace(-2, 3, 12).reshape(4, 3).double()


def eps_network(x, alpha_bar):
    """Some smooth noise prediction, between pixels too."""
    level = alpha_bar.reshape(-1, 1, 1, 1)
    near = torch.tanh(x.roll(1, -1) - 0.5 * x.roll(1, -2))
    return (1 - level).sqrt() * x * (0.6 + 0.2 * level) + 0.3 * near


def activation(x0):
    """The published pooling, 0.7 max + 0.3 mean of relu over the central half, of a small convolution."""
    tokens = torch.einsum("kc,bchw->bkhw", MIX, x0).tanh().sum(1) + x0.roll(1, -1).sum(1)
    centre = 8 * tokens[:, 2:6, 2:6].flatten(1)
    return 0.7 * centre.amax(1) + 0.3 * centre.relu().mean(1)


def published_update(num, scale, cap):
    """x_{t-1} = DDPM(x_t) - scale * grad of -min(mean over the batch of a(clip(x0_hat)), cap), back through the network."""
    x = torch.from_numpy(np.stack([z(STREAM_START, 0, index) for index in range(num)]))
    bound = clipped = 0
    for row in range(ROWS):
        alpha_bar = ALPHA_BAR[ROWS - 1 - row]
        before = ALPHA_BAR[ROWS - 2 - row] if row + 1 < ROWS else 1.0
        beta = 1 - alpha_bar / before
        x = x.detach().requires_grad_()
        eps = eps_network(x, torch.full((num,), alpha_bar, dtype=torch.float64))
        unclipped = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        x0_hat = unclipped.clip(-1, 1)
        clipped += int((x0_hat != unclipped).sum())
        loss = -torch.minimum(activation(x0_hat).mean(), torch.tensor(cap, dtype=torch.float64))
        (grad,) = torch.autograd.grad(loss, x, allow_unused=True)
        bound += bool(-loss == cap)
        mean = before**0.5 * beta / (1 - alpha_bar) * x0_hat + (1 - beta) ** 0.5 * (1 - before) / (1 - alpha_bar) * x
        noise = torch.from_numpy(np.stack([z(STREAM_STEP, row, index) for index in range(num)]))
        x = mean + (beta * (1 - before) / (1 - alpha_bar)) ** 0.5 * noise - scale * grad
    return x.detach(), bound, clipped


def z(stream, row, index):
    return normal(SEED, index, row, stream=stream, shape=SHAPE, dtype=np.float64)


@pytest.fixture
def setting():
    def denoise(x, sigma):
        alpha_bar = (1 - sigma) * (1 + sigma)
        level = alpha_bar.reshape(-1, 1, 1, 1)
        return (x - (1 - level).sqrt() * eps_network(x, alpha_bar)) / level.sqrt()

    prior = tiltscope.Prior(denoise, shape=SHAPE)
    prior.levels = np.sqrt(1 - ALPHA_BAR)[::-1].copy()
    return prior, tiltscope.Feature(activation, name="published pooling")


# In a batch every picture's rounding reaches the others through the shared mean, and the cap's edge multiplies it.
@pytest.mark.parametrize(("num", "within"), [(1, 1e-10), (4, 1e-8)])
def test_twenty_rows_are_the_published_ones(setting, num, within):
    """With a batch too: its hazard, one B-th of the push each and one cap for all, is reproduced by name."""
    prior, feature = setting
    samples = tiltscope.sample(
        prior, feature, preset="paper_exact", steps=ROWS, num=num, batch_size=num, seed=SEED, dtype="float64"
    )
    expected, bound, clipped = published_update(num, scale=1000 / ROWS, cap=20.0)
    assert 0 < bound < ROWS  # the cap holds in some rows and not in others
    assert clipped > 100  # and clipping has something to clip
    torch.testing.assert_close(samples.x0.double(), expected, rtol=0, atol=1e-6)  # Samples are float32
    assert float((drawn_in_float64(prior, feature, num) - expected).abs().max()) < within


def drawn_in_float64(prior, feature, num):
    from tiltscope.engine.prepare import prepare
    from tiltscope.engine.sampler.state import admit
    from tiltscope.engine.sampler.tick import tick

    config = SampleConfig(preset="paper_exact", steps=ROWS, num=num, batch_size=num, seed=SEED, dtype="float64")
    run = prepare(prior, feature, config)
    state = admit(run.programme, seed=SEED, indices=np.arange(num), lam=np.ones(num), readout=None, bucket=num)
    for _ in range(ROWS):
        state, _ = tick(state, run.programme)
    return state.x


def test_what_the_preset_fills():
    config = SampleConfig(preset="paper_exact").resolved()
    assert config.lam == 1.0
    assert config.steps == 1000
    assert config.lift == "dps(clip=True, batch_mean=True)"
    assert config.to_json() | PRESETS["paper_exact"].settings == config.to_json()


def test_padding_does_not_weaken_the_mean_over_the_batch(setting):
    prior, feature = setting
    asked = {"preset": "paper_exact", "steps": ROWS, "num": 2, "seed": SEED, "dtype": "float64"}
    alone = tiltscope.sample(prior, feature, batch_size=2, **asked)
    padded = tiltscope.sample(prior, feature, batch_size=4, **asked)
    torch.testing.assert_close(alone.x0, padded.x0, rtol=0, atol=1e-6)


def test_a_scale_is_no_lambda():
    world = GaussianWorld(s=1.2, shape=(2,))
    samples = tiltscope.sample(world.prior, world.feature, num=2, lam=0.5, steps=5, guidance="constant")
    assert samples.manifest["kl"]["value"] is None
    with pytest.raises(ConfigError, match="guidance constant"):
        tiltscope.sample(world.prior, world.feature, num=2, target_activation=1.0, steps=5, guidance="constant")


def test_a_scale_is_calibrated_on_the_sampler_itself():
    world = GaussianWorld(s=1.2, shape=(2,))
    samples = tiltscope.sample(
        world.prior,
        world.feature,
        num=400,
        target_activation=1.0,
        steps=20,
        guidance="constant",
        calibration="sampler",
        batch_size=400,
    )
    assert float(samples.activation.mean()) == pytest.approx(1.0, abs=0.25)
