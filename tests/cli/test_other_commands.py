"""features, calibrate and doctor."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tiltscope
from tiltscope.engine.cli.features import SORTS, nearest_words, search


def info(feature: str, name: str | None, *words: str, selectivity: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(feature=feature, name=name, words=words, selectivity=selectivity, max=1.0, density=0.1)


FEATURES = [
    info("a:sae:0", "Alarm clock", "clock", "time"),
    info("a:sae:1", None, "three o'clock", "time"),
    info("a:sae:2", "flag", "country"),
    info("a:sae:3", "clockwise arrow", "arrow"),
]


class TestSearch:
    def test_names_and_words_are_told_apart(self) -> None:
        assert search(FEATURES, "CLOCK") == {"a:sae:0": "name", "a:sae:1": "words"}

    def test_all_words_of_a_search_must_be_found_together(self) -> None:
        assert search(FEATURES, "alarm clock") == {"a:sae:0": "name"}
        assert search(FEATURES, "alarm flag") == {}

    def test_a_miss_has_the_nearest_words(self) -> None:
        assert search(FEATURES, "cluck") == {}
        assert nearest_words(FEATURES, "cluck")[0] == "clock"
        assert nearest_words(FEATURES, "zzzzzz") == []


@pytest.mark.parametrize("sort", SORTS)
def test_features_as_json(cli, tiny_bundle: Path, sort: str) -> None:
    shown = json.loads(cli("features", "--sort", sort, "--json", "--bundle", tiny_bundle).out)
    assert list(shown) == ["features"]
    assert all(list(each) == ["feature", "name", "density", "max", "selectivity"] for each in shown["features"])
    assert len(shown["features"]) == len(tiltscope.load(tiny_bundle).features())
    values = [each[sort] for each in shown["features"]]
    if sort == "name":
        named = [value for value in values if value is not None]
        assert values == sorted(named, key=str.casefold) + [None] * (len(values) - len(named))
    else:
        assert values == sorted(values, reverse=True)


def test_every_listed_feature_can_be_asked_for(tiny_bundle: Path) -> None:
    bundle = tiltscope.load(tiny_bundle)
    for each in bundle.features():
        assert str(bundle.feature(each.feature).address).startswith(each.feature)


def test_a_search_shows_names_first_and_marks_words(cli, tiny_bundle: Path) -> None:
    shown = json.loads(cli("features", "--search", "red", "--json", "--bundle", tiny_bundle).out)
    where = [each["matched"] for each in shown["features"]]
    assert set(where) == {"name", "words"}
    assert where == sorted(where)
    assert all(each["name"] == "red" for each in shown["features"] if each["matched"] == "name")
    lines = cli("features", "--search", "red", "--bundle", tiny_bundle).out.splitlines()[1:]
    assert ["words of its strongest pictures: red" in line for line in lines] == [each == "words" for each in where]


def test_a_search_without_a_hit_is_an_answer(cli, tiny_bundle: Path) -> None:
    done = cli("features", "--search", "rod", "--bundle", tiny_bundle)
    assert done.code == 0
    assert "'rod'" in done.out
    assert "red" in done.out
    shown = json.loads(cli("features", "--search", "rod", "--json", "--bundle", tiny_bundle).out)
    assert shown["features"] == []
    assert "red" in shown["nearest"]


def test_hook_chooses(cli, tiny_bundle: Path) -> None:
    shown = json.loads(cli("features", "--hook", "blocks.1", "--json", "--bundle", tiny_bundle).out)
    assert {each["feature"].split(":")[0] for each in shown["features"]} == {"blocks.1"}


def test_calibrate_prints_what_python_finds(cli, tiny_bundle: Path) -> None:
    bundle = tiltscope.load(tiny_bundle)
    natural = bundle.pool.activations(bundle.feature("blocks.1:sae:7"))
    target = float(natural.mean() + 0.3 * natural.std())
    shown = json.loads(
        cli("calibrate", "blocks.1:sae:7", "--target-activation", target, "--json", "--bundle", tiny_bundle).out
    )
    found = tiltscope.calibrate(natural, target)
    for name in ("lam", "kl", "log_z", "ess", "max_weight", "feasible"):
        assert shown[name] == getattr(found, name)
    weights = tiltscope.tilt_weights(natural, shown["lam"])
    assert np.dot(weights, natural) == pytest.approx(target, rel=1e-6)
    assert shown["natural_mean"] == natural.mean()


def test_calibrate_out_of_reach_exits_2_and_still_prints_its_numbers(cli, tiny_bundle: Path) -> None:
    words = ("calibrate", "blocks.1:sae:7", "--quiet", "--json", "--bundle", str(tiny_bundle), "--target-activation")
    for target, reason in (("99", "largest reachable"), ("-1", "lambda would be 0")):
        done = cli(*words, target)
        assert done.code == 2
        assert reason in done.err
        assert json.loads(done.out)["feasible"] is False
    assert json.loads(done.out)["lam"] == 0


def test_doctor_verifies_the_bundle(cli, tiny_bundle: Path, tmp_path: Path) -> None:
    done = cli("doctor", "--json", "--bundle", tiny_bundle)
    shown = json.loads(done.out)
    assert (done.code, shown["ok"], shown["problems"]) == (0, True, [])
    assert shown["bundle"]["verified"]
    assert shown["runners"][0] == {
        "runner": "torch",
        "in_this_version": True,
        "available": True,
        "missing": [],
        "lacking": None,
        "install": None,
    }
    assert shown["versions"]["torch"]
    assert shown["machine"]["processors"] >= 1


def test_doctor_tells_a_damaged_bundle_and_exits_2(cli, tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    damaged = Path(shutil.copytree(tiny_bundle, tmp_path / "damaged"))
    (damaged / "sae" / "sae.safetensors").write_bytes(b"")
    done = cli("doctor", "--json", "--quiet", "--bundle", damaged)
    assert done.code == 2
    assert "sae/sae.safetensors" in done.err
    assert json.loads(done.out)["ok"] is False
    assert "not usable" in cli("doctor", "--quiet", "--bundle", damaged).out


def test_doctor_names_the_extra_of_a_runner_that_lacks_its_library(cli, tiny_bundle: Path, monkeypatch) -> None:
    from tiltscope.engine.cli import doctor

    monkeypatch.setattr(doctor, "runner_names", lambda: ("torch", "onnx"))
    monkeypatch.setattr(doctor, "_missing", lambda extra: ["onnxruntime"])
    shown = cli("doctor", "--quiet", "--bundle", tiny_bundle).out
    assert "runner     onnx: missing onnxruntime: pip install 'tiltscope[onnx]'" in shown
    assert "runner     tensorrt: not part of this version" in shown
