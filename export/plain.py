"""Functions of torch.nn.functional in plain operators, where what stock leaves of them cannot be differentiated or runs slowly.

    nearest upsampling     expand and reshape, whose derivative is a plain sum; stock: index_put with "add"
    attention              softmax(q k' scale) v in products of three dimensions, which engines make one with the scale and the
                           transposition; stock scales q and k' by a root each, two copies

They take the stock functions' place in their module, for whoever calls them there. What they do not cover is stock's.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltscope.engine.batch_invariant import attend


@contextmanager
def plain_functions() -> Generator[None]:
    """For a trace: while it lasts, torch.nn.functional has the functions above."""
    stock = F.interpolate, F.scaled_dot_product_attention
    F.interpolate, F.scaled_dot_product_attention = _upsampling(stock[0]), _attention(stock[1])
    try:
        yield
    finally:
        F.interpolate, F.scaled_dot_product_attention = stock


def _upsampling(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By a whole factor, nearest."""

    def interpolate(
        input: Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        **rest: Any,
    ) -> Tensor:
        factor = scale_factor if isinstance(scale_factor, int | float) else None
        if mode != "nearest" or size is not None or factor is None or factor != int(factor) or input.ndim != 4:
            return stock(input, size, scale_factor, mode, align_corners, **rest)
        n, channels, height, width = input.shape
        f = int(factor)
        wide = input[:, :, :, None, :, None].expand(n, channels, height, f, width, f)
        return wide.reshape(n, channels, height * f, width * f)

    return interpolate


def _attention(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """[batch, heads, tokens, width], without a mask or broadcasting; float32 or float64, as in half precision stock computes in
    float32."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        more = attn_mask is not None or dropout_p or is_causal or enable_gqa
        alike = query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
        if more or not alike or query.dtype not in (torch.float32, torch.float64):
            return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        q, k, v = (each.flatten(0, 1) for each in (query, key, value))
        return attend(q, k, v, query.shape[-1] ** -0.5 if scale is None else scale).unflatten(0, query.shape[:2])

    return attention
