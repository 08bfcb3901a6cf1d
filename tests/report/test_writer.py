"""What the writer writes: other libraries read it, memory is flat, and whatever the chunks the rows are the same."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from written_samples import FACTS, RUN, contents, draw, write_all

from tiltscope.engine.report import atomic, shards, writer
from tiltscope.engine.report.shards import IndexSet, open_tensors
from tiltscope.engine.report.writer import SampleWriter


def test_tensors_and_metadata_say_the_same_and_other_libraries_read_them(tmp_path: Path) -> None:
    run = SampleWriter(tmp_path, RUN)
    run.add(draw([5, 2], seed=2**64 - 1))
    manifest = run.close(FACTS)
    tensors = load_file(tmp_path / "samples.safetensors")
    expected = draw([2, 5])
    assert tensors["index"].tolist() == [2, 5]
    assert torch.equal(tensors["x0"], expected.x0)
    assert tensors["seed"].tolist() == [2**64 - 1] * 2
    lines = [json.loads(line) for line in (tmp_path / "samples" / "metadata.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["file_name", "feature", "lam", "activation", "seed", "index"]
    assert [line["activation"] for line in lines] == tensors["activation"].tolist()
    assert [line["file_name"] for line in lines] == [f"00{i}_seed{2**64 - 1}.png" for i in (2, 5)]
    assert [row["index"] for row in manifest["samples"]] == [2, 5]
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert expected.images is not None
    for line, image in zip(lines, expected.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / line["file_name"])), image.permute(1, 2, 0))


def test_datasets_opens_the_image_folder(tmp_path: Path, small_shards: int) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'tiltscope[dev]'")
    for num in (4, 10):  # flat, and in shards
        write_all(tmp_path / str(num), num)
        loaded = datasets.load_dataset(
            "imagefolder",
            data_dir=str(tmp_path / str(num) / "samples"),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )
        rows = sorted(loaded, key=lambda row: row["index"])
        assert [row["index"] for row in rows] == list(range(num))
        assert {row["feature"] for row in rows} == {"blocks.5:sae:137"}
        assert rows[3]["activation"] == pytest.approx(float(draw([3]).activation), rel=1e-6)
        images = draw([3]).images
        assert images is not None
        assert np.array_equal(np.asarray(rows[3]["image"]), images[0].permute(1, 2, 0))


def test_a_prior_without_pictures_has_tensors_only(tmp_path: Path) -> None:
    run = SampleWriter(tmp_path, RUN)
    run.add(draw([0, 1], pictures=False))
    run.close(FACTS)
    assert set(contents(tmp_path)) == {"manifest.json", "samples.safetensors"}
    assert set(SampleWriter(tmp_path, RUN).finished()) == {0, 1}


def test_a_sample_that_is_not_ok_is_kept_as_a_row_and_drawn_again(tmp_path: Path) -> None:
    run = SampleWriter(tmp_path, RUN)
    run.add(draw([0]))
    run.add(draw([1], ok=False))
    run.close(FACTS)
    assert load_file(tmp_path / "samples.safetensors")["ok"].tolist() == [True, False]
    assert not (tmp_path / "samples" / "001_seed0.png").exists()
    assert "001_seed0" not in (tmp_path / "samples" / "metadata.jsonl").read_text()
    again = SampleWriter(tmp_path, RUN)
    assert set(again.finished()) == {0}
    again.add(draw([1]))
    again.close(FACTS)
    assert load_file(tmp_path / "samples.safetensors")["ok"].tolist() == [True, True]


def test_memory_is_flat_in_the_number_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of Python's and numpy's memory while a finished run is opened, merged and closed again, at two sizes."""
    monkeypatch.setattr(atomic.os, "fsync", lambda _: None)
    for module in (shards, writer):
        monkeypatch.setattr(module, "SHARD", 64)
    monkeypatch.setattr(writer, "LISTED_IN_MANIFEST", 64)
    peaks: list[int] = []
    for num in (256, 1024):
        folder = tmp_path / str(num)
        run = SampleWriter(folder, RUN)
        chunks = (draw(list(range(at, at + 32)), side=16, pictures=False) for at in range(0, num, 32))
        first = next(chunks)
        tracemalloc.start()
        run.add(first)
        for chunk in chunks:
            run.add(chunk)
        run.close(FACTS)
        SampleWriter(folder, RUN).close(FACTS)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Measured: 262 KB of x0 a shard; a writer that kept rows would grow by 2.4 MB.
    assert peaks[1] < peaks[0] + 100_000, peaks


def test_merging_never_holds_a_whole_row(tmp_path: Path) -> None:
    """A merged file of 24 MB rows is made through blocks of a megabyte."""
    paths = []
    for index in (0, 1):
        paths.append(tmp_path / f"{index}.safetensors")
        x0 = torch.full((1, 6_000_000), float(index))
        paths[-1].write_bytes(save_tensors({"x0": x0, "index": torch.tensor([index]), "ok": torch.tensor([True])}))
        del x0
    sources = [open_tensors(path) for path in paths]
    rows = [(source, 0) for source in sources if source is not None]
    tracemalloc.start()
    shards.merge(tmp_path / "merged", rows, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
    assert load_file(tmp_path / "merged")["x0"][:, -1].tolist() == [0.0, 1.0]


@settings(max_examples=20)
@given(st.lists(st.sets(st.integers(0, 40), min_size=1, max_size=9).map(sorted), min_size=1, max_size=6))
def test_whatever_the_chunks_the_rows_are_the_union(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    run = SampleWriter(folder, RUN)
    for chunk in chunks:
        run.add(draw(chunk))
    run.close(FACTS)
    union = sorted(set[int]().union(*chunks))
    tensors = load_file(folder / "samples.safetensors")
    assert tensors["index"].tolist() == union
    assert torch.equal(tensors["x0"], draw(union).x0)
    assert list(run.finished()) == union


@given(st.sets(st.integers(0, 2**31 - 1)), st.sets(st.integers(0, 9000)))
def test_an_index_set_is_a_set(large: set[int], small: set[int]) -> None:
    mine = IndexSet(small | large)
    assert list(mine) == sorted(small | large)
    assert len(mine) == len(small | large)
    assert mine & small == small
    assert np.int64(9001) in IndexSet([9001])
    assert "9001" not in IndexSet([9001])
    assert 9001 not in IndexSet()
