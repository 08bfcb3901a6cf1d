"""The example service answers every line, in whatever order, and a wrong one alone is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "service_loop.py"


@pytest.mark.slow
def test_the_example_answers_what_it_is_asked(tmp_path):
    lines = [
        {"feature": "blocks.5:sae:1169", "num": 2, "lam": 0.8, "steps": 3},
        {"feature": "blocks.9:sae:1", "num": 1, "lam": 0.8},
        {"feature": "blocks.5:sae:131", "num": 1, "lam": 0.8, "steps": 2},
    ]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path)],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    answers = {each["request"]: each for each in map(json.loads, done.stdout.splitlines())}
    assert "blocks.9" in answers[1]["error"]
    assert len(answers[0]["activation"]) == 2
    assert (Path(answers[2]["folder"]) / "samples.safetensors").is_file()
