"""What the README says is so: its commands exist, its example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tiltscope
from tiltscope.engine.cli.main import COMMANDS
from tiltscope.engine.cli.parse import parse
from tiltscope.engine.feature.address import parse as parse_address

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_target_named_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for line in re.findall(r"make ([a-z -]+)", README) for name in line.split()}
    assert {"demo", "test", "test-slow", "lint", "types"} <= named & targets
    assert named & {"bench", "train", "wheel-check"} <= targets


def test_the_table_of_commands_is_complete_and_every_line_can_be_parsed() -> None:
    shown = re.findall(r"^\| `tiltscope ([^`]+)`", README, re.MULTILINE)
    assert [line.split()[0] for line in shown] == list(COMMANDS)
    for line in shown:
        name, *words = line.replace("FEATURE", "blocks.5:sae:1").split()
        arguments = __import__(f"tiltscope.engine.cli.{name}", fromlist=["Arguments"]).Arguments
        parse(arguments, words, prog=f"tiltscope {name}")


def test_every_address_shown_is_one() -> None:
    for address in re.findall(r"\b(?:blocks\.\d+|norm):\w+:\w+(?:@[\w,]+)?", README):
        assert str(parse_address(address)).startswith(address)


def test_exit_codes_are_those_of_the_command_line() -> None:
    assert re.findall(r"^\| (\d+) \|", README, re.MULTILINE) == ["0", "1", "2", "130"]


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out" / "index.html").is_file()


def test_the_demos_feature_is_there_and_has_a_name() -> None:
    found = re.search(r"^FEATURE \?= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    bundle = tiltscope.load("emoji64")
    assert bundle.label(bundle.feature(found[1])) is not None
