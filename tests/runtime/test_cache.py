"""The cache: whole or absent whatever is killed, built once however many ask, bounded, and never from under a process's feet."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.runtime import cache
from tiltscope.engine.runtime.cache import entries, evict, kept_file, obtain_entry, remove_entry, remove_leftovers

# A builder that takes its time and tells where it is. What is printed is on its way when it waits, so a kill hits that point.
BUILDER = """
import os, sys, time
from pathlib import Path
from tiltscope.engine.runtime import cache

def tell(word):
    print(word, flush=True)
    time.sleep(float(os.environ.get("STUB_SECONDS", "0.02")))

def build(place):
    with open(os.environ["STUB_LOG"], "a") as log:
        log.write(f"{os.getpid()}\\n")
    tell("started")
    for at in range(3):
        (place / f"{at}.bin").write_bytes(b"x" * 1000)
        tell(f"file {at}")
    tell("built")

def renamed(self, target):
    found = rename(self, target)
    tell("renamed")
    return found

rename, Path.rename = Path.rename, renamed
folder = cache.obtain_entry("stub", build)
print(sorted(path.name for path in folder.iterdir()), flush=True)
if len(sys.argv) > 1:
    sys.stdin.readline()
"""
WHOLE = "['0.bin', '1.bin', '2.bin']"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    yield tmp_path / "home" / "artefacts"
    end_of_process(tmp_path)


def end_of_process(below: Path) -> None:
    """What the system does with this process's leases below a folder when the process ends."""
    for folder in [each for each in cache._leases if each.is_relative_to(below)]:
        os.close(cache._leases.pop(folder))


def start(*words: str, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | settings,
    )


def builds(home: Path) -> int:
    return len((home.parent.parent / "log").read_text().splitlines())


def visible(home: Path) -> list[str]:
    """All there is but the locks."""
    return sorted(path.name for path in home.iterdir() if path.name != ".locks")


def fill(size: int):
    def build(place: Path) -> None:
        (place / "data").write_bytes(b"x" * size)

    return build


def test_ten_processes_at_once_build_once_and_all_get_it_whole(home):
    at_once = [start(STUB_SECONDS="0.2") for _ in range(10)]
    told = [process.communicate(timeout=100)[0].splitlines()[-1] for process in at_once]
    assert told == [WHOLE] * 10
    assert builds(home) == 1
    assert visible(home) == ["stub"]


@pytest.mark.parametrize("point", ["started", "file 0", "file 2", "built", "renamed"])
def test_a_process_killed_at_any_point_leaves_no_broken_entry(home, point):
    process = start(STUB_SECONDS="0.05")
    for line in process.stdout:
        if line.strip() == point:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    # Nobody sees a half: there is no entry yet, or a whole one.
    assert [each.folder.name for each in entries()] == (["stub"] if point == "renamed" else [])
    before = builds(home)
    again, _ = start().communicate(timeout=100)
    assert again.splitlines()[-1] == WHOLE
    assert builds(home) == before + (point != "renamed")
    assert visible(home) == ["stub"]


def test_who_waits_for_a_builder_that_is_killed_builds(home):
    first = start(STUB_SECONDS="60")
    assert first.stdout.readline().strip() == "started"
    second = start()
    time.sleep(0.5)
    first.kill()
    assert second.communicate(timeout=100)[0].splitlines()[-1] == WHOLE
    first.communicate()
    assert builds(home) == 2


def test_what_a_killed_builder_left_is_cleared_but_not_what_a_live_one_writes(home):
    dead = start(STUB_SECONDS="60")
    assert dead.stdout.readline().strip() == "started"
    dead_folder = home / ".building-stub"
    assert dead_folder.is_dir()
    assert remove_leftovers() == 0
    assert dead_folder.is_dir()
    dead.kill()
    dead.communicate()
    assert remove_leftovers() == 1
    assert visible(home) == []


def test_a_build_that_fails_leaves_nothing_and_the_next_one_builds(home):
    def fail(place: Path) -> None:
        (place / "half").write_bytes(b"x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        obtain_entry("one", fail)
    assert visible(home) == []
    assert (obtain_entry("one", fill(3)) / "data").read_bytes() == b"xxx"


def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(home, monkeypatch):
    monkeypatch.setenv("TILTSCOPE_CACHE_MIB", "3")
    for at, name in enumerate(("z", "m", "b")):  # not in the order of their names
        obtain_entry(name, fill(2**20))
        os.utime(home / name, (1000 + at, 1000 + at))
    end_of_process(home)
    obtain_entry("z", fill(1))  # used again: now the latest
    obtain_entry("d", fill(2**20))
    assert visible(home) == ["b", "d", "z"]
    monkeypatch.setenv("TILTSCOPE_CACHE_MIB", "1")
    assert [each.name for each in evict(cache.limit_bytes())] == ["b"]
    # z and d together are beyond the bound, but this process uses them.
    assert visible(home) == ["d", "z"]


def test_an_entry_that_another_process_uses_is_not_removed(home):
    user = start("stay")
    while (line := user.stdout.readline().strip()) != WHOLE:
        assert line
    assert not remove_entry(home / "stub")
    assert (home / "stub" / "2.bin").is_file()
    user.communicate("\n", timeout=100)
    assert remove_entry(home / "stub")
    assert visible(home) == []


@pytest.mark.parametrize("given", ["0", "-1", "much", "1.5"])
def test_a_bound_that_is_no_number_of_mib_is_refused_before_anything_is_built(home, given, monkeypatch):
    monkeypatch.setenv("TILTSCOPE_CACHE_MIB", given)
    with pytest.raises(ConfigError, match="TILTSCOPE_CACHE_MIB: got"):
        obtain_entry("one", fill(1))
    assert visible(home) == []


def test_what_is_kept_for_a_key_has_one_place_that_another_key_does_not_have(home):
    place = kept_file("choices", {"bucket": 8, "runner": "torch"})
    assert place == kept_file("choices", {"runner": "torch", "bucket": 8})
    others = (
        kept_file("choices", {"bucket": 1, "runner": "torch"}),
        kept_file("memory", {"bucket": 8, "runner": "torch"}),
    )
    assert len({place, *others}) == 3
    assert place.parent == home.parent / "choices"
    assert not place.exists()
