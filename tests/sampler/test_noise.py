"""The generator: known answers, normality, and that no two streams of the address space are related."""

import numpy as np
import pytest
from scipy import stats

from tiltscope.engine.sampler.noise import STREAM_START, STREAM_STEP, normal, philox, seed_key, uniform

# Salmon et al. 2011, the published known-answer vectors of philox4x32-10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    assert tuple(int(word) for word in philox(counter, key)) == expected


def test_the_definition_of_one_number():
    words = philox((0, 5, STREAM_STEP, 9), seed_key(2**40 + 3))
    u = (words.astype(np.float64) + 0.5) / 2**32
    expected = np.sqrt(-2 * np.log(u[0])) * np.array([np.cos(2 * np.pi * u[1]), np.sin(2 * np.pi * u[1])])
    got = normal(2**40 + 3, 9, 5, STREAM_STEP, shape=(2,))
    np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_words_zero_and_all_ones_give_finite_normals():
    edge = np.array([0, 0xFFFFFFFF], np.uint32)
    for dtype in (np.float32, np.float64):
        assert np.isfinite(np.sqrt(-2 * np.log(uniform(edge, dtype)))).all()


def test_draws_are_standard_normal():
    z = normal(0, 0, 0, STREAM_START, shape=(200_000,))
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    assert abs(z.std() - 1) < 4 / (2 * len(z)) ** 0.5


def draw(seed=0, index=0, row=0, stream=STREAM_STEP, particle=0):
    return normal(seed, index, row, stream, particle=particle, shape=(40_000,))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # seed + index would pass every test but this one
        ({"seed": 0, "index": 1}, {"seed": 1, "index": 0}),
        ({"seed": 0}, {"seed": 2**32}),
        ({"index": 0}, {"index": 1}),
        ({"row": 0}, {"row": 1}),
        ({"stream": STREAM_START}, {"stream": STREAM_STEP}),
        ({"particle": 0}, {"particle": 1}),
    ],
)
def test_different_addresses_are_uncorrelated(one, other):
    z, y = draw(**one), draw(**other)
    assert abs(np.corrcoef(z, y)[0, 1]) < 4 / len(z) ** 0.5
    assert abs(np.corrcoef(z**2, y**2)[0, 1]) < 4 / len(z) ** 0.5


def test_neighbouring_elements_are_uncorrelated():
    z = draw()
    for lag in (1, 2, 3, 4):
        assert abs(np.corrcoef(z[lag:], z[:-lag])[0, 1]) < 4 / len(z) ** 0.5


def test_a_longer_shape_begins_with_the_shorter_ones_numbers():
    np.testing.assert_array_equal(normal(3, 1, 2, 1, shape=(3, 5)).ravel(), normal(3, 1, 2, 1, shape=(64,))[:15])
