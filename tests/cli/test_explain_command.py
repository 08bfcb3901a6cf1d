"""`tiltscope explain`: what it prints, what lies in OUT, and that --json is the manifest."""

import json
from pathlib import Path

import pytest

import tiltscope

FEATURE = "blocks.1:sae:7"
COMMAND = ("explain", FEATURE, "--steps", "3", "--num", "3", "--lam", "1.0")
METRICS = (
    "activation_mean",
    "activation_se",
    "drive_mean",
    "z",
    "percentile",
    "selectivity_rank",
    "naturalness",
    "naturalness_se",
    "nearest_distance",
    "diversity",
    "kl",
    "log_z",
    "ess",
    "excess_kl",
    "seconds",
    "nfe",
    "n_vjp",
)


def test_json_is_the_manifest_and_where_it_lies(cli, folder: Path, tiny_bundle: Path) -> None:
    done = cli(*COMMAND, "--quiet", "--json", "--bundle", tiny_bundle)
    assert done.code == 0
    assert done.err == ""
    shown = json.loads(done.out)
    out = Path(shown.pop("out"))
    assert shown == json.loads((out / "manifest.json").read_text())
    assert out == Path(f"tiltscope-{shown['identity'][:8]}")
    assert set(shown["metrics"]) == {"tilt", "topk", "hard", "actmax"}
    assert all(set(each) == set(METRICS) for each in shown["metrics"].values())
    for name in ("index.html", "samples.png", "samples.safetensors", "samples/metadata.jsonl", "samples/000_seed0.png"):
        assert (out / name).stat().st_size > 0
    for answer in shown["metrics"]:
        assert (out / "answers" / answer / "samples.safetensors").exists()


def test_the_terminal_shows_page_name_and_table(cli, folder: Path, tiny_bundle: Path) -> None:
    done = cli(*COMMAND, "--quiet", "--bundle", tiny_bundle, "--out", "out")
    assert done.code == 0
    for shown in ("tilt", "top-K", "hard", "act. max.", "Mean activation", "Naturalness", "KL from natural"):
        assert shown in done.out
    bundle = tiltscope.load(tiny_bundle)
    name = bundle.label(bundle.feature(FEATURE))
    assert name is not None
    assert f"{FEATURE} ({name})" in done.out
    assert str((folder / "out" / "index.html").resolve()) in done.out.replace("\n", "")


def test_the_numbers_on_the_terminal_are_the_manifests(cli, folder: Path, tiny_bundle: Path) -> None:
    done = cli(*COMMAND, "--quiet", "--bundle", tiny_bundle, "--out", "out")
    metrics = json.loads((folder / "out" / "manifest.json").read_text())["metrics"]
    row = next(line for line in done.out.splitlines() if "Mean activation" in line)
    means = [cell.partition("±")[0].strip() for cell in row.split("│")[2:6]]
    assert means == [f"{metrics[answer]['activation_mean']:.2f}" for answer in ("tilt", "topk", "hard", "actmax")]


def test_the_same_command_again_gives_the_same_pictures(cli, folder: Path, tiny_bundle: Path) -> None:
    pictures = []
    for _ in range(2):
        assert cli(*COMMAND, "--quiet", "--bundle", tiny_bundle, "--out", "out").code == 0
        pictures.append({each: each.read_bytes() for each in sorted((folder / "out").rglob("*.png"))})
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) > 12


def test_an_interrupt_leaves_no_half_written_answer(cli, folder: Path, tiny_bundle: Path, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tiltscope.engine.explain.activation_maximisation", interrupted)
        done = cli(*COMMAND, "--quiet", "--bundle", tiny_bundle, "--out", "out")
    assert done.code == 130
    assert "the same command" in done.err
    assert cli(*COMMAND, "--quiet", "--bundle", tiny_bundle, "--out", "out").code == 0


@pytest.mark.parametrize("flag", [("--target-quantile", "0.8"), ("--target-activation", "1.5"), ()])
def test_every_way_to_say_a_target(cli, tiny_bundle: Path, flag: tuple[str, ...]) -> None:
    words = ("explain", FEATURE, "--steps", "2", "--num", "2", "--calibration", "pool", "--quiet", "--json", *flag)
    shown = json.loads(cli(*words, "--bundle", tiny_bundle).out)
    assert shown["calibration"]["ess"] >= 10 * (1 - 1e-6)
    if flag == ("--target-activation", "1.5"):
        assert shown["target"] == 1.5
    if flag == ("--target-quantile", "0.8"):
        assert shown["target_quantile"] == pytest.approx(0.8, abs=0.03)
