"""Claims of the writer: a killed or starved run loses nothing that was finished and ends byte for byte as an unbroken one;
another run's folder is refused with nothing written; memory is flat; other libraries read the result."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.report import atomic, shards, writer
from tiltscope.engine.report.shards import IndexSet, open_tensors
from tiltscope.engine.report.writer import SampleWriter, check_folder
from tiltscope.engine.samples import Samples

RUN = "1f" * 32
OTHER = "2e" * 32
FACTS: dict[str, Any] = {"command": "sample", "feature": "blocks.5:sae:137"}


def draw(indices: list[int], *, seed: int = 0, side: int = 4, pictures: bool = True, ok: bool = True) -> Samples:
    """What a sampler would give: everything about a sample follows from its seed and index."""
    num = len(indices)
    x0 = torch.stack([torch.randn(3, side, side, generator=torch.Generator().manual_seed(i)) for i in indices])
    whole = torch.zeros(num, dtype=torch.int64)
    return Samples(
        feature="blocks.5:sae:137",
        x0=x0,
        images=((x0 + 1) * 127.5).clamp(0, 255).round().to(torch.uint8) if pictures else None,
        activation=x0.mean((1, 2, 3)),
        drive=x0.amax((1, 2, 3)),
        lam=torch.full((num,), 2.0),
        seed=seed,
        index=torch.tensor(indices),
        target="approximate",
        nfe=whole + 100,
        n_vjp=whole + 99,
        ok=torch.full((num,), ok),
    )


def write_all(folder: Path, num: int, chunk: int = 3) -> None:
    """The same command, whatever is there already."""
    run = SampleWriter(folder, RUN)
    wanted = [index for index in range(num) if index not in run.finished()]
    for at in range(0, len(wanted), chunk):
        run.add(draw(wanted[at : at + chunk]))
    run.close(FACTS)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    """Shards of 4 samples instead of 4,096: the same code, in a test's time."""
    for module in (shards, writer):
        monkeypatch.setattr(module, "SHARD", 4)
    monkeypatch.setattr(writer, "LISTED_IN_MANIFEST", 4)
    return 4


