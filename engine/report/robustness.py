"""Does a feature still fire on a picture after what happens to pictures: JPEG, a smaller copy, noise?

    robustness = (mean activation of the changed pictures - natural mean) / (mean of the pictures - natural mean)

1: nothing is lost; 0: the changed pictures are as any natural one. What was made for one pixel grid alone loses most. Knows
pictures and features; knows no sampler.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.sampler.noise import STREAM_ROBUSTNESS, normal

JPEG_QUALITY = 50
RESIZE = 0.5
NOISE_SD = 0.1
CHANGES = ("jpeg", "resize", "noise")


def robustness(
    feature: Feature, x0: Float[Tensor, "num 3 height width"], *, natural_mean: float
) -> dict[str, float | None]:
    """Of each of CHANGES: the share of the activation above `natural_mean` that is left; None where there was none.

    jpeg: quality 50. resize: to half the side and back, bilinear, antialiased. noise: of standard deviation .1, the picture's
    range being 2; one noise for every picture. Pictures are clipped to [-1, 1] first, as any file would.
    """
    x0 = x0.clamp(-1, 1)
    with torch.no_grad():
        reached = float(feature.activation(x0).double().mean()) - natural_mean
        if reached <= 0:
            return dict.fromkeys(CHANGES)
        means = {name: float(feature.activation(changed(x0, name)).double().mean()) for name in CHANGES}
    return {name: (mean - natural_mean) / reached for name, mean in means.items()}


def changed(x0: Float[Tensor, "num 3 height width"], name: str) -> Float[Tensor, "num 3 height width"]:
    """The pictures after one of CHANGES, in [-1, 1]."""
    if name == "jpeg":
        return torch.stack([_through_jpeg(each) for each in x0])
    if name == "resize":
        small = F.interpolate(x0, scale_factor=RESIZE, mode="bilinear", antialias=True)
        return F.interpolate(small, size=tuple(x0.shape[-2:]), mode="bilinear", antialias=True).clamp(-1, 1)
    noise = torch.from_numpy(normal(0, 0, 0, STREAM_ROBUSTNESS, shape=tuple(x0.shape[1:]))).to(x0.dtype)
    return (x0 + NOISE_SD * noise).clamp(-1, 1)


def _through_jpeg(x0: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
    pixels = ((x0 + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    with Image.open(file) as opened:
        back = np.asarray(opened.convert("RGB")).copy()
    return (torch.from_numpy(back).permute(2, 0, 1).to(x0.dtype) / 127.5 - 1).contiguous()
