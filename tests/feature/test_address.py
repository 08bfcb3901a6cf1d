"""HOOK:KIND:INDEX[@POOLING]: text and address are two forms of one thing, and whatever is wrong is named with what is allowed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.address import KINDS, POOLINGS, FeatureAddress, parse

number = st.integers(0, 9999)
hooks = st.one_of(
    st.just("norm"),
    number.map(lambda n: f"blocks.{n}"),
    st.tuples(number, number).map(lambda at: f"stages.{at[0]}.{at[1]}"),
)
poolings = st.one_of(
    st.sampled_from(POOLINGS), st.tuples(st.integers(0, 9999), st.integers(0, 9999)).map(lambda p: f"{p[0]},{p[1]}")
)
# File names may hold colons, and an @ of their own.
paths = st.tuples(st.text("ab:@/., é", max_size=12), st.sampled_from((".npy", ".safetensors"))).map("".join)
addresses = st.one_of(
    st.builds(FeatureAddress, hooks, st.sampled_from(("sae", "neuron")), st.integers(0, 10**9 - 1), poolings),
    st.builds(FeatureAddress, hooks, st.just("direction"), paths, poolings),
    st.builds(FeatureAddress, hooks, st.just("cls"), st.integers(0, 10**9 - 1), st.none()),
)


@given(addresses)
def test_an_address_survives_being_written_and_read(address):
    assert parse(str(address)) == address


def test_the_default_pooling_is_centre_and_is_left_out():
    assert parse("blocks.5:sae:137") == FeatureAddress("blocks.5", "sae", 137, "centre")
    assert str(parse("blocks.5:sae:137@centre")) == "blocks.5:sae:137"
    assert parse("norm:cls:3").pooling is None


def test_leading_zeros_name_the_same_feature():
    assert str(parse("blocks.05:sae:007@01,02")) == "blocks.5:sae:7@1,2"


def test_the_split_is_at_two_colons_and_the_last_at():
    assert parse("norm:direction:a:b@c.npy@max") == FeatureAddress("norm", "direction", "a:b@c.npy", "max")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["HOOK:KIND:INDEX"]),
        ("blocks.5", ["HOOK:KIND:INDEX", *KINDS]),
        ("blocks.5:sae", ["HOOK:KIND:INDEX"]),
        ("layer.5:sae:1", ["'layer.5'", "blocks.N", "norm"]),
        ("blocks.-1:sae:1", ["'blocks.-1'"]),
        ("blocks.5.1:sae:1", ["'blocks.5.1'"]),
        ("stages.2:sae:1", ["'stages.2'", "blocks.N", "stages.S.B"]),
        ("blocks.5:latent:1", ["'latent'", *KINDS]),
        ("blocks.5:sae:-1", ["'-1'", "0 or above"]),
        ("blocks.5:sae:1.0", ["'1.0'"]),
        ("blocks.5:sae:", ["''"]),
        ("blocks.5:sae: 1", ["' 1'"]),
        ("blocks.5:sae:١", ["'١'"]),
        ("blocks.5:sae:" + "9" * 5000, ["0 or above"]),
        ("blocks.5:sae:1@median", ["'median'", *POOLINGS, "y,x"]),
        ("blocks.5:sae:1@", ["''", *POOLINGS]),
        ("blocks.5:sae:1@3,-4", ["'3,-4'"]),
        ("blocks.5:cls:1@max", ["no pooling"]),
        ("blocks.5:direction:v.pt", [".safetensors", ".npy"]),
        ("blocks.5:direction:v.npy@x/w.npy", ["'x/w.npy'"]),
        (137, ["137", "HOOK:KIND:INDEX"]),
        (None, ["HOOK:KIND:INDEX"]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text, names):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    for name in names:
        assert name in str(caught.value)
