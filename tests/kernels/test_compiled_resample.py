"""The compiled resampling kernel, executed: for every target what ptxas would be given decides as the definition does."""

import pytest
import torch
from kernel_builds import TARGETS, resample_variant
from kernel_runs import run_resample
from ptx_executor import PTXError

from tiltscope.kernels import reference

# log_mean: an exponential and a logarithm in float64, by libdevice, rounded once; ancestors and verdicts are exact.
TOLERANCES = {torch.float32: 1e-7, torch.float64: 1e-14}
TYPES = {torch.float32: "fp32", torch.float64: "fp64"}


def weights(num, dtype):
    """Groups that are uneven, even (never due), all failed, partly failed, of huge weights, and one with a NaN in it."""
    generator = torch.Generator().manual_seed(num)
    log_weight = 3 * torch.randn(6, num, generator=generator, dtype=dtype)
    log_weight[1] = 0.0
    log_weight[2] = -torch.inf
    log_weight[3, ::2] = -torch.inf
    log_weight[4] += 500.0
    u = torch.rand(6, generator=generator, dtype=dtype)
    u[4] = 1.0
    return log_weight, u


def checked(target, num, dtype, *, every=None, **options):
    log_weight, u = weights(num, dtype)
    variant = resample_variant(TYPES[dtype], ALL=every or 1 << (num - 1).bit_length())
    got, seen = run_resample(variant, target, log_weight, u, **options)
    expected = reference.resample(log_weight, u)
    assert torch.equal(got.due, expected.due)
    assert torch.equal(got.ancestor, expected.ancestor)
    torch.testing.assert_close(got.log_mean, expected.log_mean, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert seen.writes(2) == seen.writes(3) == seen.writes(4) == {1}
    assert num < 17 or set(got.due.tolist()) == {True, False}
    return seen


def test_the_code_for_one_target_decides_as_the_definition():
    assert checked(90, 17, torch.float32).executed > 0.8


def test_one_nan_leaves_a_group_alone():
    log_weight, u = torch.tensor([[0.0, torch.nan, -9.0]]), torch.tensor([0.5])
    got, _ = run_resample(resample_variant(ALL=4), 90, log_weight, u)
    assert (got.due.tolist(), got.ancestor.tolist()) == ([False], [[0, 1, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_code_for_every_target_decides_as_the_definition(target, dtype):
    """A particle, fewer than a warp, what no power of two is, and several chunks of places."""
    seen = [checked(target, num, dtype) for num in (1, 3, 17, 64, 100)]
    assert max(each.executed for each in seen) > 0.95
    print(f"sm_{target} {dtype}: {max(each.executed for each in seen):.1%} of instructions executed")


def without_the_mask(ptx):
    import re

    changed, number = re.subn(r"@%p\d+ (st\.global\.\S*64 \[)", r"\1", ptx)
    assert number
    return changed


def without_barriers(ptx):
    assert "bar.sync" in ptx
    return ptx.replace("bar.sync", "// bar.sync")


@pytest.mark.parametrize(
    ("num", "change", "says"),
    [
        pytest.param(17, without_the_mask, "out of bounds|another block wrote|different values", id="a broken mask"),
        pytest.param(64, without_barriers, "no barrier between|before it is written", id="no barrier"),
    ],
)
def test_a_planted_defect_is_seen(num, change, says):
    with pytest.raises(PTXError, match=says):
        checked(90, num, torch.float32, change=change)
