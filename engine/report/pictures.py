"""Pictures as bytes: PNG, the grid, and where a feature fires.

The same picture gives the same bytes (nothing of time, machine or path goes into them). Knows arrays only; the page and the
writer decide where they go.
"""

import base64
import io
import math

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

GRID_LIMIT = 64
# Blue-violet at low, crimson at high heat: apart from the warm colours of most pictures, and told apart by lightness alone.
_RAMP = np.array([[60, 30, 140], [150, 20, 130], [215, 20, 70]], np.float64)
_NEGATIVE = np.array([0, 120, 150], np.float64)
_STRONGEST_ALPHA = 0.8
_AREAS = ("upper", "", "lower"), ("left", "", "right")


def to_array(image: UInt8[Tensor, "3 height width"]) -> UInt8[ndarray, "height width 3"]:
    """A picture as numpy has it, channels last."""
    return np.ascontiguousarray(image.detach().cpu().numpy().transpose(1, 2, 0))


def encode_png(pixels: UInt8[ndarray, "height width channels"]) -> bytes:
    """A PNG of RGB or RGBA pixels: lossless, without any ancillary chunk, the same bytes for the same pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=9)
    return file.getvalue()


def decode_png(content: bytes) -> UInt8[ndarray, "height width 3"]:
    """RGB pixels of a PNG."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def data_uri(png: bytes) -> str:
    """A PNG inside a page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def grid(pictures: list[UInt8[ndarray, "height width 3"]]) -> UInt8[ndarray, "grid_height grid_width 3"]:
    """The first 64 pictures, all of one size, in rows of 4 (8 beyond 16) on white; small ones enlarged by a whole factor.

    Each pixel becomes a square of pixels: nothing is interpolated, so the grid shows what was sampled.
    """
    shown = pictures[:GRID_LIMIT]
    height, width, _ = shown[0].shape
    scale = max(1, 128 // max(height, width))
    gap = max(2, scale * max(height, width) // 16)
    columns = min(len(shown), 4 if len(shown) <= 16 else 8)
    rows = math.ceil(len(shown) / columns)
    tall, wide = height * scale, width * scale
    canvas = np.full((rows * (tall + gap) + gap, columns * (wide + gap) + gap, 3), 255, np.uint8)
    for at, picture in enumerate(shown):
        top, left = gap + at // columns * (tall + gap), gap + at % columns * (wide + gap)
        canvas[top : top + tall, left : left + wide] = picture.repeat(scale, 0).repeat(scale, 1)
    return canvas


def reduce(pixels: UInt8[ndarray, "height width 3"], *, longest: int) -> UInt8[ndarray, "_ _ 3"]:
    """The picture with its longer side at most `longest`; smaller ones as they are."""
    height, width, _ = pixels.shape
    if max(height, width) <= longest:
        return pixels
    size = round(width * longest / max(height, width)), round(height * longest / max(height, width))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def heat_pixels(heat: Float[ndarray, "grid_h grid_w"], *, largest: float) -> UInt8[ndarray, "grid_h grid_w 4"]:
    """One RGBA pixel a patch, to be laid over the picture: opacity is |heat| / largest.

    Patches keep their edges when a browser enlarges them: the map has no finer detail than that. heat and largest are in units
    of activation; negative heat (features with negative weight) is teal. Values that are not finite are transparent.
    """
    share = np.nan_to_num(
        heat.astype(np.float64) / largest if largest > 0 else np.zeros(heat.shape), posinf=0, neginf=0
    )
    share = share.clip(-1, 1)
    strength = np.abs(share)
    place = strength * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    part = (place - low)[..., None]
    colour = _RAMP[low] * (1 - part) + _RAMP[low + 1] * part
    colour = np.where(share[..., None] < 0, _NEGATIVE, colour)
    # The square root: a patch at a quarter of the strongest is still seen.
    alpha = 255 * _STRONGEST_ALPHA * np.sqrt(strength)
    return np.concatenate([colour, alpha[..., None]], -1).round().astype(np.uint8)


def heat_ramp() -> UInt8[ndarray, "1 64 4"]:
    """The key to heat_pixels: from 0 to `largest`, left to right."""
    return heat_pixels(np.linspace(0, 1, 64)[None], largest=1.0)


def strongest_area(heat: Float[ndarray, "grid_h grid_w"]) -> str | None:
    """Where on the picture the strongest patch lies, in words: "upper left", "centre"; None where nothing fires."""
    strength = np.abs(np.nan_to_num(heat, posinf=0, neginf=0))
    if not strength.any():
        return None
    y, x = np.unravel_index(int(strength.argmax()), strength.shape)
    words = [names[3 * int(at) // length] for names, at, length in zip(_AREAS, (y, x), strength.shape, strict=True)]
    return " ".join(filter(None, words)) or "centre"
