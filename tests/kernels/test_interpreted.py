"""Runs tests/kernels/interpreted in a process of its own: Triton's interpreter is chosen when triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(*options: str) -> tuple[int, int, str]:
    """-> (exit code, tests passed, what was printed)"""
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted", *options],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    passed = re.search(r"(\d+) passed", made.stdout)
    return made.returncode, int(passed[1]) if passed else 0, made.stdout[-6000:] + made.stderr[-2000:]


def test_kernels_under_the_interpreter_are_their_definitions() -> None:
    code, passed, printed = run_interpreted()
    assert code == 0, printed
    assert passed > 0, printed


@pytest.mark.slow
def test_kernels_under_the_interpreter_at_every_batch_and_size() -> None:
    code, passed, printed = run_interpreted("-m", "slow")
    assert code == 0, printed
    assert passed > 0, printed
