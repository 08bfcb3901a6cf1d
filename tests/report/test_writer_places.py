"""Another run's folder, or a place that cannot be written, is refused with nothing written."""

import json
from pathlib import Path
from typing import Any

import pytest
from written_samples import FACTS, OTHER, RUN, draw

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.report.writer import SampleWriter, check_folder


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
