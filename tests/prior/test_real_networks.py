"""Diffusion networks in diffusers' own folders: tiltscope's denoiser is the library's forward, whatever it predicts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EDM2, LINEAR, NCSNPP, pictures, write_dit, write_edm, write_unet

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.prior.load import load_denoiser
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.sampler.plan import make_plan

PICTURE, LATENT = (3, 64, 64), (4, 8, 8)
TIMES = (3, 400, 900)
# Of the largest value: the same float32 layers, and a time embedding that the library computes in float32 (3e-5 in its phase).
WITHIN = 1e-5


def noise(shape, num=3, seed=0):
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected, within=WITHIN):
    assert float((found - expected).abs().max()) < within * float(expected.abs().max())


@pytest.fixture(scope="module")
def adm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adm")
    return write_unet(folder), folder, load_denoiser(folder, kind="diffusers_unet2d", shape=PICTURE)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    return write_dit(folder), folder, load_denoiser(folder, kind="diffusers_dit", shape=LATENT)


def small_phase(model, *inputs):
    """The library's forward with its time embedding in float64, as ours: what is left is the layers."""
    from tiltscope.engine.prior.network import TimeEmbedding

    for module in model.modules():
        if type(module).__name__ == "Timesteps":
            module.forward = TimeEmbedding(
                module.num_channels,
                flip_sin_to_cos=module.flip_sin_to_cos,
                downscale_freq_shift=module.downscale_freq_shift,
            )
    with torch.no_grad():
        return model(*inputs).sample


@torch.no_grad()
@pytest.mark.parametrize("which", ["adm", "dit"])
def test_half_of_the_output_is_the_noise_and_half_the_variance(which, request):
    model, _, denoiser = request.getfixturevalue(which)
    shape = PICTURE if which == "adm" else LATENT
    x, time = noise(shape), torch.tensor(TIMES)
    null = (torch.full((3,), 10),) if which == "dit" else ()
    output = small_phase(model, x, time, *null)
    assert output.shape[1] == 2 * shape[0]
    sigma = torch.from_numpy(denoiser.levels[::-1].copy())[time]
    alpha = torch.sqrt(1 - sigma**2)
    x0_hat, v = denoiser.with_variance(x, sigma)
    eps_hat = (x - alpha.view(-1, 1, 1, 1) * x0_hat.double()) / sigma.view(-1, 1, 1, 1)
    close(v, output[:, shape[0] :])
    # Taken back from D, where it stands beside x: 1/alpha larger in the sum at high noise.
    close(eps_hat, output[:, : shape[0]].double(), 2e-5)
    assert torch.equal(denoiser(x, sigma), x0_hat)


@torch.no_grad()
@pytest.mark.parametrize("which", ["adm", "dit"])
def test_the_library_in_float32_agrees_to_its_own_phase(which, request, tmp_path):
    """Nothing of the library's changed: what float32 loses of t = 900 stays below 1e-3."""
    write = write_unet if which == "adm" else write_dit
    model, denoiser = write(tmp_path), request.getfixturevalue(which)[2]
    shape = PICTURE if which == "adm" else LATENT
    x, time = noise(shape), torch.tensor(TIMES)
    null = (torch.full((3,), 10),) if which == "dit" else ()
    sigma = torch.from_numpy(denoiser.levels[::-1].copy())[time]
    close(denoiser.with_variance(x, sigma)[1], model(x, time, *null).sample[:, shape[0] :], 1e-3)


def test_the_class_is_the_null_class(dit, tmp_path):
    """Another row of the table gives another network; only the last is read."""
    _, folder, denoiser = dit
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    x, sigma = noise(LATENT), torch.tensor([0.3, 0.6, 0.9]).double()
    for row, same in ((0, True), (9, True), (10, False)):
        changed = copy_of(folder, tmp_path / str(row))
        tensors = {name: t.clone() for name, t in weights.items()}
        for name in tensors:
            if "class_embedder" in name:
                tensors[name][row] += 1
        save_file(tensors, changed / "diffusion_pytorch_model.safetensors")
        other = load_denoiser(changed, kind="diffusers_dit", shape=LATENT)(x, sigma)
        assert torch.equal(other, denoiser(x, sigma)) == same


