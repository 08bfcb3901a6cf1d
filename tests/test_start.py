"""Starting from a given picture: how much of it stays, what the draws are called, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import tiltscope
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.tilt.worlds import GaussianWorld

WORLD = GaussianWorld(s=0.5, shape=(3, 16, 16))


@pytest.fixture
def picture(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:12, 4:12] = (255, 128, 0)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


def drawn(**settings):
    return tiltscope.sample(WORLD.prior, WORLD.feature, **{"num": 32, "lam": 0.0, "steps": 40} | settings)


def test_the_less_noise_the_more_of_the_picture_stays(picture):
    """In the Gaussian world the posterior given the noised picture is known: mean k alpha x0, k = alpha s^2 / v."""
    x0 = torch.from_numpy(np.asarray(Image.open(picture)).copy()).permute(2, 0, 1) / 127.5 - 1
    for sigma in (0.1, 0.5, 0.9):
        found = drawn(start=str(picture), start_sigma=sigma, num=64)
        assert found.target == "started"
        alpha_sq = 1 - sigma**2
        kept = alpha_sq * 0.25 / (alpha_sq * 0.25 + sigma**2)
        slope = float((found.x0.mean(0) * x0).sum() / (x0 * x0).sum())
        assert slope == pytest.approx(kept, abs=0.03)


def test_rows_above_the_start_are_not_drawn(picture):
    whole, part = drawn(num=2), drawn(num=2, start=str(picture), start_sigma=0.5)
    assert int(part.nfe[0]) < int(whole.nfe[0]) / 2


def test_the_identity_is_the_pictures_not_its_names(picture, tmp_path):
    same = tmp_path / "same.png"
    same.write_bytes(picture.read_bytes())
    one, other = (drawn(num=1, start=str(path)).manifest["identity"] for path in (picture, same))
    assert one == other
    Image.new("RGB", (20, 30), "red").save(same)
    assert drawn(num=1, start=str(same)).manifest["identity"] != one


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": "nowhere.png"}, "start: got nowhere.png, which is no file"),
        ({"start": __file__}, "cannot be read as a picture"),
        ({"start_sigma": 1.0}, "start_sigma: got 1.0"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        drawn(**settings)


def test_only_pictures_can_be_started_from(picture):
    flat = GaussianWorld(shape=(4,))
    with pytest.raises(ConfigError, match="no pictures"):
        tiltscope.sample(flat.prior, flat.feature, num=1, lam=0.0, steps=2, start=str(picture))
