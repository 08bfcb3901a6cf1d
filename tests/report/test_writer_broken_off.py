"""A killed or starved run of the writer loses nothing that was finished and ends byte for byte as an unbroken one."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import written_samples
from PIL import Image
from safetensors.torch import load_file
from written_samples import FACTS, RUN, contents, draw, write_all

from tiltscope.engine.report import atomic
from tiltscope.engine.report.writer import SampleWriter


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
spec = importlib.util.spec_from_file_location("written_samples", {written_samples.__file__!r})
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