@torch.no_grad()
def test_a_flow_is_diffusers_own_step_to_the_picture(tmp_path):
    """x0 = x_s - s u, in coordinates of the straight path and of unit variance."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = write_dit(tmp_path, scheduler, out_channels=4)
    denoiser = load_denoiser(tmp_path, kind="diffusers_dit", shape=LATENT)
    assert (denoiser.prediction, denoiser.levels[0]) == ("flow", 1.0)
    s = scheduler.sigmas[[1, 400, 990]].double()
    unit = torch.hypot(1 - s, s)
    torch.testing.assert_close(torch.from_numpy(denoiser.levels)[[1, 400, 990]], s / unit, rtol=1e-6, atol=0)
    on_path = noise(LATENT)
    output = small_phase(model, on_path, 1000 * s, torch.full((3,), 10))
    for at, index in enumerate((1, 400, 990)):
        # What it is given it shifts: the plain s whose shifted value is the level.
        scheduler.set_timesteps(sigmas=[(1000 - index) / 1000])
        expected = scheduler.step(output[[at]], scheduler.timesteps[0], on_path[[at]]).prev_sample
        found = denoiser((on_path[[at]].double() / unit[at]).float(), (s / unit)[[at]])
        close(found, expected, 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_is_diffusers_own_preconditioning(tmp_path, prediction):
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_data=0.7, prediction_type=prediction)
    model = write_unet(tmp_path, scheduler, out_channels=3, time_embedding_type="positional")
    denoiser = load_denoiser(tmp_path, kind="diffusers_unet2d", shape=PICTURE)
    ratio = torch.tensor([0.01, 1.0, 60.0]).double()
    exploding = noise(PICTURE).double() * torch.sqrt(ratio**2 + 1).view(-1, 1, 1, 1)
    for at in range(3):
        sample, sigma = exploding[[at]], ratio[at]
        taken = scheduler.precondition_inputs(sample, sigma).float()
        output = small_phase(model, taken, scheduler.precondition_noise(sigma)[None])
        expected = scheduler.precondition_outputs(sample, output.double(), sigma)
        unit = torch.sqrt(1 + sigma**2)
        close(denoiser((sample / unit).float(), (sigma / unit)[None]).double(), expected)
    levels = denoiser.levels / (1 - denoiser.levels**2) ** 0.5
    scheduler.set_timesteps(1000)
    torch.testing.assert_close(torch.from_numpy(levels), scheduler.sigmas[:1000].double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", ["adm", "dit"])
@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 5), (torch.float64, 3)])
def test_batch_mates_change_no_bit_of_value_or_gradient(which, request, dtype, batch):
    denoiser = request.getfixturevalue(which)[2].in_dtype(dtype)
    shape = PICTURE if which == "adm" else LATENT

    def run(x, sigma):
        x = x.detach().requires_grad_()
        denoised = denoiser(x, sigma)
        return denoised.detach(), torch.autograd.grad(denoised.square().sum(), x)[0]

    x, sigma = noise(shape, batch).to(dtype), torch.linspace(0.05, 0.95, batch, dtype=torch.float64)
    order = torch.arange(batch).roll(1)
    strangers, levels = 5 * noise(shape, batch, seed=2).to(dtype), sigma.flip(0).clone()
    strangers[1], levels[1] = x[1], sigma[1]
    for base, permuted, company in zip(run(x, sigma), run(x[order], sigma[order]), run(strangers, levels), strict=True):
        assert torch.equal(permuted, base[order])
        assert torch.equal(company[1], base[1])


@pytest.mark.parametrize("which", ["adm", "dit"])
def test_gradients_are_those_of_finite_differences(which, request):
    exact = request.getfixturevalue(which)[2].in_dtype(torch.float64)
    x = noise(PICTURE if which == "adm" else LATENT, 1).double().requires_grad_()
    sigma = torch.tensor([0.6]).double()
    assert torch.autograd.gradcheck(lambda each: exact(each, sigma).square().mean(), x, fast_mode=True)


def test_a_network_without_a_learned_variance_says_so(tmp_path):
    write_dit(tmp_path, out_channels=4)
    denoiser = load_denoiser(tmp_path, kind="diffusers_dit", shape=LATENT)
    with pytest.raises(ConfigError, match="has learned no variance"):
        denoiser.with_variance(noise(LATENT), torch.full((3,), 0.5).double())


def test_loading_touches_no_global_generator_and_leaves_nothing_unmade(dit):
    before = torch.random.get_rng_state()
    network = load_denoiser(dit[1], kind="diffusers_dit", shape=LATENT).network
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(each.is_meta or each.requires_grad for each in (*network.parameters(), *network.buffers()))
    assert not [name for name in network.state_dict() if "embedding_table" in name]


def copy_of(folder, target):
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("which", "name", "values", "message"),
    [
        ("adm", "scheduler_config.json", {"variance_type": "fixed_large"}, r"out_channels is 6 for 3.*'fixed_large'"),
        ("adm", "scheduler_config.json", {"clip_sample": True, "clip_sample_range": 2.0}, r"clip_sample_range is 2\.0"),
        ("adm", "config.json", {"center_input_sample": True}, "center_input_sample must be False"),
        ("adm", "config.json", {"block_out_channels": [8, 12]}, r"of another shape \(.*instead of"),
        ("dit", "config.json", {"num_layers": 3}, r"missing \(transformer_blocks\.2\."),
        ("dit", "config.json", {"num_layers": 1}, r"not known \(transformer_blocks\.1\."),
        ("dit", "config.json", {"sample_size": 16}, r"sample_size is 16, but .*\[8, 8\]"),
        ("dit", "config.json", {"norm_type": "layer_norm"}, "does not describe a DiTTransformer2DModel"),
        ("dit", "config.json", {"_class_name": "UNet2DModel"}, "allowed: DiTTransformer2DModel"),
        ("dit", "config.json", {"in_channels": 3}, "in_channels must be 4 here, got 3"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(which, name, values, message, request, tmp_path):
    folder = copy_of(request.getfixturevalue(which)[1], tmp_path / "copy")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
    kind, shape = ("diffusers_unet2d", PICTURE) if which == "adm" else ("diffusers_dit", LATENT)
    with pytest.raises(BundleError, match=message):
        load_denoiser(folder, kind=kind, shape=shape)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas is true"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift must be a positive number, got 0"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "cosine"}, "allowed: karras, exponential"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 90.0}, r"sigma_min 90\.0 must be below sigma_max 80\.0"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "allowed: epsilon, v_prediction"),
        ({"num_train_timesteps": 1, "_class_name": "EDMEulerScheduler"}, "2 or more, got 1"),
    ],
)
def test_a_scheduler_that_is_not_known_is_refused(config, message, dit, tmp_path):
    folder = copy_of(dit[1], tmp_path / "copy")
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=message):
        load_denoiser(folder, kind="diffusers_dit", shape=LATENT)


def test_what_a_bundle_says_of_its_prior_and_the_scheduler_are_one(adm):
    _, folder, _ = adm
    same = {"prediction_type": "epsilon", "beta_schedule": "linear", "num_train_timesteps": 1000}
    load_denoiser(folder, kind="diffusers_unet2d", shape=PICTURE, stated=same)
    with pytest.raises(BundleError, match=r"beta_schedule 'squaredcos_cap_v2' .* says 'linear'; they must be one"):
        load_denoiser(
            folder, kind="diffusers_unet2d", shape=PICTURE, stated=same | {"beta_schedule": "squaredcos_cap_v2"}
        )


@torch.no_grad()
def test_the_learned_variance_is_what_diffusers_adds(adm, monkeypatch):
    """One step of DDPMScheduler on the network's whole output with noise 1, less that with noise 0."""
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    from tiltscope.engine.sampler.learned_noise import learned_log_variance

    model, _, denoiser = adm
    t = 2  # where the two bounds are far apart
    scheduler = DDPMScheduler(**LINEAR, variance_type="learned_range", clip_sample=False)
    scheduler.alphas_cumprod = 1 - torch.from_numpy(
        denoiser.levels[::-1] ** 2
    )  # in float32 its beta is good to 1e-2 here
    x = pictures(1)
    output = small_phase(model, x, torch.tensor([t])).double()
    sigma = torch.from_numpy(denoiser.levels[::-1].copy())[[t]]
    plan = make_plan("ddpm_learned_range", steps=1000, levels=denoiser.levels)
    bounds = torch.from_numpy(plan.log_variance[[999 - t]])
    after_step = []
    for value in (0.0, 1.0):
        monkeypatch.setattr(
            scheduling_ddpm, "randn_tensor", lambda shape, value=value, **_: torch.full(shape, value).double()
        )
        after_step.append(scheduler.step(output, t, x.double()).prev_sample)
    found = torch.exp(0.5 * learned_log_variance(denoiser.with_variance(x, sigma)[1].double(), bounds))
    torch.testing.assert_close(found, after_step[1] - after_step[0], rtol=1e-5, atol=0)
    assert float(found.std()) > 0.05 * float(found.mean())


