"""The definitions, in plain torch, of the operations between a picture and a feature's activation. See reference.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

LSE_TEMPERATURE = 0.2  # T of lse pooling


class ReadOut(NamedTuple):
    """What a readout returns. pre is kept for its own VJP."""

    activation: Float[Tensor, "batch"]
    drive: Float[Tensor, "batch"]
    pre: Float[Tensor, "batch rows tokens"]


def readout(
    tokens: Float[Tensor, "batch tokens width"],
    direction: Float[Tensor, "batch rows width"],
    bias: Float[Tensor, "batch rows"],
    threshold: Float[Tensor, "batch rows"],
    weight: Float[Tensor, "batch rows"],
    pooling: Float[Tensor, "batch rows 3"],
    mask: Bool[Tensor, "batch rows tokens"],
) -> ReadOut:
    """A signed sum of K pooled rows.

        pre_kn     = direction_k . token_n + bias_k
        latent_kn  = pre_kn where pre_kn > threshold_k, else 0
        activation = sum_k weight_k pool_k(latent_k)       drive = sum_k weight_k pool_k(pre_k)
        pool_k(v)  = m_k0 max(v) + m_k1 mean(v) + m_k2 lse(v) over the tokens of mask_k;  lse(v) = T log mean exp(v / T)

    tokens may be of a lower precision: they are widened first. At least one token a row is in the mask. The published mix over
    the central half is m = (.7, .3, 0) with its mask. Reads the tokens once a row, K N d multiply-adds: bound by memory
    bandwidth for the few rows a feature has.
    """
    pre = sae_rows(tokens, direction, bias, (1, tokens.shape[1]))
    return pooled(pre, threshold, weight, pooling, mask)


def sae_rows(
    tokens: Float[Tensor, "batch tokens width"],
    direction: Float[Tensor, "batch rows width *window"],
    bias: Float[Tensor, "batch rows"],
    grid: tuple[int, int],
) -> Float[Tensor, "batch rows tokens"]:
    """K rows of an encoder at every token: linear, or a convolution whose windows [h, w], both odd, lie on the grid (gh, gw).

        pre_kn = direction_k . token_n + bias_k
        pre_kn = sum_yx direction_kyx . token_(n + yx - centre) + bias_k            tokens beyond the grid are zero

    tokens may be of a lower precision: they are widened first. Of the published encoder
    K of 12,288 rows are evaluated: K N d h w multiply-adds. One product a sample, so that batch mates cannot
    change its rounding. Reads the tokens and the K d h w numbers of the directions, writes K N: bound by memory bandwidth for the
    few rows of a feature.
    """
    tokens = tokens.to(direction.dtype)
    if direction.dim() == 3:
        return torch.baddbmm(bias[..., None], direction, tokens.transpose(1, 2))
    b, k, d, height, width = direction.shape
    # Every tap's row at every token, then shifted and summed: K h w numbers a token, where gathering windows takes d h w.
    taps = direction.permute(0, 1, 3, 4, 2).reshape(b, k * height * width, d)
    gh, gw = grid
    maps = torch.bmm(taps, tokens.transpose(1, 2)).reshape(b, k, height, width, gh, gw)
    up, left = height // 2, width // 2
    maps = F.pad(maps, [left, left, up, up])
    rows = _sum([maps[:, :, y, :, y : y + gh] for y in range(height)])  # [b, K, width, gh, gw + 2 left]
    summed = _sum([rows[:, :, x, :, x : x + gw] for x in range(width)])  # [b, K, gh, gw]
    return summed.flatten(2) + bias[..., None]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def sae_rows_vjp(
    pre_bar: Float[Tensor, "batch rows tokens"],
    direction: Float[Tensor, "batch rows width *window"],
    grid: tuple[int, int],
    dtype: torch.dtype,
) -> Float[Tensor, "batch tokens width"]:
    """The cotangent of the tokens, in `dtype`:

        token_bar_n = sum_kyx pre_bar_k(n - yx + centre) direction_kyx            beyond the grid no pre-activation is

    Writes the tokens' cotangent once: bound by memory bandwidth.
    """
    if direction.dim() == 3:
        return torch.bmm(pre_bar.transpose(1, 2), direction).to(dtype)
    b, k, d, height, width = direction.shape
    gh, gw = grid
    up, left = height // 2, width // 2
    maps = F.pad(pre_bar.reshape(b, k, gh, gw), [left, left, up, up])
    shifted = [
        maps[:, :, 2 * up - y : 2 * up - y + gh, 2 * left - x : 2 * left - x + gw]
        for y in range(height)
        for x in range(width)
    ]
    each = torch.stack(shifted, 2).reshape(b, k * height * width, gh * gw)
    taps = direction.permute(0, 1, 3, 4, 2).reshape(b, k * height * width, d)
    return torch.bmm(each.transpose(1, 2), taps).to(dtype)


def pooled(
    pre: Float[Tensor, "batch rows tokens"],
    threshold: Float[Tensor, "batch rows"],
    weight: Float[Tensor, "batch rows"],
    pooling: Float[Tensor, "batch rows 3"],
    mask: Bool[Tensor, "batch rows tokens"],
) -> ReadOut:
    """`readout` of pre-activations that are there already."""
    latent = threshold_latents(pre, threshold)
    activation, drive = ((weight * pool(v, pooling, mask)).sum(-1) for v in (latent, pre))
    return ReadOut(activation, drive, pre)


def threshold_latents(
    pre: Float[Tensor, "batch rows tokens"], threshold: Float[Tensor, "#batch rows"]
) -> Float[Tensor, "batch rows tokens"]:
    """pre where pre > threshold, else 0."""
    return torch.where(pre > threshold[..., None], pre, torch.zeros_like(pre))


def pool(
    values: Float[Tensor, "batch rows tokens"],
    pooling: Float[Tensor, "batch rows 3"],
    mask: Bool[Tensor, "batch rows tokens"],
) -> Float[Tensor, "batch rows"]:
    """m_0 max + m_1 mean + m_2 lse over the tokens of `mask`. The gradient at a tie of the maximum is shared equally.

    Masked tokens are filled with a finite number, never -inf: -inf * 0 in the backward pass would be NaN.
    """
    lowest = torch.finfo(values.dtype).min / 4
    count = mask.sum(dim=-1).clamp(min=1)
    top = values.masked_fill(~mask, lowest).amax(dim=-1)
    mean = values.masked_fill(~mask, 0.0).sum(dim=-1) / count
    # Shifted by the maximum so that exp cannot overflow; the shift is a constant of the derivative (it cancels).
    shift = top.detach()
    excess = ((values - shift[..., None]) / LSE_TEMPERATURE).masked_fill(~mask, lowest)
    lse = shift + LSE_TEMPERATURE * (torch.exp(excess).sum(dim=-1) / count).log()
    return pooling[..., 0] * top + pooling[..., 1] * mean + pooling[..., 2] * lse


def readout_vjp(
    activation_bar: Float[Tensor, "batch"],
    drive_bar: Float[Tensor, "batch"],
    pre: Float[Tensor, "batch rows tokens"],
    direction: Float[Tensor, "batch rows width"],
    threshold: Float[Tensor, "batch rows"],
    weight: Float[Tensor, "batch rows"],
    pooling: Float[Tensor, "batch rows 3"],
    mask: Bool[Tensor, "batch rows tokens"],
    dtype: torch.dtype,
) -> Float[Tensor, "batch tokens width"]:
    """The cotangent of the tokens, in `dtype`, of cotangents of activation and drive.

        token_bar_n = sum_k weight_k s_kn direction_k
        s_kn        = activation_bar slope_kn(latent) [pre_kn > threshold_k] + drive_bar slope_kn(pre)
        slope_n(v)  = m_0 [v_n = max] / ties + m_1 / count + m_2 exp(v_n / T) / sum exp(v / T), 0 outside the mask

    Writes the tokens' cotangent once: bound by memory bandwidth.
    """
    above = pre > threshold[..., None]
    latent = threshold_latents(pre, threshold)
    through_latent = torch.where(above, _slope(latent, pooling, mask), torch.zeros_like(pre))
    share = activation_bar[:, None, None] * through_latent + drive_bar[:, None, None] * _slope(pre, pooling, mask)
    return torch.bmm((weight[..., None] * share).transpose(1, 2), direction).to(dtype)


def _slope(
    v: Float[Tensor, "batch rows tokens"],
    pooling: Float[Tensor, "batch rows 3"],
    mask: Bool[Tensor, "batch rows tokens"],
) -> Float[Tensor, "batch rows tokens"]:
    lowest = torch.finfo(v.dtype).min / 4
    top = v.masked_fill(~mask, lowest).amax(-1, keepdim=True)
    highest = (v == top) & mask
    ratio = torch.exp(((v - top) / LSE_TEMPERATURE).masked_fill(~mask, lowest))
    shares = (
        highest.to(v.dtype) / highest.sum(-1, keepdim=True),
        mask.to(v.dtype) / mask.sum(-1, keepdim=True).clamp(min=1),
        ratio / ratio.sum(-1, keepdim=True),
    )
    return sum((pooling[..., at, None] * share for at, share in enumerate(shares)), torch.zeros_like(v))
