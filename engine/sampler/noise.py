"""The counter-based noise of every sample: Philox4x32-10 and its normals, defined in numpy.

This file is the definition; `tiltscope.kernels` restates it for devices. It knows nothing of solvers or networks, so an
embedding without torch draws the very same numbers.

    counter = (element // 4, row, stream | particle << 16, index)        four 32-bit words
    key     = (low, high) 32-bit word of the 64-bit seed
    u_k     = (word_k + 0.5) * 2^-32                                       in the state's dtype
    z_0, z_1, z_2, z_3 = r(u_0) cos(2 pi u_1), r(u_0) sin(2 pi u_1), r(u_2) cos(2 pi u_3), r(u_2) sin(2 pi u_3)
    r(u)    = sqrt(-2 ln u)

`element` counts one logical [channel, height, width] sample in C order; elements 4k..4k+3 share one counter.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller 1958.
The known-answer vectors of that paper are checked in tests/sampler/test_noise.py.
"""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

STREAM_START = 0
STREAM_STEP = 1
STREAM_RESAMPLING = 2
STREAM_POOL = 3  # the order in which hard truncation draws from the pool
STREAM_ACTMAX = 4  # starts and transforms of activation maximisation
STREAM_ROBUSTNESS = 5  # the noise of a metric
STREAM_PROBE = 6  # probes of a divergence, and the noise that starts a likelihood
STREAM_LIFT = 16  # 16 + i: the i-th draw of a lift

# Draws that calibrate lambda when a prior comes with no pool live above every index a user can ask for.
CALIBRATION_INDEX = 2**31
MAX_INDEX = 2**31
MAX_SEED = 2**64

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def seed_key(seed: int) -> tuple[int, int]:
    """The generator's key: (low, high) 32-bit word of a seed in [0, 2^64)."""
    return seed & _LOW, seed >> 32


def philox(
    counter: tuple[NDArray[Any] | int, NDArray[Any] | int, NDArray[Any] | int, NDArray[Any] | int],
    key: tuple[NDArray[Any] | int, NDArray[Any] | int],
) -> NDArray[np.uint32]:
    """Philox4x32-10 of broadcastable counter and key words -> uint32 [4, ...]."""
    low = np.uint64(_LOW)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, np.uint64) for word in key)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & low, (k1 + np.uint64(_WEYL[1])) & low
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3)).astype(np.uint32)


def uniform(words: NDArray[np.uint32], dtype: Any = np.float64) -> NDArray[Any]:
    """(word + 0.5) * 2^-32, computed in `dtype`; in (0, 1], and below 1 in float64."""
    kind = np.dtype(dtype).type
    return (words.astype(dtype) + kind(0.5)) * kind(2.0**-32)


def normal(
    seed: int,
    index: int,
    row: int,
    stream: int,
    *,
    shape: tuple[int, ...],
    particle: int = 0,
    dtype: Any = np.float64,
) -> NDArray[Any]:
    """Standard normals [*shape] of one sample: the picture's own noise, whatever it is batched with."""
    count = prod(shape)
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    u0, u1, u2, u3 = uniform(philox((blocks, row, stream | particle << 16, index), seed_key(seed)), dtype)
    kind = np.dtype(dtype).type
    turn, minus_two = kind(2 * np.pi), kind(-2)
    first, second = np.sqrt(minus_two * np.log(u0)), np.sqrt(minus_two * np.log(u2))
    z = np.stack(
        (first * np.cos(turn * u1), first * np.sin(turn * u1), second * np.cos(turn * u3), second * np.sin(turn * u3)),
        axis=-1,
    )
    return z.reshape(-1)[:count].reshape(shape)
