"""From what a network predicts to E[x0 | x]: against a world with a known answer, against diffusers, and bitwise."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tiltscope.engine.errors import BundleError
from tiltscope.engine.prior.levels import sigma_levels
from tiltscope.engine.prior.load import load_denoiser
from tiltscope.engine.prior.network import PREDICTIONS, NetworkDenoiser, TimeEmbedding

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
LINEAR = {"beta_schedule": "linear"}
SCALE = 1.7
SIGMA_DATA = 0.6
# Those whose time is a level's number, which DDPMScheduler knows.
NUMBERED = [name for name, each in PREDICTIONS.items() if each.time is None]


def coordinates(sigma, x):
    sigma = sigma.view(-1, 1, 1, 1)
    return sigma, torch.sqrt((1 - sigma) * (1 + sigma))


def exact_denoised(x, sigma):
    """E[x0 | x] of x0 ~ N(0, s^2): alpha s^2 x / (alpha^2 s^2 + sigma^2)."""
    sigma, alpha = coordinates(sigma, x)
    return alpha * SCALE**2 * x / (alpha**2 * SCALE**2 + sigma**2)


class GaussianNetwork(nn.Module):
    """What a perfect network of each kind predicts for N(0, s^2), given its own time only."""

    def __init__(self, prediction, levels):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.prediction = prediction
        self.theta = torch.atan2(
            torch.from_numpy(levels[::-1].copy()), torch.from_numpy(((1 - levels) * (1 + levels))[::-1].copy()).sqrt()
        )

    def forward(self, x, time, return_dict):
        if self.prediction == "flow":
            s = (time / 1000).view(-1, 1, 1, 1)
            x0 = (1 - s) * SCALE**2 * x / ((1 - s) ** 2 * SCALE**2 + s**2)
            return ((x - x0) / s,)
        if self.prediction in ("edm", "edm_v"):
            s = torch.exp(4 * time).view(-1, 1, 1, 1)
            exploding = x * torch.sqrt(s**2 + SIGMA_DATA**2)
            x0 = SCALE**2 * exploding / (SCALE**2 + s**2)
            skip, out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s * SIGMA_DATA / torch.sqrt(s**2 + SIGMA_DATA**2)
            return ((x0 - skip * exploding) / (out if self.prediction == "edm" else -out),)
        low = time.floor().long().clamp(max=len(self.theta) - 2)
        theta = self.theta[low] + (time - low) * (self.theta[low + 1] - self.theta[low])
        sigma, alpha = torch.sin(theta).view(-1, 1, 1, 1), torch.cos(theta).view(-1, 1, 1, 1)
        x0 = alpha * SCALE**2 * x / (alpha**2 * SCALE**2 + sigma**2)
        eps = (x - alpha * x0) / sigma
        return ({"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[self.prediction],)


def gaussian_denoiser(prediction, config=COSINE):
    levels = sigma_levels(config)
    network = GaussianNetwork(prediction, levels)
    return NetworkDenoiser(network, levels=levels, prediction=prediction, sigma_data=SIGMA_DATA)


def noise(num, shape=(3, 8, 8), seed=0, dtype=torch.float64):
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(sigma=st.floats(0.05, 0.99999))
def test_every_prediction_gives_the_same_denoised_picture(prediction, sigma):
    x, sigmas = noise(2), torch.tensor([sigma, 0.5], dtype=torch.float64)
    expected = exact_denoised(x, sigmas)
    # 1e-9: dividing by alpha = 4e-3 loses three digits, the angle's round trip some more.
    torch.testing.assert_close(gaussian_denoiser(prediction)(x, sigmas), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("config", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_a_picture_without_noise_is_itself(prediction, config):
    x = noise(2)
    denoised = gaussian_denoiser(prediction, config)(x, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(denoised, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_below_the_quietest_level_it_goes_on_without_a_step(prediction):
    denoiser = gaussian_denoiser(prediction, LINEAR)
    low = denoiser.facts.low_sigma
    x = noise(1)

    def at(factor):
        return denoiser(x, torch.tensor([low * factor], dtype=torch.float64))

    assert (at(1 - 1e-9) - at(1 + 1e-9)).abs().max() < 1e-7
    # Between there and zero the answer stays near the truth, which lies within sigma^2 of x. EDM's correction to its own skip
    # is held at the quietest level: it misses by x sigma (low - sigma) (1/s_d^2 - 1/s^2).
    held = float(x.abs().max()) * 0.25 * (SIGMA_DATA**-2 - SCALE**-2) if prediction.startswith("edm") else 1.0
    for factor in (0.9, 0.5, 0.1):
        sigma = torch.tensor([low * factor], dtype=torch.float64)
        assert (at(factor) - exact_denoised(x, sigma)).abs().max() < 1.01 * held * low**2


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pure_noise_has_a_finite_answer(prediction):
    for config in (COSINE, LINEAR):
        assert gaussian_denoiser(prediction, config)(noise(1), torch.ones(1, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("prediction", NUMBERED)
@pytest.mark.parametrize("config", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_the_denoised_picture_is_diffusers_own(prediction, config):
    """DDPMScheduler's pred_original_sample at its own integer times, computed by it in float32."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**config, prediction_type=prediction, clip_sample=False)
    levels = sigma_levels(config)
    network = GaussianNetwork(prediction, levels)
    denoiser = NetworkDenoiser(network, levels=levels, prediction=prediction)
    x = noise(1)
    for t in (0, 3, 500, 900):
        sigma = torch.tensor([levels[len(levels) - 1 - t]])
        output = network(x, torch.tensor([float(t)], dtype=torch.float64), return_dict=False)[0]
        theirs = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).pred_original_sample
        torch.testing.assert_close(denoiser(x, sigma), theirs, rtol=1e-4, atol=1e-4)