class Killed(BaseException):
    """Stands for SIGKILL: from here on this process does nothing more to the disk."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """kill_at(n): the n-th rename or removal and everything after it does not happen."""
    real = {name: getattr(os, name) for name in ("replace", "unlink", "rmdir")}
    real_unlink = Path.unlink
    left = [10**9]

    def guard(call: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*args, **kwargs)

        return guarded

    for name, call in real.items():
        monkeypatch.setattr(os, name, guard(call))
    monkeypatch.setattr(Path, "unlink", guard(real_unlink))

    def start(number: int) -> None:
        left[0] = number

    yield start
    left[0] = 10**9


def test_a_run_killed_at_any_write_ends_as_an_unbroken_one(tmp_path: Path, kill_at: Any, small_shards: int) -> None:
    # 7 samples at 4 a shard: the kill also falls into the change from one file to shards, and into merging.
    write_all(tmp_path / "unbroken", 7)
    expected = contents(tmp_path / "unbroken")
    assert {
        "samples-00000.safetensors",
        "samples/00001/006_seed0.png",
        "samples/00001/metadata.jsonl",
    } <= expected.keys()
    assert "samples.safetensors" not in expected
    kills = 0
    while True:
        folder = tmp_path / f"killed{kills}"
        kill_at(kills)
        try:
            write_all(folder, 7)
        except Killed:
            kill_at(10**9)
            before = set(SampleWriter(folder, RUN).finished()) if folder.exists() else set[int]()
            write_all(folder, 7)
            assert contents(folder) == expected, f"killed at write {kills}"
            assert before <= set(range(7))
            kills += 1
        else:
            break
    assert kills > 30


def test_what_add_returned_from_survives_a_kill(tmp_path: Path, kill_at: Any, small_shards: int) -> None:
    for kill in range(0, 42, 5):
        folder = tmp_path / str(kill)
        run = SampleWriter(folder, RUN)
        promised: set[int] = set()
        kill_at(kill)
        try:
            for start in range(0, 18, 3):
                run.add(draw([start, start + 1, start + 2]))
                promised |= {start, start + 1, start + 2}
        except Killed:
            pass
        kill_at(10**9)
        assert promised <= set(SampleWriter(folder, RUN).finished())


def test_a_process_killed_outright_is_continued(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
import importlib.util
spec = importlib.util.spec_from_file_location("writer_tests", {str(Path(__file__))!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
real, calls = os.replace, []
def replace(*args):
    calls.append(args)
    if len(calls) == 8:  # the second chunk's last picture: written under its temporary name
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
os.replace = replace
module.write_all(module.Path({str(tmp_path / "out")!r}), 9)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert any(each.name.startswith(".") for each in (tmp_path / "out" / "samples").iterdir())
    assert set(SampleWriter(tmp_path / "out", RUN).finished()) == {0, 1, 2}
    write_all(tmp_path / "out", 9)
    write_all(tmp_path / "unbroken", 9)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_a_full_disk_is_an_oserror_and_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [6_000]
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        room[0] -= os.fstat(descriptor).st_size
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    run = SampleWriter(tmp_path / "out", RUN)
    kept: set[int] = set()

    def draw_many() -> None:
        for index in range(100):
            run.add(draw([index]))
            kept.add(index)

    with pytest.raises(OSError, match="No space left") as caught:
        draw_many()
    assert caught.value.errno == errno.ENOSPC
    assert 1 < len(kept) < 20
    assert not [each for each in (tmp_path / "out").rglob("*") if "tmp" in each.name]
    again = SampleWriter(tmp_path / "out", RUN)
    assert set(again.finished()) == kept
    for index in kept:
        Image.open(tmp_path / "out" / "samples" / f"{index:03d}_seed0.png").verify()
    room[0] = 10**9
    write_all(tmp_path / "out", 30, chunk=1)
    write_all(tmp_path / "unbroken", 30, chunk=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_damage_is_drawn_again(tmp_path: Path) -> None:
    write_all(tmp_path / "whole", 9)
    for kind in ("part", "tensors", "picture"):
        folder = tmp_path / kind
        run = SampleWriter(folder, RUN)
        for start in (0, 3, 6):
            run.add(draw([start, start + 1, start + 2]))
        if kind != "part":
            run.close(FACTS)
        if kind == "picture":
            (folder / "samples" / "004_seed0.png").unlink()
            lost = {4}
        else:
            path = sorted((folder / ".parts").iterdir())[0] if kind == "part" else folder / "samples.safetensors"
            lost = set(load_file(path)["index"].tolist())
            path.write_bytes(path.read_bytes()[:-1])
        assert set(range(9)) - set(SampleWriter(folder, RUN).finished()) == lost
        write_all(folder, 9)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_longer_run_of_the_same_identity_goes_on(tmp_path: Path, small_shards: int) -> None:
    for num in (3, 4, 14):
        write_all(tmp_path / "grown", num)
    write_all(tmp_path / "at_once", 14)
    assert contents(tmp_path / "grown") == contents(tmp_path / "at_once")
    write_all(tmp_path / "grown", 4)  # nothing to draw, nothing lost
    assert contents(tmp_path / "grown") == contents(tmp_path / "at_once")


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


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def make_file(place: Path) -> None:
    place.write_text("mine")


def make_other_run(place: Path) -> None:
    run = SampleWriter(place, OTHER)
    run.add(draw([0]))
    run.close(FACTS)


def make_unknown_run(place: Path) -> None:
    (place / "samples").mkdir(parents=True)


def make_broken_manifest(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").write_text('{"identity": ')


def make_foreign_manifest(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").write_text('{"name": "a web application"}')


def make_newer_schema(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").write_text(json.dumps({"schema_version": 99, "identity": RUN}))


def make_dangling_link(place: Path) -> None:
    place.symlink_to(place.parent / "nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_file, "is a file"),
        (make_dangling_link, "is a file"),
        (
            make_other_run,
            r"holds another run \(sample blocks.5:sae:137, identity 2e2e2e2e\), this one has identity 1f1f1f1f",
        ),
        (make_unknown_run, "no manifest.json"),
        (make_broken_manifest, "cannot be read"),
        (make_foreign_manifest, "not a manifest of tiltscope"),
        (make_newer_schema, "schema_version 99"),
    ],
)
def test_a_folder_that_cannot_hold_the_run_is_refused_untouched(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "out")
    before = tree(tmp_path)
    for refuse in (check_folder, SampleWriter):
        with pytest.raises(ConfigError, match=message) as caught:
            refuse(tmp_path / "out", RUN)
        assert "another output folder" in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["/proc/tiltscope", "/dev/null/out"])
def test_a_place_that_cannot_be_written_is_refused(place: str) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs a /proc, which nobody can write to")
    with pytest.raises(ConfigError, match=r"cannot be written|is a file"):
        check_folder(place, RUN)


def test_below_a_file_is_refused(tmp_path: Path) -> None:
    make_file(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_folder(tmp_path / "file" / "out", RUN)


def test_a_good_place_is_not_touched_by_asking(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a user's own file does not make a folder another run's")
    before = tree(tmp_path)
    check_folder(tmp_path, RUN)
    check_folder(tmp_path / "a" / "b" / "c", RUN)
    SampleWriter(tmp_path / "a", RUN)
    assert tree(tmp_path) == before


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
