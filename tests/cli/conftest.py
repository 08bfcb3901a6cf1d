"""The command line in this process: its exit code and what it printed, run from an empty folder."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tiltscope.engine.cli.main import run


class Done(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    inside = tmp_path / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    return inside


@pytest.fixture
def cli(folder: Path, capfd: pytest.CaptureFixture[str]) -> Cli:
    """cli("sample", "FEATURE", ...) -> Done"""

    def call(*words: object) -> Done:
        capfd.readouterr()
        code = run([str(word) for word in words])
        printed = capfd.readouterr()
        return Done(code, printed.out, printed.err)

    return call