def test_time_embedding_is_diffusers_own_in_float64():
    from diffusers.models.embeddings import Timesteps

    time = torch.tensor([0.0, 1.0, 17.0, 500.0, 999.0], dtype=torch.float64)
    for flip, shift, channels in ((True, 0, 8), (False, 1, 32), (True, 0, 9)):
        ours = TimeEmbedding(channels, flip_sin_to_cos=flip, downscale_freq_shift=shift)(time)
        assert ours.dtype == torch.float64
        # Their float32 phase of 999 is off by up to 6e-5.
        torch.testing.assert_close(ours.float(), Timesteps(channels, flip, shift)(time), rtol=0, atol=1e-4)
    exact = [math.cos(999.5), math.cos(999.5 * 10000**-0.5), math.sin(999.5), math.sin(999.5 * 10000**-0.5)]
    ours = TimeEmbedding(4, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor([999.5], dtype=torch.float64))
    torch.testing.assert_close(ours[0], torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def tiny(tiny_bundle):
    return load(tiny_bundle / "prior")


def load(folder, **changes):
    settings = {"kind": "diffusers_unet2d", "shape": (3, 64, 64), "pixel_unshuffle": 4} | changes
    return load_denoiser(folder, **settings)


def test_the_folder_is_diffusers_own_and_unshuffling_is_hidden(tiny, tiny_bundle):
    from diffusers import DDPMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(tiny_bundle / "prior", torch_dtype=torch.float32).eval()
    assert DDPMScheduler.from_pretrained(tiny_bundle / "prior").config.prediction_type == "sample"
    x = noise(2, (3, 64, 64), dtype=torch.float32)
    levels = torch.from_numpy(tiny.levels)
    with torch.no_grad():
        folded = nn.functional.pixel_unshuffle(x, 4)
        expected = nn.functional.pixel_shuffle(unet(folded, torch.tensor([300, 999])).sample, 4)
        got = tiny(x, levels[[1000 - 1 - 300, 0]])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_float64_is_float64_all_the_way(tiny):
    """A float32 time or embedding would move in steps: its derivative at two step sizes would not agree."""
    exact = tiny.in_dtype(torch.float64)
    x = noise(1, (3, 64, 64))

    def at(sigma):
        return exact(x, torch.tensor([sigma], dtype=torch.float64))

    with torch.no_grad():
        coarse, fine = ((at(0.7 + h) - at(0.7 - h)) / (2 * h) for h in (1e-6, 1e-7))
    assert (coarse - fine).abs().max() < 1e-5 * coarse.abs().max()
    with torch.no_grad():
        near = tiny(x.float(), torch.tensor([0.7], dtype=torch.float64))
    torch.testing.assert_close(near.double(), at(0.7), rtol=1e-4, atol=1e-4)
    assert (tiny.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert exact(x.float(), torch.tensor([0.7], dtype=torch.float64)).dtype == torch.float32


def test_gradients_are_those_of_finite_differences(tiny):
    exact = tiny.in_dtype(torch.float64)
    sigma = torch.tensor([0.6], dtype=torch.float64)
    x = noise(1, (3, 64, 64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: exact(v, sigma).square().mean(), x, fast_mode=True)


def test_loading_touches_no_global_generator_and_trains_nothing(tiny_bundle):
    before = torch.random.get_rng_state()
    denoiser = load(tiny_bundle / "prior")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(p.requires_grad or p.is_meta for p in denoiser.network.parameters())
    assert not any(b.is_meta for b in denoiser.network.buffers())
    assert not denoiser.network.training


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """The embedded bundle's architecture: kernels are chosen by size, so a small stand-in would prove nothing."""
    from diffusers import DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("full_size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16,
            in_channels=48,
            out_channels=48,
            block_out_channels=(64, 96, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    unet.save_pretrained(folder)
    DDPMScheduler(**COSINE, prediction_type="sample").save_pretrained(folder)
    return load(folder)


@pytest.fixture
def threads():
    """Set torch's threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Each but the first changed bits with torch's own modules: by the product's last rows, or (3 threads) by silu's left-overs.
@pytest.mark.parametrize(
    ("batch", "num_threads", "dtype"),
    [
        (8, 1, torch.float32),
        (6, 1, torch.float64),
        pytest.param(5, 2, torch.float32, marks=pytest.mark.slow),
        pytest.param(8, 3, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_batch_mates_change_no_bit_of_value_or_gradient(full_size, threads, batch, num_threads, dtype):
    """At one batch shape: permuted, and among strangers at other noise levels."""
    denoiser = full_size.in_dtype(dtype)
    threads(num_threads)

    def run(x, sigma):
        x = x.detach().requires_grad_()
        denoised = denoiser(x, sigma)
        return denoised.detach(), torch.autograd.grad(denoised.square().sum(), x)[0]

    x, sigma = noise(batch, (3, 64, 64), dtype=dtype), torch.linspace(0.05, 0.95, batch, dtype=torch.float64)
    base = run(x, sigma)
    order = torch.arange(batch).roll(1)  # no sample keeps its place
    permuted = run(x[order], sigma[order])
    strangers, levels = 5 * noise(batch, (3, 64, 64), seed=2, dtype=dtype), sigma.flip(0).clone()
    strangers[1], levels[1] = x[1], sigma[1]
    company = run(strangers, levels)
    for before, after, among in zip(base, permuted, company, strict=True):
        assert torch.equal(after, before[order])
        assert torch.equal(among[1], before[1])


def change(source, target, name, **values):
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    (target / name).write_text(json.dumps(json.loads((target / name).read_text()) | values))
    return target


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("scheduler_config.json", {"prediction_type": "flow"}, "epsilon, v_prediction, sample"),
        ("scheduler_config.json", {"beta_schedule": "sigmoid"}, "squaredcos_cap_v2"),
        ("scheduler_config.json", {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "sigma = 1"),
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "UNet2DModel"),
        ("config.json", {"in_channels": 3}, "in_channels must be 48"),
        ("config.json", {"out_channels": 64}, "out_channels must be 48 here, or 96 with"),
        ("config.json", {"time_embedding_type": "learned"}, "positional"),
        ("config.json", {"num_class_embeds": 10}, "num_class_embeds"),
        ("config.json", {"block_out_channels": [8, 12]}, "does not hold the weights"),
        ("config.json", {"block_out_channels": [8]}, "does not describe"),
        ("config.json", {"down_block_types": ["DownBlock2D", "Mystery"]}, "does not describe"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tiny_bundle, tmp_path, name, values, message):
    with pytest.raises(BundleError, match=message):
        load(change(tiny_bundle / "prior", tmp_path, name, **values))


def test_an_unknown_kind_names_those_there_are(tiny_bundle):
    with pytest.raises(BundleError, match="diffusers_unet2d"):
        load(tiny_bundle / "prior", kind="pickle")


def test_weights_that_are_no_safetensors_are_refused(tiny_bundle, tmp_path):
    folder = change(tiny_bundle / "prior", tmp_path, "config.json")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(BundleError, match=r"diffusion_pytorch_model\.safetensors"):
        load(folder)
