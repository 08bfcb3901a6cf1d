"""`tiltscope sample`: what lands on disk, that it continues, and that what is finished survives every way of ending."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiltscope
from tiltscope.engine.report import writer

FEATURE = "blocks.1:sae:3"
SETTINGS = ("--lam", "1.5", "--steps", "3", "--batch-size", "2")
COMMAND = ("sample", FEATURE, *SETTINGS, "--quiet")


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which holds times."""
    found = (each for each in folder.rglob("*") if each.is_file() and each.name != "manifest.json")
    return {each.relative_to(folder).as_posix(): each.read_bytes() for each in found}


def test_the_pictures_are_those_of_python(cli, folder: Path, tiny_bundle: Path) -> None:
    done = cli(*COMMAND, "--num", "5", "--bundle", tiny_bundle, "--out", "out", "--json")
    assert done.code == 0
    manifest = json.loads(done.out)
    assert manifest == json.loads((folder / "out" / "manifest.json").read_text()) | {"out": "out"}
    bundle = tiltscope.load(tiny_bundle)
    samples = tiltscope.sample(bundle.prior, bundle.feature(FEATURE), num=5, lam=1.5, steps=3, batch_size=2)
    held = load_file(folder / "out" / "samples.safetensors")
    for name in ("x0", "activation", "drive", "lam", "index", "nfe", "n_vjp", "ok"):
        assert torch.equal(held[name], getattr(samples, name)), name
    assert (manifest["num_finished"], manifest["config"]["num"], len(manifest["samples"])) == (5, 5, 5)
    assert manifest["bundle"] == bundle.describe()


def test_the_command_in_the_manifest_repeats_the_run(cli, folder: Path, tiny_bundle: Path) -> None:
    assert cli(*COMMAND, "--num", "2", "--bundle", tiny_bundle, "--out", "first").code == 0
    words = shlex.split(json.loads((folder / "first" / "manifest.json").read_text())["repeat"])
    assert words[:3] == ["tiltscope", "sample", FEATURE]
    at = words.index("--bundle")  # by name; the tiny bundle is known by its folder only
    words = words[1:at] + words[at + 2 :]
    assert cli(*words, "--quiet", "--bundle", tiny_bundle, "--out", "second").code == 0
    assert files(folder / "first") == files(folder / "second")


def test_the_default_folder_is_named_by_the_identity(cli, folder: Path, tiny_bundle: Path) -> None:
    done = cli(*COMMAND, "--num", "1", "--bundle", tiny_bundle, "--json")
    manifest = json.loads(done.out)
    assert [each.name for each in folder.iterdir()] == [f"tiltscope-{manifest['identity'][:8]}"] == [manifest["out"]]


def test_a_longer_run_continues_a_shorter_one(cli, folder: Path, tiny_bundle: Path, monkeypatch) -> None:
    drawn: list[int] = []
    add = writer.SampleWriter.add
    monkeypatch.setattr(
        writer.SampleWriter, "add", lambda self, chunk: (drawn.extend(chunk.index.tolist()), add(self, chunk))
    )
    assert cli(*COMMAND, "--num", "3", "--bundle", tiny_bundle, "--out", "out").code == 0
    assert cli(*COMMAND, "--num", "6", "--bundle", tiny_bundle, "--out", "out").code == 0
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert cli(*COMMAND, "--num", "6", "--bundle", tiny_bundle, "--out", "at-once").code == 0
    assert files(folder / "out") == files(folder / "at-once")


