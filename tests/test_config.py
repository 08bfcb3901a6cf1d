"""Settings: the bucket rule, JSON and back, and what makes an identity."""

import hashlib
import json

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


def test_only_what_changes_no_bit_of_a_picture_stays_out_of_the_identity():
    assert NOT_IN_IDENTITY == ("num", "batch_size", "graphs")
    one, other = SampleConfig(lam=1.0, num=2, batch_size=2), SampleConfig(lam=1.0, num=7, graphs="off")
    assert one.identity("x") == other.identity("x")


def test_other_kernels_and_another_device_are_another_identity():
    names = {SampleConfig(lam=1.0, **each).identity("x") for each in ({}, {"kernels": "triton"}, {"device": "cuda"})}
    assert len(names) == 3


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_kernels_that_draw_the_same_bits_are_one_identity(kernels):
    assert SampleConfig(lam=1.0, kernels=kernels).identity("x") == SampleConfig(lam=1.0).identity("x")


def test_a_setting_that_could_not_be_chosen_before_leaves_older_identities_as_they_were():
    """At the value that every run had, a new setting is left out: what was begun can be continued."""
    settings = {k: v for k, v in SampleConfig(lam=1.0).resolved().to_json().items() if k not in NOT_IN_IDENTITY}
    before = {
        name: value
        for name, value in settings.items()
        if name not in ("kernels", "device", "allow_parity_failure", "vjp_chunk")
    }
    expected = hashlib.sha256(json.dumps(["x", before], sort_keys=True).encode()).hexdigest()
    assert SampleConfig(lam=1.0).identity("x") == expected
