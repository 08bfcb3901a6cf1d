"""compare() on a tiny bundle: every method a row, at one activation, with numbers that are about it; what it writes."""

import json
import math
import re
import shlex

import numpy as np
import pyarrow.parquet as pq
import pytest

import tiltscope
from tiltscope.engine.cli.compare import Arguments
from tiltscope.engine.cli.main import run
from tiltscope.engine.cli.parse import parse
from tiltscope.engine.compare import RIVALS, compare
from tiltscope.engine.config import CompareConfig
from tiltscope.engine.presets import PRESETS
from tiltscope.engine.report.comparison import plot_png
from tiltscope.engine.report.page import methods_of

FEATURE = "blocks.1:neuron:3@mean"
CONFIG = CompareConfig(
    num=4,
    steps=(5,),
    lifts=("dps",),
    solvers=("ddpm", "euler"),
    presets=("paper_exact",),
    calibration_num=64,
    target_quantile=0.7,
)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    """Its random prior and its pictures agree on nothing: here the pictures' activations are what the prior draws."""
    bundle = tiltscope.load(str(tiny_bundle))
    drawn = (
        tiltscope.sample(bundle.prior, bundle.feature(FEATURE), num=40, lam=0.0, steps=5).activation.double().numpy()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bundle.pool), "activations", lambda self, of: drawn.copy())
        yield bundle


@pytest.fixture(scope="module")
def comparison(bundle, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILTSCOPE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setitem(PRESETS["paper_exact"].settings, "steps", 5)
        yield compare(bundle, FEATURE, CONFIG)


def test_every_method_has_its_row(comparison):
    names = [each.name for each in comparison.methods]
    assert names == ["dps, ddpm, 5 steps", "dps, euler, 5 steps", "paper_exact", *RIVALS]
    tilts = [each for each in comparison.methods if each.kind == "sampler" and each.note is None]
    assert len(tilts) >= 2
    for method in comparison.methods:
        if method.note is None or method.kind == "rival":
            assert len(method.samples) <= 4
            assert method.metrics["activation_mean"] == pytest.approx(float(method.samples.activation.mean()), abs=1e-5)
            assert method.metrics["vendi"] >= 1
            assert math.isfinite(method.metrics["bits_per_dim"])
    by_name = {each.name: each for each in comparison.methods}
    assert by_name["topk"].excess_kl_kind == by_name["hard"].excess_kl_kind == "exact"
    assert by_name["topk"].metrics["kl"] == pytest.approx(math.log(40 / 4))
    assert by_name["actmax"].excess_kl_kind is None
    assert tilts[0].excess_kl_kind == "lower bound"
    assert tilts[0].kl_source == "integration"
    assert tilts[0].metrics["kl"] > 0
    assert tilts[0].metrics["nfe"] == 5


def test_the_published_scale_has_no_kl(comparison):
    method = next(each for each in comparison.methods if each.name == "paper_exact")
    assert method.metrics.get("kl") is None


def test_a_curve_runs_over_lambda_from_nothing(comparison):
    for name in {each.method for each in comparison.curves}:
        lams = np.array([each.lam for each in comparison.curves if each.method == name])
        at = next(each.lam for each in comparison.methods if each.name == name)
        np.testing.assert_allclose(np.sort(lams / at), [0, 0.5, 1, 2], atol=1e-9)
    assert all(each.num == 4 and each.activation_se > 0 for each in comparison.curves)


def test_what_is_written_says_all_of_it(comparison, tmp_path):
    out = comparison.save(tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"] == "compare"
    assert [each["name"] for each in manifest["methods"]] == [each.name for each in comparison.methods]
    table = pq.read_table(out / "methods.parquet").to_pylist()
    assert table[0]["naturalness"] == comparison.methods[0].metrics["naturalness"]
    assert pq.read_table(out / "curves.parquet").num_rows == len(comparison.curves)
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "index.html").read_text()
    assert "dps, ddpm, 5 steps" in page
    assert "≥" in page or comparison.methods[0].metrics["excess_kl"] is None
    assert "<script" not in page
    assert plot_png(comparison) == (out / "compare.png").read_bytes()


def test_the_command_repeats_itself(comparison):
    words = shlex.split(comparison.manifest["repeat"])
    assert words[:2] == ["tiltscope", "compare"]
    words = words[2 : words.index("--bundle")]
    again = parse(Arguments, words, prog="tiltscope compare")
    assert again.config == CONFIG
    assert again.feature == FEATURE


def test_on_the_command_line(bundle, tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    asked = ["compare", FEATURE, "--bundle", str(tiny_bundle), "--out", str(tmp_path / "out"), "--quiet"]
    asked += ["--num", "2", "--steps", "2", "--lifts", "dps", "--solvers", "ddpm", "--no-likelihood", "--seed", "3"]
    assert run([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(tmp_path / "out")
    assert told["config"]["likelihood"] is False
    assert "--no-likelihood" in told["repeat"]
    assert run(asked) == 0
    assert "Excess KL" in capsys.readouterr().out
    assert run([*asked, "--num", "3"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_section_of_an_explanations_page(bundle, tiny_bundle, tmp_path, monkeypatch, capsys):
    """Beside the four answers, in place of an earlier one, and kept when the explanation is drawn again."""
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path / "home"))
    folder, shared = tmp_path / "explained", ["--bundle", str(tiny_bundle), "--quiet", "--target-quantile", "0.7"]
    explain = ["explain", FEATURE, "--out", str(folder), *shared, "--num", "2", "--steps", "2"]
    explain += ["--calibration", "pool"]
    asked = ["compare", FEATURE, *shared, "--num", "2", "--steps", "2", "--lifts", "dps", "--solvers", "ddpm"]
    asked += ["--no-likelihood", "--page", str(folder)]
    assert run(asked) == 2
    assert "holds no finished explanation" in capsys.readouterr().err
    assert run(explain) == 0
    before = (folder / "index.html").read_text()
    assert "Methods at one activation" not in before
    for _ in range(2):
        assert run(asked) == 0
    page = (folder / "index.html").read_text()
    assert page.count("Methods at one activation") == 1
    assert "dps, ddpm, 2 steps" in page
    assert page.replace(methods_of(page), "") == before
    assert json.loads((folder / "compare" / "manifest.json").read_text())["command"] == "compare"
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers)) > 8
    capsys.readouterr()
    assert run(explain) == 0
    again = (folder / "index.html").read_text()
    assert methods_of(again) == methods_of(page) != ""

    assert run([*asked, "--target-quantile", "0.6"]) == 2
    assert "give --target-activation" in capsys.readouterr().err
    assert run([*asked, "--out", str(tmp_path / "other")]) == 2
    assert "out and page: got both" in capsys.readouterr().err
    other = [word if word != FEATURE else "blocks.1:neuron:4@mean" for word in asked]
    assert run(other) == 2
    assert "another feature" in capsys.readouterr().err
    assert (folder / "index.html").read_text() == again


def test_a_sampler_that_cannot_reach_the_target_keeps_a_row_that_says_so(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("TILTSCOPE_HOME", str(tmp_path))
    config = CompareConfig(
        num=2,
        steps=(1,),
        lifts=("none",),
        solvers=("euler",),
        likelihood=False,
        target_z=1.1,
        calibration_num=16,
    )
    found = compare(bundle, FEATURE, config)
    assert found.methods[0].metrics == {}
    assert "not reached" in found.methods[0].note or "out of this sampler" in found.methods[0].note
    assert [each.name for each in found.methods[1:]] == list(RIVALS)
    found.save(tmp_path / "out")
