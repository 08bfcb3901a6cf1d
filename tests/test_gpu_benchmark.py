"""`make gpu`: refused without a device, and its four steps walked on the CPU, so that a stranger's path was executed before."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def at(gpu, tmp_path, monkeypatch):
    """A dry place in a folder of the test's own, with a gate that is no test run."""
    monkeypatch.setattr(gpu.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(gpu, "_tiny_bundle", lambda folder: "none")
    return gpu.place(dry=True)


def test_without_a_device_it_exits_2_and_says_what_to_do(gpu, capsys):
    if torch.cuda.is_available():
        return
    assert gpu.main([]) == 2
    said = capsys.readouterr().err
    assert "need a CUDA device" in said
    assert "DRY=1" in said


def test_what_no_gate_of_this_revision_passed_is_not_timed(gpu, at, capsys, monkeypatch):
    gpu.record(at, {"step": "device"} | gpu.describe(at))
    assert gpu.bench(at) == 1
    gpu.record(at, {"step": "gate", "revision": "0" * 40, "passed": []})
    assert gpu.bench(at) == 1
    assert "the gate has not passed for revision" in capsys.readouterr().err
    gpu.record(at, {"step": "gate", "revision": gpu.revision(), "passed": []})
    monkeypatch.setattr(gpu, "BENCHES", {"none": lambda at: [{"case": "nothing", "times": {}}]})
    assert gpu.bench(at) == 0
    # A later change takes the permission back.
    monkeypatch.setattr(gpu, "revision", lambda: "f" * 40 + "-dirty")
    assert gpu.bench(at) == 1


def test_a_gate_that_fails_ends_the_run(gpu, at, monkeypatch):
    monkeypatch.setattr(gpu, "gate", lambda at: 5)
    monkeypatch.setattr(gpu, "bench", lambda at: pytest.fail("timed what is not correct"))
    assert gpu.main(["--dry"]) == 5


def test_cells_that_need_a_gpu_say_that_none_was_recorded(gpu):
    committed = (ROOT / "docs" / "gpu.md").read_text()
    recorded = list((ROOT / "benchmarks" / "results").glob("gpu-*.jsonl"))
    shown = committed.partition(gpu.START)[2].partition(gpu.END)[0].strip()
    rows = [row for path in sorted(recorded) for row in gpu._rows_of(path)]
    assert shown == gpu.table(rows)
    assert (gpu.NOT_MEASURED in shown) == (not recorded)


@pytest.mark.slow
def test_the_same_four_steps_on_the_cpu(tmp_path):
    import os

    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry"],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.glob("tiltscope-gpu-dry-*")
    lines = [json.loads(line) for line in (folder / "gpu-dry.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:2]] == ["device", "gate"]
    benches = {line["bench"]: line for line in lines[2:]}
    assert set(benches) == {"fused", "ticks", "pictures"}
    assert set(benches["fused"]["times"]) == {"fused", "torch", "torch.compile"}
    assert set(benches["ticks"]["times"]) == {"graph", "eager"}
    assert benches["pictures"]["max_difference"] == 0
    assert all(line["revision"] == lines[0]["revision"] for line in lines)
    report = (folder / "gpu.md").read_text()
    assert "| dry | guided_step 2x3x8x8 | torch.compile |" in report
    # A walk leaves nothing where results are kept.
    assert not (ROOT / "benchmarks" / "results" / "gpu-dry.jsonl").exists()
