"""The split has no thing on both sides, and flags keep to their share."""

import numpy as np
import pytest
from data import BACKGROUND, choose_pool, family, is_heldout, load_picture


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f44d", "1f44d-1f3fb"),  # thumbs up, and in a skin tone
        ("1f468-200d-1f373", "1f469-1f3fd-200d-1f373"),  # man cooking, woman cooking
        ("1f3c3-200d-2642-fe0f", "1f3c3-200d-27a1-fe0f"),  # running: man, to the right
        ("2764-fe0f", "2764"),
    ],
)
def test_variants_of_one_thing_are_one_family_and_on_one_side(one: str, other: str) -> None:
    assert family(one) == family(other)
    assert is_heldout(one) == is_heldout(other)


def test_different_things_are_different_families() -> None:
    assert len({family(c) for c in ("1f44d", "1f44e", "1f9d1-200d-1f373", "1f9d1-200d-1f33e")}) == 4


def test_about_a_tenth_is_held_out() -> None:
    share = np.mean([is_heldout(f"{i:x}") for i in range(0x1F300, 0x1F300 + 2000)])
    assert 0.08 < share < 0.12


def test_the_flag_cap_holds_and_skin_tones_stay_out() -> None:
    code_points = (
        [f"1f1e6-{i:x}" for i in range(300)] + [f"{i:x}" for i in range(0x1F400, 0x1F400 + 400)] + ["1f44d-1f3fb"] * 50
    )
    categories = ["Flags"] * 300 + ["Objects"] * 400 + ["People & Body"] * 50
    pool = choose_pool(code_points, categories, 0.05)
    assert pool[300:700].all()
    assert not pool[700:].any()
    assert 0.045 < pool[:300].sum() / pool.sum() <= 0.05


def test_transparent_is_background(tmp_path) -> None:
    from PIL import Image

    canvas = Image.new("RGBA", (256, 256), (255, 0, 0, 0))
    canvas.paste((0, 0, 255, 255), (64, 64, 192, 192))
    canvas.save(tmp_path / "one.webp", lossless=True)
    pixels = load_picture(tmp_path / "one.webp")
    assert pixels.shape == (64, 64, 3)
    assert (pixels[0, 0] == BACKGROUND).all()
    assert (pixels[32, 32] == (0, 0, 255)).all()