def test_a_prior_of_latents_has_no_pictures_of_its_own(dit):
    prior = Prior.from_network(dit[2], shape=LATENT, name="dit", identity="sha256:0")
    assert not prior.pictures
    assert prior.to_images(noise(LATENT)) is None


@pytest.mark.parametrize("which", ["adm", "dit", "ncsnpp", "edm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wanting_a_gradient_changes_no_bit_of_what_is_denoised(which, dtype, request, tmp_path):
    """So unguided slots may take D from the guided graph of their batch mates (TorchStep.guided_tells_unguided)."""
    if which in ("adm", "dit"):
        denoiser = request.getfixturevalue(which)[2]
    else:
        write_edm(tmp_path / which, EDM2 if which == "edm2" else NCSNPP)
        denoiser = load_denoiser(tmp_path / which, kind="edm", shape=LATENT if which == "edm2" else PICTURE)
    denoiser = denoiser.in_dtype(dtype)
    x = noise(PICTURE if which in ("adm", "ncsnpp") else LATENT, num=5).to(dtype)
    sigma = torch.tensor([0.05, 0.4, 0.8, 0.99, 0.99999]).double()
    with torch.no_grad():
        plain = denoiser(x, sigma)
    wanted = denoiser(x.requires_grad_(), sigma)
    assert wanted.requires_grad
    assert torch.equal(wanted.detach(), plain)
