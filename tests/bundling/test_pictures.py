"""Pictures of any folder: found in one order, named, split, brought to one size; what is dangerous or broken is told."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tiltscope.engine.bundling.pictures import FolderPictures, Unreadable, encode
from tiltscope.engine.errors import BundleError, ConfigError


def save(path, *, size=(8, 8), colour=(200, 30, 40), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def of(folder, **options):
    return FolderPictures(folder, **({"size": (8, 8)} | options))


def names(pictures):
    return [pictures.columns(at)["name"] for at in range(pictures.num)]


def test_order_names_and_categories_come_from_paths(tmp_path):
    for name in ("b/tabby_cat_012.jpg", "a/red-fox.PNG", "7.webp", "a/notes.md", ".hidden/x.png"):
        if name.endswith("md"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("no picture")
        else:
            save(tmp_path / name)
    pictures = of(tmp_path)
    assert [pictures.columns(at)["file"] for at in range(pictures.num)] == [
        "7.webp", "a/red-fox.PNG", "b/tabby_cat_012.jpg",
    ]  # fmt: skip
    assert names(pictures) == ["7", "red fox", "tabby cat"]
    assert [pictures.columns(at)["category"] for at in range(3)] == ["", "a", "b"]


def test_captions_go_before_file_names_and_metadata_before_both(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\n a cat on a mat \nsecond line")
    (tmp_path / "b.txt").write_text("not this")
    row = {
        "file_name": "b.png",
        "text": "a dog",
        "keywords": ["pet", "brown"],
        "split": "test",
        "group": "",
        "category": "dogs",
    }
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    pictures = of(tmp_path)
    assert names(pictures) == ["a cat on a mat", "a dog", "c"]
    told = pictures.columns(1)
    assert (told["keywords"], told["split"], told["group"], told["category"]) == (
        ["pet", "brown"],
        "heldout",
        "",
        "dogs",
    )


def test_a_tenth_is_held_out_by_group_and_always_the_same(tmp_path):
    lines = []
    for at in range(400):
        (tmp_path / f"{at:03d}.png").write_bytes(b"")
        lines.append(json.dumps({"file_name": f"{at:03d}.png", "group": f"thing {at // 2}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    pictures = of(tmp_path)
    heldout = np.array([pictures.columns(at)["split"] == "heldout" for at in range(400)])
    assert 20 <= heldout.sum() <= 60
    assert np.array_equal(heldout[::2], heldout[1::2])
    again = of(tmp_path)
    assert [again.columns(at)["split"] == "heldout" for at in range(400)] == heldout.tolist()


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "no file"}'])
def test_metadata_that_cannot_be_read_names_its_line(tmp_path, line):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n' + line)
    with pytest.raises(BundleError, match="line 2"):
        of(tmp_path)


def test_metadata_of_pictures_that_are_not_there(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{c}.png"}) for c in "abcdef"))
    with pytest.raises(BundleError, match=r"5 pictures that are not in the folder \(b.png, c.png, d.png and 2 more\)"):
        of(tmp_path)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(ConfigError, match="holds no picture"):
        of(tmp_path)
    with pytest.raises(ConfigError, match="is not a folder"):
        of(tmp_path / "nowhere")


def test_pixels_of_the_wanted_size_come_unchanged_and_go_losslessly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.webp").write_bytes(encode(pixels))
    pictures = of(tmp_path)
    np.testing.assert_array_equal(pictures.load(0), pixels)
    np.testing.assert_array_equal(pictures.load(1), pixels)


def test_the_middle_is_cut_out_in_proportion_and_resized(tmp_path):
    wide = np.zeros((16, 40, 3), dtype=np.uint8)
    wide[:, 12:28] = (10, 200, 90)  # the central square
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert (of(tmp_path).load(0) == (10, 200, 90)).all()
    tall = of(tmp_path, size=(4, 10)).load(0)
    assert tall.shape == (4, 10, 3)
    assert (tall[:, 0] == 0).all()


def test_transparency_lies_on_the_background(tmp_path):
    save(tmp_path / "a.png", mode="RGBA", colour=(255, 0, 0, 0))
    save(tmp_path / "b.png", mode="LA", colour=(0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 50, 60, 70])
    palette.save(tmp_path / "c.png", transparency=1)
    pictures = of(tmp_path, background=240)
    assert pictures.load(0)[0, 0].tolist() == [240, 240, 240]
    assert abs(int(pictures.load(1)[0, 0, 0]) - 240 * (1 - 128 / 255)) <= 1
    assert pictures.load(2)[0, 0].tolist() == [240, 240, 240]


def test_a_camera_that_lay_on_its_side(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: the top row is the right column
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert (of(tmp_path).load(0)[:, -1] == 255).all()


def bomb(path, side):
    """A PNG of side x side pixels in a few hundred bytes of header; its data is cut short."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(3 * 1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side", [8193, 12_000, 30_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side, monkeypatch):
    bomb(tmp_path / "a.png", side)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(Unreadable, match=r"pixels; at most 67,108,864|more than 67,108,864"):
        of(tmp_path).load(0)


def test_what_is_broken_or_of_another_kind_says_why(tmp_path):
    save(tmp_path / "good.png", size=(64, 64))
    whole = (tmp_path / "good.png").read_bytes()
    save(tmp_path / "cut.jpg", size=(64, 64), quality=95)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture at all")
    # A format whose decoder hands the file to another program must never be opened, whatever its name says.
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    pictures = of(tmp_path)
    for at in range(pictures.num):
        name = pictures.columns(at)["file"]
        if name == "good.png":
            assert pictures.load(at).shape == (8, 8, 3)
            continue
        with pytest.raises(Unreadable) as told:
            pictures.load(at)
        assert str(tmp_path) not in str(told.value)
        assert ("8 bits" in str(told.value)) == (name == "deep.png")


def test_another_list_of_pictures_is_another_identity(tmp_path):
    save(tmp_path / "a.png")
    before = of(tmp_path).identity()
    assert of(tmp_path).identity() == before
    (tmp_path / "a.txt").write_text("a caption")
    with_caption = of(tmp_path).identity()
    save(tmp_path / "b.png")
    with_two = of(tmp_path).identity()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    assert len({before, with_caption, with_two, of(tmp_path).identity()}) == 4
