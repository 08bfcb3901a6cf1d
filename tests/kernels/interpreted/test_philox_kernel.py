"""The generator's device functions: words bit for bit, normals to a few units in the last place."""

import numpy as np
import torch
import triton
import triton.language as tl
from kernel_cases import normal_of_float32_uniforms
from scipy import stats

from tiltscope.kernels import philox
from tiltscope.kernels.triton_philox import four_normals, one_normal, philox_words

N = 16384


@triton.jit
def _words(counter_ptr, key_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    c = [tl.load(counter_ptr + i * N + at).to(tl.uint32) for i in tl.static_range(4)]
    k = [tl.load(key_ptr + i * N + at).to(tl.uint32) for i in tl.static_range(2)]
    w0, w1, w2, w3 = philox_words(c[0], c[1], c[2], c[3], k[0], k[1])
    tl.store(out_ptr + at, w0.to(tl.int64))
    tl.store(out_ptr + N + at, w1.to(tl.int64))
    tl.store(out_ptr + 2 * N + at, w2.to(tl.int64))
    tl.store(out_ptr + 3 * N + at, w3.to(tl.int64))


@triton.jit
def _normals(four_ptr, one_ptr, row, word2, index, k0, k1, N: tl.constexpr):
    group = tl.arange(0, N)
    zero = group.to(tl.uint32) * 0
    c1 = zero + row.to(tl.uint32)
    c2 = zero + word2.to(tl.uint32)
    c3 = zero + index.to(tl.uint32)
    z0, z1, z2, z3 = four_normals(group.to(tl.uint32), c1, c2, c3, zero + k0.to(tl.uint32), zero + k1.to(tl.uint32))
    z = (z0, z1, z2, z3)
    for lane in tl.static_range(4):
        tl.store(four_ptr + group * 4 + lane, z[lane])
        mine = one_normal(
            group * 0 + lane, group.to(tl.uint32), c1, c2, c3, zero + k0.to(tl.uint32), zero + k1.to(tl.uint32)
        )
        tl.store(one_ptr + group * 4 + lane, mine)


def test_words_are_those_of_the_definition_bit_for_bit():
    rng = np.random.default_rng(0)
    counter, key = (torch.from_numpy(rng.integers(0, 2**32, (rows, N), dtype=np.int64)) for rows in (4, 2))
    got = torch.empty(4, N, dtype=torch.int64)
    _words[(1,)](counter, key, got, N=N)
    assert torch.equal(got, torch.stack(philox.philox(*counter, *key)))


# counter, key, words: Random123 1.14, tests/kat_vectors, philox4x32 10.
KNOWN = (
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
)


def test_known_answers_of_the_published_generator():
    counter, key, words = (torch.tensor([case[part] for case in KNOWN]).t().contiguous() for part in range(3))
    pad = torch.zeros(4, 4 - len(KNOWN), dtype=torch.int64)
    got = torch.empty(4, 4, dtype=torch.int64)
    _words[(1,)](torch.cat([counter, pad], 1), torch.cat([key, pad[:2]], 1), got, N=4)
    assert torch.equal(got[:, : len(KNOWN)], words)


def test_normals_are_within_four_units_in_the_last_place_and_one_lane_is_four():
    row, particle, index, k0, k1 = 2**20 + 1, 65535, 2**31 + 5, 2**32 - 1, 7
    four, one = torch.empty(4 * N), torch.empty(4 * N)
    _normals[(1,)](four, one, row, 1 | particle << 16, index, k0, k1, N=N)
    assert torch.equal(four, one)
    address = torch.tensor([[k0, k1]]), torch.tensor([index]), torch.tensor([row]), torch.tensor([particle])
    exact = normal_of_float32_uniforms(*address, stream=1, shape=(4 * N,), dtype=torch.float64)[0]
    unit = torch.from_numpy(np.spacing(exact.abs().clamp(min=1).float().numpy())).double()
    worst = float(((four.double() - exact).abs() / unit).max())
    assert worst <= 4, f"{worst} units in the last place"


def _draw(row=3, word2=1, index=0, k0=0, k1=0):
    four = torch.empty(4 * 4096)
    _normals[(1,)](four, torch.empty(4 * 4096), row, word2, index, k0, k1, N=4096)
    return four.double().numpy()


def test_draws_are_standard_normal_and_addresses_and_elements_independent():
    z = _draw()
    bound = 4 / len(z) ** 0.5
    assert stats.kstest(z, "norm").pvalue > 1e-3
    for other in ({"row": 4}, {"word2": 2}, {"word2": 1 | 1 << 16}, {"index": 1}, {"k0": 1}, {"k1": 1}):
        y = _draw(**other)
        assert abs(np.corrcoef(z, y)[0, 1]) < bound, other
        assert abs(np.corrcoef(z**2, y**2)[0, 1]) < bound, other
    for lag in range(1, 5):
        assert abs(np.corrcoef(z[lag:], z[:-lag])[0, 1]) < bound, lag
        assert abs(np.corrcoef(z[lag:] ** 2, z[:-lag] ** 2)[0, 1]) < bound, lag
    # seed + index as one number would pass everything above
    assert abs(np.corrcoef(_draw(index=1), _draw(k0=1))[0, 1]) < bound
