"""What is timed was checked first, ways take turns, and the plain baseline computes the engine's own numbers."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

import tiltscope
from tiltscope.engine.bench import cases, growth
from tiltscope.engine.bench.plain import PlainStep
from tiltscope.engine.bench.timing import Timing, interleave
from tiltscope.engine.cli.main import run
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.readout import read
from tiltscope.engine.prepare import prepare
from tiltscope.engine.runtime.step import TorchStep
from tiltscope.engine.sampler.plan import GraphKind
from tiltscope.kernels import dispatch

FEATURE = "blocks.1:sae:3"


@pytest.fixture(scope="module")
def options(tiny_bundle):
    return cases.Options(
        bundle=tiltscope.load(tiny_bundle),
        feature=FEATURE,
        runners=("torch",),
        seconds=0.01,
        steps=3,
        batches=(2,),
    )


def test_ways_take_turns_in_alternating_order_after_one_call_each():
    called = []
    found = interleave({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, seconds=0)
    assert "".join(called) == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert found["a"].turns == found["b"].turns == 5
    assert found["a"].p20 <= found["a"].p50 <= found["a"].p80


def test_a_settled_way_is_timed_right_after_a_call_of_its_own():
    called = []
    ways = {
        name: lambda name=name: (called.append(name), time.sleep(0.02 if called[-2:-1] != [name] else 0))
        for name in "ab"
    }
    found = interleave(ways, seconds=0, settle=True)
    assert "".join(called) == "ab" + "aabb" + "bbaa" + "aabb" + "bbaa" + "aabb"
    assert max(each.p80 for each in found.values()) < 20


def test_the_plain_baseline_computes_what_the_engine_does(options):
    feature = options.bundle.feature(FEATURE)
    x, sigma, alpha = cases.noisy(options.bundle.prior, 3)
    mine = TorchStep(options.bundle.prior, feature).guided(x, sigma, alpha, feature.readout.expand(3))
    for got, wanted in zip(PlainStep(options.bundle, feature)(x, cases.LEVEL), mine, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooled", ["blocks.1:sae:3@max", "blocks.1:neuron:3"])
def test_the_plain_baseline_refuses_what_it_was_not_written_for(options, pooled):
    with pytest.raises(ConfigError, match="pooled over the centre"):
        PlainStep(options.bundle, options.bundle.feature(pooled))


@pytest.mark.parametrize("case", ["row", "picture", "host"])
def test_a_case_times_every_way_beside_its_baseline(options, case):
    lines = list(cases.CASES[case](options))
    assert all(line.timing is not None and line.timing.turns >= 5 for line in lines)
    ways = [line.way for line in lines]
    assert ways == (["torch"] if case == "host" else ["plain", "torch"])
    if case != "host":
        assert lines[0].faster is None
        assert lines[1].faster == lines[0].timing.p50 / lines[1].timing.p50


def test_the_update_is_timed_by_every_implementation_that_is_here(options, monkeypatch):
    # Without "compiled": torch.compile does not trace the type checks that tests run under (tests/kernels/test_dispatch.py does).
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", ("reference", "native", "triton"))
    lines = list(cases.update(options))
    assert {line.way for line in lines if line.timing is not None} == {"reference", "native"}
    assert [line.way for line in lines if line.refused] == ["triton"]


def test_one_row_of_a_convolutional_encoder_is_its_latent(options):
    lines = list(cases.sae_rows(options, encoder=(8, 24, 3, 6)))
    assert [line.way for line in lines] == ["encoder", "row"]
    assert lines[1].refused is None
    # Its bound is that of one latent's products, of 24: the gradient of the tokens too.
    assert lines[0].more["bound_ms"] > 10 * lines[1].more["bound_ms"] > 0


def test_another_row_than_the_encoders_is_not_timed(options, monkeypatch):
    monkeypatch.setattr(cases, "read", lambda tokens, own: (1.001 * read(tokens, own)[0], None))
    (line,) = cases.sae_rows(options, encoder=(8, 24, 3, 6))
    assert "activation differs" in line.refused


def test_what_differs_from_the_reference_is_not_timed(options, monkeypatch):
    class Off(PlainStep):
        def __call__(self, x, level):
            x0_hat, activation, drive, grad_a = super().__call__(x, level)
            return x0_hat, activation, drive, 1.01 * grad_a

    monkeypatch.setattr(cases, "PlainStep", Off)
    refused = next(cases.row(options))
    assert refused.timing is None
    assert "grad_a differs from the reference by 1.0e-02" in refused.refused


def test_the_command_prints_one_json_object_and_appends_it(tiny_bundle, tmp_path, capsys):
    words = ["bench", "host", "--batch", "1", "--seconds", "0.01", "--bundle", str(tiny_bundle), "--quiet"]
    assert run([*words, "--json", "--out", str(tmp_path / "kept.jsonl")]) == 0
    shown = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "kept.jsonl").read_text())
    assert shown["lines"] == kept["lines"]
    assert shown["lines"][0]["more"]["us_a_row"] > 0
    assert kept["machine"]["processors"] >= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nonsense"], "got nonsense, allowed are row"), (["host", "--batch", "0"], "allowed are numbers from 1")],
)
def test_wrong_requests_exit_with_two(words, said, capsys):
    assert run(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_batches_of_the_options_decide_the_settings(options):
    lines = list(cases.host(replace(options, batches=(1, 3))))
    assert [line.setting for line in lines] == ["batch 1", "batch 3"]


def test_growth_tells_the_exponent_of_times_over_each_size(options, monkeypatch):
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
    monkeypatch.setattr(growth, "ROWS", (2, 4))
    monkeypatch.setattr(growth, "FEATURES", (1, 2))
    drawn = []
    monkeypatch.setattr(growth, "prepare", lambda *asked: drawn.append(prepare(*asked)) or drawn[-1])
    lines = list(growth.growth(options))
    assert all((run.plan.kind == GraphKind.GUIDED).all() for run in drawn)
    assert [line.setting for line in lines] == ["batch 1", "batch 2", "rows 2", "rows 4", "features 1", "features 2"]
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        expected = math.log2(second.timing.p50 / first.timing.p50)
        assert first.more["exponent"] == second.more["exponent"] == pytest.approx(expected)


def test_the_exponent_is_that_of_the_law_behind_the_times():
    def took(ms):
        return Timing(p20=ms, p50=ms, p80=ms, turns=5, first_ms=ms)

    assert growth.exponent({n: took(3.0 * n**0.8) for n in (1, 2, 4, 8)}) == pytest.approx(0.8)
