"""The torch restatement of the generator against its numpy definition."""

import numpy as np
import pytest
import torch

from tiltscope.engine.sampler import noise
from tiltscope.kernels import philox

SEEDS = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]


def slots(seeds, index, row, particle):
    return (
        torch.tensor([noise.seed_key(seed) for seed in seeds]),
        torch.tensor(index),
        torch.tensor(row),
        torch.tensor(particle),
    )


def test_words_are_equal_bit_for_bit():
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (4, 1000), dtype=np.uint64)
    key = rng.integers(0, 2**32, (2, 1000), dtype=np.uint64)
    expected = noise.philox(tuple(counter), tuple(key))
    got = philox.philox(*(torch.from_numpy(word.astype(np.int64)) for word in (*counter, *key)))
    np.testing.assert_array_equal(torch.stack(got).numpy(), expected.astype(np.int64))


@pytest.mark.parametrize("shape", [(1,), (3,), (17,), (3, 5, 7), (3, 64, 64)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 4e-6)])
def test_normals_are_the_definitions(shape, dtype, atol):
    index, row, particle = [0, 1, 7, 2**31 - 1, 2**31 + 5, 3], [0, 1, 999, 5, 0, 2], [0, 0, 1, 0, 65535, 0]
    got = philox.normal(*slots(SEEDS, index, row, particle), stream=noise.STREAM_STEP, shape=shape, dtype=dtype)
    for slot, seed in enumerate(SEEDS):
        expected = noise.normal(
            seed, index[slot], row[slot], noise.STREAM_STEP, particle=particle[slot], shape=shape, dtype=np.float64
        )
        np.testing.assert_allclose(got[slot].double().numpy(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(3,), (3, 64, 64)])
def test_a_slots_noise_is_bitwise_the_same_in_any_company(shape):
    def draw(order):
        each = [SEEDS[at] for at in order], [10 + at for at in order], list(order), [0 for _ in order]
        return philox.normal(*slots(*each), stream=1, shape=shape, dtype=torch.float32)

    order = [3, 0, 5, 1, 4, 2]
    assert torch.equal(draw(order), draw(range(6))[order])
