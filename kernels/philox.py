"""Philox4x32-10 normals in torch tensor operations: `tiltscope.engine.sampler.noise` restated for a batch of slots.

Words are held in int64, whose products wrap modulo 2^64: masking after the shift gives the unsigned halves exactly, so the
words are equal to numpy's bit for bit (tests/kernels/test_philox.py) on any device.
"""

from math import prod

import torch
from jaxtyping import Int
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
_TURN = 6.283185307179586


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words (int64, each in [0, 2^32)) of broadcastable counter and key words."""
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(
    key: Int[Tensor, "batch 2"],
    index: Int[Tensor, "batch"],
    row: Int[Tensor, "batch"],
    *,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """One uniform number in (0, 1] a slot, [batch]: the first word of element 0, particle 0."""
    zero = torch.zeros_like(index)
    word = philox(zero, row.long(), zero + stream, index.long(), key[:, 0], key[:, 1])[0]
    return (word.to(dtype) + 0.5) * 2.0**-32


def normal(
    key: Int[Tensor, "batch 2"],
    index: Int[Tensor, "batch"],
    row: Int[Tensor, "batch"],
    particle: Int[Tensor, "batch"],
    *,
    stream: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Standard normals [batch, *shape]; slot i's depend on (key, index, row, particle)[i] and the stream alone."""
    count = prod(shape)
    blocks = torch.arange(-(-count // 4), device=key.device)
    words = philox(
        blocks[None, :],
        row.long()[:, None],
        (stream | particle.long() << 16)[:, None],
        index.long()[:, None],
        key[:, 0, None],
        key[:, 1, None],
    )
    u0, u1, u2, u3 = ((word.to(dtype) + 0.5) * 2.0**-32 for word in words)
    first, second = torch.sqrt(-2 * torch.log(u0)), torch.sqrt(-2 * torch.log(u2))
    z = torch.stack(
        (
            first * torch.cos(_TURN * u1),
            first * torch.sin(_TURN * u1),
            second * torch.cos(_TURN * u3),
            second * torch.sin(_TURN * u3),
        ),
        dim=-1,
    )
    return z.flatten(1)[:, :count].reshape(-1, *shape)
