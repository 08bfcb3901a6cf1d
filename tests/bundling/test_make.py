"""A bundle from parts and a folder of pictures: the numbers are those that sampling reads, and a killed run loses nothing."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiltscope
from tiltscope.engine.bundling import make, shards
from tiltscope.engine.bundling.make import make_bundle
from tiltscope.engine.bundling.pictures import FolderPictures
from tiltscope.engine.bundling.settings import BundleSettings
from tiltscope.engine.errors import BundleError, ConfigError


@pytest.fixture(scope="module")
def folder(tiny_bundle, tmp_path_factory):
    """The tiny bundle's own pictures as anyone's folder, with one that cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    pool = tiltscope.load(tiny_bundle).pool
    lines = []
    for at in range(pool.num):
        name = f"{at:02d}.png"
        Image.fromarray(pool.images([at])[0].permute(1, 2, 0).numpy()).save(folder / name)
        row = {
            "file_name": name,
            "name": pool.names[at],
            "category": pool.categories[at],
            "keywords": pool.keywords[at],
        }
        lines.append(json.dumps(row | {"split": "heldout" if pool.heldout[at] else "train"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "05-broken.png").write_bytes((folder / "05.png").read_bytes()[:90])
    return folder


@pytest.fixture
def settings(tiny_bundle, folder):
    def given(out, **changes):
        parts = {name: tiny_bundle / name for name in ("prior", "trunk", "sae", "evaluator")}
        return BundleSettings(**(parts | {"pool": folder, "out": out, "pixel_unshuffle": 4, "name": "mine"} | changes))

    return given


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 32)


@pytest.fixture(scope="module")
def made(tiny_bundle, folder, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("made") / "bundle", []
    parts = {name: tiny_bundle / name for name in ("prior", "trunk", "sae", "evaluator")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 32)
        make_bundle(BundleSettings(**parts, pool=folder, out=out, pixel_unshuffle=4, name="mine"), say=said.append)
    return out, said


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_numbers_are_those_of_the_bundle_it_was_taken_from(made, tiny_bundle):
    mine, original = tiltscope.load(made[0]), tiltscope.load(tiny_bundle)
    assert mine.verify() == len([p for p in made[0].rglob("*") if p.is_file()]) - 1
    assert mine.pool.num == 40
    assert mine.pool.names == original.pool.names
    assert mine.pool.keywords == original.pool.keywords
    assert mine.pool.code_points == ()
    assert np.array_equal(mine.pool.heldout, original.pool.heldout)
    assert torch.equal(mine.pool.images(range(40)), original.pool.images(range(40)))
    for name in ("blocks.1:sae:3", "blocks.1:sae:23"):
        stored = [each.pool.activations(each.feature(name)) for each in (mine, original)]
        np.testing.assert_allclose(*stored, rtol=1e-5, atol=1e-5)
    for each in zip(mine.pool.statistics("blocks.1"), original.pool.statistics("blocks.1"), strict=True):
        np.testing.assert_allclose(*each, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine.pool.embeddings(), original.pool.embeddings(), atol=2e-3)
    for mine_of, theirs in zip(mine.features(), original.features(), strict=True):
        assert (mine_of.feature, mine_of.alive) == (theirs.feature, theirs.alive)
        assert mine_of.density == pytest.approx(theirs.density)
        assert mine_of.max == pytest.approx(theirs.max, rel=1e-5, abs=1e-5)


def test_a_made_bundle_samples_and_datasets_can_open_its_pool(made):
    bundle = tiltscope.load(made[0])
    samples = tiltscope.sample(bundle.prior, bundle.feature("blocks.1:sae:3"), num=1, lam=1.0, steps=2)
    assert samples.images.shape == (1, 3, 64, 64)
    described = json.loads(pq.read_schema(made[0] / "pool/pool.parquet").metadata[b"huggingface"])
    assert described["info"]["features"]["image"] == {"_type": "Image"}


def test_what_could_not_be_read_is_told_and_listed(made):
    out, said = made
    assert said == [
        "1 of 41 pictures were left out, all listed in pool/left_out.jsonl (05-broken.png: image file is truncated)"
    ]
    rows = [json.loads(line) for line in (out / "pool/left_out.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["05-broken.png"]
    assert tiltscope.load(out).meta["pool"]["num_left_out"] == 1


def test_strict_stops_at_what_cannot_be_read(settings, tmp_path):
    with pytest.raises(BundleError, match=r"picture 05-broken.png cannot be used"):
        make_bundle(settings(tmp_path / "out", strict=True), say=lambda text: None)
    assert not (tmp_path / "out/bundle.json").exists()


@pytest.mark.parametrize("at", [10, 36])
def test_a_run_that_was_killed_ends_with_the_same_bytes(made, settings, tmp_path, monkeypatch, at):
    """Killed in the first shard, and in the second: of the latter, the first is not read again."""
    out = tmp_path / "out"
    whole = FolderPictures.load
    read = []

    def dies(self, index):
        if index == at:
            raise KeyboardInterrupt
        return whole(self, index)

    def counts(self, index):
        read.append(index)
        return whole(self, index)

    monkeypatch.setattr(FolderPictures, "load", dies)
    with pytest.raises(KeyboardInterrupt):
        make_bundle(settings(out), say=lambda text: None)
    assert not (out / "bundle.json").exists()
    monkeypatch.setattr(FolderPictures, "load", counts)
    make_bundle(settings(out), say=lambda text: None)
    assert min(read) == (0 if at < 32 else 32)
    assert contents(out) == contents(made[0])


def test_whole_is_left_alone_and_anything_else_is_refused(made, settings, tmp_path):
    said = []
    before = contents(made[0])
    make_bundle(settings(made[0]), say=said.append)
    assert said == [f"{made[0]} is whole already"]
    assert contents(made[0]) == before
    with pytest.raises(ConfigError, match="holds another bundle"):
        make_bundle(settings(made[0], background=0), say=said.append)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty"):
        make_bundle(settings(tmp_path / "theirs"), say=said.append)
    plan = make.find(settings(tmp_path / "begun")).plan()
    assert make.claim(tmp_path / "begun", plan)
    with pytest.raises(ConfigError, match=r"made of something else \(background differ\)"):
        make.claim(tmp_path / "begun", plan | {"background": 3})


def test_latents_in_several_files_are_found_again(made, settings, tmp_path, monkeypatch):
    from tiltscope.engine.bundling import pool

    monkeypatch.setattr(pool, "BLOCK_BYTES", 4 * 40 * 10)
    out = make_bundle(settings(tmp_path / "out"), say=lambda text: None)
    many, one = tiltscope.load(out), tiltscope.load(made[0])
    assert many.meta["pool"]["latents_per_file"] == 10
    assert sorted(p.name for p in (out / "pool").glob("activations-*")) == [
        f"activations-0000{n}.parquet" for n in range(3)
    ]
    combination = [each.feature("blocks.1:sae:9") * 2.0 - each.feature("blocks.1:sae:21") for each in (many, one)]
    monkeypatch.setattr(type(many.pool), "_run", lambda self, feature: pytest.fail("computed anew"))
    np.testing.assert_array_equal(many.pool.activations(combination[0]), one.pool.activations(combination[1]))
    assert [f.name for f in many.features()] == [f.name for f in one.features()]


def test_answers_that_are_not_those_stored_are_refused(made, tmp_path):
    """Weights that were exchanged together with their hashes: only the stored answers can tell."""
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    tiltscope.load(out).feature("blocks.1:sae:3")
    weights = load_file(out / "trunk/model.safetensors")
    weights["embeddings.cls_token"] = weights["embeddings.cls_token"] + 0.5
    save_file(weights, out / "trunk/model.safetensors", metadata={"format": "pt"})
    meta = json.loads((out / "bundle.json").read_text())
    meta["files"]["trunk/model.safetensors"] = make.describe_files(out)["trunk/model.safetensors"]
    (out / "bundle.json").write_text(json.dumps(meta))
    with pytest.raises(BundleError, match=r"blocks.1: tokens differ from those stored .* by .*e-0[12] of their size"):
        tiltscope.load(out).feature("blocks.1:sae:3")


def test_too_few_pictures_and_parts_that_do_not_fit(settings, folder, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for at in range(19):
        shutil.copy(folder / f"{at:02d}.png", few)
    with pytest.raises(BundleError, match="19 usable pictures; give at least 20"):
        make_bundle(settings(tmp_path / "a", pool=few), say=lambda text: None)
    with pytest.raises(ConfigError, match=r"samples of shape .* are no pictures"):
        make.find(settings(tmp_path / "b", pixel_unshuffle=1))
    with pytest.raises(ConfigError, match="which does not divide 48 channels"):
        make.find(settings(tmp_path / "b", pixel_unshuffle=5))
    with pytest.raises(ConfigError, match=r"prior .* is not a folder"):
        make.find(settings(tmp_path / "b", prior=tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="does not say its kind"):
        make.find(settings(tmp_path / "b", sae=settings(tmp_path).sae / "sae.safetensors"))
    with pytest.raises(ConfigError, match="background: got 300, allowed are whole numbers from 0 to 255"):
        settings(tmp_path / "b", background=300)
    assert not (tmp_path / "b").exists()
