"""Tiny networks with random weights, each saved in its real format by the library that owns it: what the loaders are held to.

Each `write_*` fills a folder and returns the library's own model, whose forward is the reference.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 64


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and of order one: a library's own start (0.02, or zeros) would hide a wrong layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim < 2 and ("norm" in name or name.endswith(("gamma", "lambda1"))) and not name.endswith("bias"):
                p.copy_(1 + 0.2 * noise)
            elif p.ndim < 2:
                p.copy_(0.1 * noise)
            else:
                p.copy_(noise * (1.5 / p[0].numel()) ** 0.5)
    return module.eval().requires_grad_(False)


def pictures(num: int = 3, side: int = SIDE, seed: int = 1, channels: int = 3) -> Tensor:
    """Beyond [-1, 1] too, as estimates are."""
    return 2.4 * torch.rand(num, channels, side, side, generator=torch.Generator().manual_seed(seed)) - 1.2


def _made(kind: Any, *args: Any, **values: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        return kind(*args, **values)


def write_preprocessor(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))


CONVNEXT = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 2, 3, 1], "image_size": SIDE}


def write_convnext(folder: Path, **changes: Any) -> Any:
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

    model = fill(_made(DINOv3ConvNextModel, DINOv3ConvNextConfig(**(CONVNEXT | changes))))
    model.save_pretrained(folder)
    write_preprocessor(folder)
    return model


VIT = {
    "image_size": SIDE,
    "patch_size": 16,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_register_tokens": 4,
}


def write_vit(folder: Path, **changes: Any) -> Any:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    model = fill(_made(DINOv3ViTModel, DINOv3ViTConfig(**(VIT | changes))))
    model.save_pretrained(folder)
    write_preprocessor(folder)
    return model


def normalised(x0: Tensor) -> Tensor:
    """What transformers' models take."""
    mean, std = (torch.tensor(v, dtype=x0.dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((x0 + 1) / 2 - mean) / std
