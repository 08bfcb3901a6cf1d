"""Claims of the pictures: lossless, the same bytes each time, nothing of the machine in them, heat where the feature fires."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from tiltscope.engine.report import pictures


@settings(max_examples=40)
@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([3]))))
def test_png_is_lossless_and_repeats_to_the_byte(pixels: np.ndarray) -> None:
    png = pictures.encode_png(pixels)
    assert png == pictures.encode_png(pixels.copy())
    assert np.array_equal(pictures.decode_png(png), pixels)


def test_a_png_holds_pixels_and_nothing_else() -> None:
    png = pictures.encode_png(np.zeros((4, 4, 3), np.uint8))
    kinds, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        kinds.append(png[at + 4 : at + 8])
        at += 12 + length
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]  # no time, no software, no text


def test_a_tensor_becomes_the_picture_it_is() -> None:
    image = torch.arange(3 * 2 * 4, dtype=torch.uint8).reshape(3, 2, 4)
    assert pictures.to_array(image)[1, 3].tolist() == [7, 15, 23]
    # channels-last memory is the same picture
    stored = image[None].to(memory_format=torch.channels_last)[0]
    assert pictures.encode_png(pictures.to_array(stored)) == pictures.encode_png(pictures.to_array(image))


@pytest.mark.parametrize(("num", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (8, 4, 2), (17, 8, 3), (70, 8, 8)])
def test_the_grid_enlarges_by_whole_pixels_and_stops_at_64(num: int, columns: int, rows: int) -> None:
    shown = [np.full((32, 32, 3), at, np.uint8) for at in range(num)]
    shown[0][5, 6] = [200, 100, 50]
    canvas = pictures.grid(shown)
    gap, scale = 8, 4
    assert canvas.shape == (rows * (128 + gap) + gap, columns * (128 + gap) + gap, 3)
    square = canvas[gap + 5 * scale : gap + 6 * scale, gap + 6 * scale : gap + 7 * scale]
    assert (square == [200, 100, 50]).all()
    assert (canvas[gap:][:32] != [200, 100, 50]).any(-1).sum() == canvas[gap:][:32, :, 0].size - scale**2
    last = min(num, 64) - 1
    top, left = gap + last // columns * (128 + gap), gap + last % columns * (128 + gap)
    assert (canvas[top + 100, left + 100] == last).all()


def test_heat_is_transparent_where_nothing_fires_and_strongest_at_the_maximum() -> None:
    heat = np.array([[0.0, 1.0], [4.0, np.nan]])
    alpha = pictures.heat_pixels(heat, largest=4.0)[..., 3]
    assert alpha[0, 0] == 0
    assert alpha[1, 1] == 0
    assert alpha[1, 0] == round(0.8 * 255)
    assert alpha[0, 1] == round(0.4 * 255)
    assert not pictures.heat_pixels(np.zeros((2, 2)), largest=0.0)[..., 3].any()


def test_negative_heat_has_another_colour() -> None:
    pixels = pictures.heat_pixels(np.array([[2.0, -2.0]]), largest=2.0)
    assert pixels[0, 0, 3] == pixels[0, 1, 3]
    assert pixels[0, 0, 0] > pixels[0, 0, 2]
    assert pixels[0, 1, 0] < pixels[0, 1, 2]


def test_the_key_rises_from_nothing_to_the_strongest() -> None:
    alpha = pictures.heat_ramp()[0, :, 3].astype(int)
    assert alpha[0] == 0
    assert (np.diff(alpha) >= 0).all()
    assert alpha[-1] == round(0.8 * 255)


@pytest.mark.parametrize(
    ("at", "words"),
    [((0, 0), "upper left"), ((0, 4), "upper"), ((4, 4), "centre"), ((4, 7), "right"), ((7, 2), "lower left")],
)
def test_the_strongest_place_in_words(at: tuple[int, int], words: str) -> None:
    heat = np.full((8, 8), 0.1)
    heat[at] = -3.0
    assert pictures.strongest_area(heat) == words


def test_nowhere_has_no_words() -> None:
    assert pictures.strongest_area(np.zeros((8, 8))) is None
    assert pictures.strongest_area(np.full((8, 8), np.nan)) is None


def test_large_pictures_are_made_smaller_and_small_ones_left_alone() -> None:
    small = np.zeros((64, 32, 3), np.uint8)
    assert pictures.reduce(small, longest=64) is small
    assert pictures.reduce(np.zeros((600, 300, 3), np.uint8), longest=256).shape == (256, 128, 3)


def test_a_data_uri_is_the_png() -> None:
    uri = pictures.data_uri(pictures.encode_png(np.full((2, 2, 3), 9, np.uint8)))
    import base64

    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(content)).size == (2, 2)
