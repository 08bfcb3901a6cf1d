"""The teacher of the prior's last sitting: its formula, where it stays silent, and that the trainer learns from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from autoguidance import Autoguided, share
from prior_network import build_scheduler, level_angles
from torch import Tensor, nn
from train_prior import Config, autoguided, loss_of

LEVELS = (400.0, 600.0)


class Scaled(nn.Module):
    """A network that answers `scale` times its input and remembers the levels it was asked at."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        self.asked.append(t)
        return (self.scale * x,)


def pictures(n: int) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def test_share_rises_smoothly_between_its_levels() -> None:
    t = torch.tensor([0.0, 400.0, 450.0, 500.0, 600.0, 999.0])
    torch.testing.assert_close(share(t, *LEVELS), torch.tensor([0.0, 0.0, 0.15625, 0.5, 1.0, 1.0]))


def test_the_answer_is_the_networks_moved_away_from_the_early_ones() -> None:
    teach = Autoguided(Scaled(0.5), Scaled(0.25), weight=2.0, levels=LEVELS)
    x = pictures(3)
    answer = teach(x, torch.tensor([100.0, 500.0, 900.0]))
    # .5 + w (.5 - .25), w = 0, 1, 2
    torch.testing.assert_close(answer, torch.tensor([0.5, 0.75, 1.0])[:, None, None, None] * x)
    assert not answer.requires_grad


@pytest.mark.parametrize(("levels", "asked"), [([100.0, 500.0, 900.0], [500.0, 900.0]), ([0.0, 400.0], None)])
def test_the_early_network_is_called_on_guided_levels_alone(levels: list[float], asked: list[float] | None) -> None:
    early = Scaled(0.25)
    Autoguided(Scaled(0.5), early, weight=2.0, levels=LEVELS)(pictures(len(levels)), torch.tensor(levels))
    assert [t.tolist() for t in early.asked] == ([] if asked is None else [asked])


class Mixed(nn.Conv2d):
    """A network whose one operation autocast would round."""

    def __init__(self) -> None:
        super().__init__(48, 48, 1)

    def forward(self, x: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (super().forward(x),)


def test_the_teacher_is_not_rounded_where_its_pupil_is() -> None:
    torch.manual_seed(0)
    teach = Autoguided(Mixed(), Mixed(), weight=2.0, levels=LEVELS)
    x, t = pictures(2), torch.tensor([500.0, 900.0])
    with torch.autocast("cpu", torch.bfloat16):
        answer = teach(x, t)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, teach(x, t), rtol=0, atol=0)


def test_a_network_that_answers_as_its_teacher_has_no_loss() -> None:
    angles, config = level_angles(build_scheduler()), Config()

    def loss(scale: float, weight: float) -> float:
        teach = Autoguided(Scaled(0.5), Scaled(0.25), weight=weight, levels=LEVELS)
        return loss_of(Scaled(scale), pictures(8), angles, config, torch.Generator().manual_seed(4), teach)[0].item()

    assert loss(0.5, 0.0) == 0
    assert loss(0.5, 1.5) > 1e-3
    assert np.isclose(loss(0.75, 0.0), loss(0.25, 0.0), rtol=1e-5)


def test_a_sitting_without_weights_to_start_from_is_refused(tmp_path) -> None:
    with pytest.raises(SystemExit, match="--warm-start"):
        autoguided(Config(early=tmp_path))
