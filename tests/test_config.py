"""Settings: the bucket rule, JSON and back, and what makes an identity."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.config import NOT_IN_IDENTITY, ExplainConfig, SampleConfig
from tiltscope.errors import ConfigError


@pytest.mark.parametrize(("num", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 8), (1_000_000, 8)])
def test_a_run_has_one_bucket(num, bucket):
    assert SampleConfig(num=num).bucket == bucket
    assert SampleConfig(num=num, batch_size=3).bucket == 3


settings = st.fixed_dictionaries(
    {
        "num": st.just(3),
        "lam": st.one_of(st.none(), st.floats(-9, 9), st.tuples(*[st.floats(-9, 9)] * 3)),
        "solver": st.sampled_from([None, "ddpm", "ddim(eta=0.25)", "heun"]),
        "log_tilt": st.sampled_from([None, "linear", "capped(cap=2.5)"]),
        "steps": st.one_of(st.none(), st.integers(1, 1000)),
        "seed": st.integers(0, 2**64 - 1),
        "indices": st.one_of(st.none(), st.just((4, 0, 2))),
        "guidance_interval": st.one_of(st.none(), st.just((0.1, 0.9))),
    }
)


@given(settings)
def test_json_and_back_is_the_same_config(given_settings):
    config = SampleConfig(**given_settings)
    assert SampleConfig.from_json(config.to_json()) == config
    explain = ExplainConfig(**given_settings)
    assert ExplainConfig.from_json(explain.to_json()) == explain


def test_an_unknown_key_is_an_error():
    with pytest.raises(ConfigError, match="unknown key 'stepz'"):
        SampleConfig.from_json({"stepz": 3})


def test_what_the_preset_fills_is_part_of_the_identity():
    assert SampleConfig(lam=1.0).identity("x") == SampleConfig(lam=1.0, steps=100, solver="ddpm").identity("x")
    assert SampleConfig(lam=1.0).identity("x") != SampleConfig(lam=1.0, steps=99).identity("x")


def test_only_number_and_batch_stay_out_of_the_identity():
    assert NOT_IN_IDENTITY == ("num", "batch_size")
    one, other = SampleConfig(lam=1.0, num=2, batch_size=2), SampleConfig(lam=1.0, num=7)
    assert one.identity("x") == other.identity("x")
