"""The prior's network: a UNet on pixel_unshuffle(4) of the 64x64 picture that predicts x0, its levels and its files."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from tiltscope.engine.prior.levels import alpha_bars

UNSHUFFLE = 4


def build_unet() -> UNet2DModel:
    """The architecture that later sittings warm-start from: 3.9 M parameters."""
    return UNet2DModel(
        sample_size=16, in_channels=48, out_channels=48, block_out_channels=(64, 96, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False
    )


def level_angles(scheduler: DDPMScheduler) -> np.ndarray:
    """float64 [1000]: theta_t = atan2(sigma, alpha) of every level, from the engine's own reading of the schedule."""
    bars = alpha_bars(dict(scheduler.config))
    return np.arctan2(np.sqrt(1 - bars), np.sqrt(bars))


def denoise(unet: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """x [n, 3, 64, 64] at levels t [n] -> x0_hat of the same shape."""
    return F.pixel_shuffle(unet(F.pixel_unshuffle(x, UNSHUFFLE), t, return_dict=False)[0], UNSHUFFLE)


def load_unet(folder: Path) -> UNet2DModel:
    """An exported prior in float32."""
    return UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).float()


def export(average: UNet2DModel, folder: Path) -> None:
    """The EMA in float16 with its scheduler: what the bundle ships, and what `UNet2DModel.from_pretrained` loads."""
    copy.deepcopy(average).half().save_pretrained(folder)
    build_scheduler().save_pretrained(folder)
