"""An interrupted training continues bit for bit; the schedule and the stored form of the autoencoder say what their
formulas say.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from train_sae import Autoencoder, normal_form, whitening
from training import Clock, learning_rate, load_checkpoint, save_checkpoint, update_ema


def make() -> tuple[dict[str, nn.Module], torch.optim.Optimizer, torch.Generator]:
    torch.manual_seed(3)
    model = nn.Linear(4, 4)
    modules = {"model": model, "average": copy.deepcopy(model)}
    return modules, torch.optim.AdamW(model.parameters(), lr=0.1), torch.Generator().manual_seed(5)


def train(
    modules: dict[str, nn.Module], optimiser: torch.optim.Optimizer, generator: torch.Generator, steps: int
) -> None:
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator) + torch.randn(8, 4)  # both random states matter
        loss = (modules["model"](x) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        update_ema(modules["average"], modules["model"], 0.9)


def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path) -> None:
    modules, optimiser, generator = make()
    train(modules, optimiser, generator, 2)
    save_checkpoint(tmp_path / "c.pt", modules=modules, optimiser=optimiser, generator=generator, facts={"step": 2})
    train(modules, optimiser, generator, 2)

    again, optimiser_again, generator_again = make()
    torch.manual_seed(99)
    facts = load_checkpoint(tmp_path / "c.pt", modules=again, optimiser=optimiser_again, generator=generator_again)
    train(again, optimiser_again, generator_again, 2)

    assert facts == {"step": 2}
    for name, module in modules.items():
        for a, b in zip(module.parameters(), again[name].parameters(), strict=True):
            assert torch.equal(a, b)


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
