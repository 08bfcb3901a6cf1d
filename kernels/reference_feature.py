"""The definitions, in plain torch, of the operations between a picture and a feature's activation. See reference.py."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# T of lse pooling; equal to tiltscope.engine.feature.readout's (tests/kernels/test_reference_feature.py).
LSE_TEMPERATURE = 0.2


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
    wide = tokens.to(direction.dtype)
    pre = torch.baddbmm(bias[..., None], direction, wide.transpose(1, 2))
    latent = torch.where(pre > threshold[..., None], pre, torch.zeros_like(pre))
    activation, drive = ((weight * _pool(v, pooling, mask)).sum(-1) for v in (latent, pre))
    return ReadOut(activation, drive, pre)


def _pool(
    v: Float[Tensor, "batch rows tokens"],
    pooling: Float[Tensor, "batch rows 3"],
    mask: Bool[Tensor, "batch rows tokens"],
) -> Float[Tensor, "batch rows"]:
    lowest = torch.finfo(v.dtype).min / 4
    count = mask.sum(-1).clamp(min=1)
    top = v.masked_fill(~mask, lowest).amax(-1)
    mean = v.masked_fill(~mask, 0.0).sum(-1) / count
    excess = ((v - top[..., None]) / LSE_TEMPERATURE).masked_fill(~mask, lowest)
    lse = top + LSE_TEMPERATURE * (torch.exp(excess).sum(-1) / count).log()
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
    latent = torch.where(above, pre, torch.zeros_like(pre))
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
