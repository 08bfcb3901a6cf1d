"""An interrupted training continues bit for bit; the schedule and the stored form of the autoencoder say what their
formulas say.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from train_sae import Autoencoder, normal_form, whitening
from training import Clock, Muon, MuonAndAdamW, learning_rate, load_checkpoint, save_checkpoint, update_ema


def make(kind: str) -> tuple[dict[str, nn.Module], torch.optim.Optimizer | MuonAndAdamW, torch.Generator]:
    torch.manual_seed(3)
    model = nn.Linear(4, 4)
    modules: dict[str, nn.Module] = {"model": model, "average": copy.deepcopy(model)}
    settings = {"lr": 0.1, "weight_decay": 0.01}
    adamw = torch.optim.AdamW(model.parameters(), **settings)
    optimiser = MuonAndAdamW(model, betas=(0.9, 0.99), **settings) if kind == "muon" else adamw
    return modules, optimiser, torch.Generator().manual_seed(5)


def train(
    modules: dict[str, nn.Module],
    optimiser: torch.optim.Optimizer | MuonAndAdamW,
    generator: torch.Generator,
    steps: int,
) -> None:
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator) + torch.randn(8, 4)  # both random states matter
        loss = (modules["model"](x) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        update_ema(modules["average"], modules["model"], 0.9)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    modules, optimiser, generator = make(kind)
    train(modules, optimiser, generator, 2)
    save_checkpoint(tmp_path / "c.pt", modules=modules, optimiser=optimiser, generator=generator, facts={"step": 2})
    train(modules, optimiser, generator, 2)

    again, optimiser_again, generator_again = make(kind)
    torch.manual_seed(99)
    facts = load_checkpoint(tmp_path / "c.pt", modules=again, optimiser=optimiser_again, generator=generator_again)
    train(again, optimiser_again, generator_again, 2)

    assert facts == {"step": 2}
    for name, module in modules.items():
        for a, b in zip(module.parameters(), again[name].parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_kernel_steps_along_the_orthogonal_factor_of_its_gradient() -> None:
    """Muon: every singular value of a convolution's step is about the same, whatever the gradient's are; biases are AdamW's."""
    torch.manual_seed(0)
    model = nn.Conv2d(16, 6, 3)
    kernel, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimiser = MuonAndAdamW(model, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    optimiser.zero_grad()
    (model(torch.randn(2, 16, 8, 8)) * torch.linspace(1, 9, 6)[:, None, None]).square().mean().backward()
    optimiser.step()
    values = torch.linalg.svdvals((model.weight.detach() - kernel).flatten(1))
    gradient = torch.linalg.svdvals(model.weight.grad.flatten(1))
    assert values.max() / values.min() < 3 < gradient.max() / gradient.min()
    torch.testing.assert_close(values.mean(), torch.tensor(0.1 * 0.2 * 144**0.5), rtol=0.3, atol=0.0)
    torch.testing.assert_close((model.bias.detach() - bias).abs(), torch.full((6,), 0.1), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("shape", [(6, 144), (40, 12)])
def test_muon_steps_as_torchs_own_does_to_its_half_precision(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.5}
    optimisers = Muon([ours], **settings), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.02 * (1 - theirs.detach()).abs().max().item())


def test_the_rate_warms_up_holds_and_decays_over_the_last_third() -> None:
    def at(share: float, step: int = 1000) -> float:
        return learning_rate(1.0, share=share, step=step, warmup=10)

    assert at(0.0, step=4) == 0.5
    assert at(0.3) == at(0.66) == 1.0
    assert 0.4 < at(5 / 6) < 0.6
    assert at(1.0) == pytest.approx(0.02)


def test_the_clock_counts_earlier_sittings() -> None:
    assert Clock(100.0, before=50.0).share == pytest.approx(0.5, abs=0.01)


def test_the_stored_autoencoder_is_the_trained_one_in_the_tokens_own_units() -> None:
    torch.manual_seed(0)
    model = Autoencoder(6, 10, torch.randn(10, 6))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    tokens = torch.randn(50, 6) @ torch.randn(6, 6) + 1
    threshold, (mean, whiten) = 0.4, whitening(tokens, 0.1)
    pre = model.pre((tokens - mean) @ whiten)
    whitened = torch.where(pre > threshold, pre, 0.0) @ model.decoder + model.decoder_bias
    expected = whitened @ torch.linalg.inv(whiten) + mean

    stored = normal_form(model, mean, whiten, threshold)
    own = tokens @ stored["encoder.weight"].T + stored["encoder.bias"]
    latents = torch.where(own > stored["threshold"], own, 0.0)
    gain = stored["threshold"] / threshold
    torch.testing.assert_close(own / gain, pre, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stored["decoder.weight"].norm(dim=1), torch.ones(10))
    torch.testing.assert_close(
        latents @ stored["decoder.weight"] + stored["decoder.bias"], expected, rtol=1e-4, atol=1e-4
    )