def test_particles_are_kept_and_their_evidence_is_of_every_part_of_a_continued_run(
    cli, folder: Path, tiny_bundle: Path
) -> None:
    def run(num: str, out: str) -> dict:
        done = cli(*COMMAND, "--particles", "3", "--num", num, "--bundle", tiny_bundle, "--out", out, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    run("2", "out")
    continued, at_once = run("5", "out"), run("5", "at-once")
    assert files(folder / "out") == files(folder / "at-once")
    bundle = tiltscope.load(tiny_bundle)
    settings = {"lam": 1.5, "steps": 3, "batch_size": 2, "particles": 3}
    samples = tiltscope.sample(bundle.prior, bundle.feature(FEATURE), num=5, **settings)
    for manifest in (continued, at_once):
        for name in ("log_z", "kl", "ess"):
            assert manifest[name]["source"] == "smc"
            assert manifest[name]["value"] == pytest.approx(getattr(samples, name), rel=1e-5)
        assert manifest["log_z"]["se"] == pytest.approx(samples.manifest["log_z"]["se"], rel=1e-5)
    held = load_file(folder / "out" / "samples.safetensors")
    for name in ("weights", "particle_activation", "group_log_z", "lineages"):
        assert torch.equal(held[name], getattr(samples, name)), name


def test_an_interrupt_inside_a_write_keeps_the_chunk_and_the_same_command_continues(
    cli, folder: Path, tiny_bundle: Path, monkeypatch
) -> None:
    add, calls = writer.SampleWriter.add, []

    def interrupted(self, chunk) -> None:
        calls.append(len(chunk))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        add(self, chunk)

    monkeypatch.setattr(writer.SampleWriter, "add", interrupted)
    done = cli(*COMMAND, "--num", "6", "--bundle", tiny_bundle, "--out", "out")
    assert done.code == 130
    assert done.err == "tiltscope sample: interrupted; 4 of 6 samples are kept in out; the same command continues\n"
    assert len(list((folder / "out" / "samples").glob("*.png"))) == 4
    assert json.loads((folder / "out" / "manifest.json").read_text())["num_finished"] == 4
    assert cli(*COMMAND, "--num", "6", "--bundle", tiny_bundle, "--out", "out").code == 0
    assert calls == [2, 2, 2]
    assert cli(*COMMAND, "--num", "6", "--bundle", tiny_bundle, "--out", "at-once").code == 0
    assert files(folder / "out") == files(folder / "at-once")


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_a_disk_that_fills_up(cli, folder: Path, tiny_bundle: Path, monkeypatch, full_at: int) -> None:
    write, calls = writer.write_tensors, []

    def full(path: Path, *rest) -> None:
        calls.append(path)
        if len(calls) > full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_tensors", full)
        done = cli(*COMMAND, "--num", "6", "--bundle", tiny_bundle, "--out", "out")
    assert done.code == 1
    assert "No space left on device" in done.err
    assert (f"{2 * full_at} of 6 samples are kept in out" if full_at else "nothing was finished") in done.err
    assert done.err.count("\n") == 1
    assert len(list((folder / "out" / "samples").glob("*.png"))) >= 2 * full_at
    # With room again the same command ends as if nothing had happened.
    assert cli(*COMMAND, "--num", "6", "--bundle", tiny_bundle, "--out", "out").code == 0
    assert cli(*COMMAND, "--num", "6", "--bundle", tiny_bundle, "--out", "at-once").code == 0
    assert files(folder / "out") == files(folder / "at-once")


def test_progress_goes_to_stderr_in_plain_lines(cli, tiny_bundle: Path, monkeypatch) -> None:
    monkeypatch.setattr("tiltscope.engine.cli.screen.PLAIN_EVERY", 0.0)
    words = [word for word in COMMAND if word != "--quiet"]
    done = cli(*words, "--num", "4", "--bundle", tiny_bundle, "--json")
    json.loads(done.out)
    lines = done.err.splitlines()
    assert lines[0].endswith("...")
    assert any("step 6 of 6, 4 of 4 samples" in line for line in lines), lines
    assert "\r" not in done.err
    assert "\x1b" not in done.err


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(folder: Path, tiny_bundle: Path) -> None:
    words = [*COMMAND, "--num", "60", "--bundle", str(tiny_bundle), "--out", "out"]
    command = [sys.executable, "-m", "tiltscope", *words]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("out/samples/*.png"))) < 4:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert "interrupted" in err
    assert "the same command continues" in err
    assert err.count("\n") == 1
    kept = len(list(folder.glob("out/samples/*.png")))
    assert 4 <= kept < 60
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run([*command[:-1], "at-once"], check=True, capture_output=True)
    assert files(folder / "out") == files(folder / "at-once")
