"""Flags and config are one thing: every field is a flag, every value goes through, every complaint is one sentence."""

from dataclasses import fields

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tiltscope.engine.cli.explain import Arguments as ExplainArguments
from tiltscope.engine.cli.main import COMMANDS, run
from tiltscope.engine.cli.parse import parse
from tiltscope.engine.cli.sample import Arguments as SampleArguments
from tiltscope.engine.config import ExplainConfig, SampleConfig
from tiltscope.errors import ConfigError

finite = st.floats(allow_nan=False, allow_infinity=False)


def read(*words: str) -> SampleConfig:
    return parse(SampleArguments, ["blocks.1:sae:3", *words], prog="tiltscope sample").config


@given(
    num=st.integers(1, 1_000_000),
    lam=finite,
    steps=st.integers(1, 100_000),
    seed=st.integers(0, 2**64 - 1),
    interval=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).map(tuple),
    solver=st.sampled_from(["ddpm", "heun", "ddim(eta=0.5)"]),
)
def test_a_config_written_as_flags_is_read_back(num, lam, steps, seed, interval, solver) -> None:
    config = SampleConfig(num=num, lam=lam, steps=steps, seed=seed, guidance_interval=interval, solver=solver)
    words = [f"--num={num}", f"--lam={lam!r}", "--steps", str(steps), "--seed", str(seed), "--solver", solver]
    assert read(*words, f"--guidance-interval={interval[0]!r},{interval[1]!r}") == config


@given(
    values=st.lists(finite, min_size=1, max_size=6), indices=st.sets(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
)
def test_lists_are_comma_separated(values, indices) -> None:
    lam = tuple(values)
    read_lam = read(f"--lam={','.join(map(repr, lam))}", "--num", str(len(lam))).lam
    assert read_lam == (lam if len(lam) > 1 else lam[0])
    assert read(f"--indices={','.join(map(str, indices))}", f"--num={len(indices)}").indices == tuple(indices)


def test_a_feature_may_follow_a_list() -> None:
    arguments = parse(SampleArguments, ["--lam", "1,2", "--num", "2", "blocks.1:sae:3"], prog="tiltscope sample")
    assert (arguments.feature, arguments.config.lam) == ("blocks.1:sae:3", (1.0, 2.0))


def test_without_flags_the_config_is_the_default() -> None:
    assert parse(ExplainArguments, ["a:b:c"], prog="tiltscope explain").config == ExplainConfig()


@pytest.mark.parametrize(("command", "config"), [("sample", SampleConfig), ("explain", ExplainConfig)])
def test_every_setting_is_a_flag_with_a_word_of_help(command, config, capsys) -> None:
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for each in fields(config):
        assert f"--{each.name.replace('_', '-')} " in shown
    for name in ("--bundle", "--out", "--json", "--quiet", "--debug"):
        assert name in shown


def test_the_overview_names_every_command(capsys) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in shown] == []


def test_a_long_complaint_is_not_cut() -> None:
    word = "--" + "x" * 60
    with pytest.raises(ConfigError, match=f"{word}.*is not an option here; see tiltscope sample --help"):
        read(word)


def test_a_refusal_of_the_config_is_passed_on_as_it_is() -> None:
    with pytest.raises(ConfigError) as by_flag:
        read("--steps=0")
    with pytest.raises(ConfigError) as by_keyword:
        SampleConfig(steps=0)
    assert str(by_flag.value) == str(by_keyword.value)
