"""The op before a trunk: its definition against plain torch, its gradient by hand against autograd, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from feature_cases import preprocess_case

import tiltscope
from tiltscope.kernels import dispatch
from tiltscope.kernels.dispatch_preprocess import preprocess

CASES = [
    preprocess_case(2, size, new_size, clamp=clamp, dtype=torch.float64, x0_dtype=torch.float64)
    for size, new_size in (((4, 3), None), ((7, 5), (3, 8)))
    for clamp in (False, True)
]


def by_hand(x0, case):
    """The op, whose gradient is the definition of the VJP; `preprocess` leaves that of the reference to autograd."""
    return torch.ops.tiltscope.preprocess(x0, *case[1:7], "reference")[0]


def plain(x0, case):
    return preprocess(x0, *case[1:5], clamp=case.clamp, dtype=case.dtype)


@pytest.mark.parametrize("case", CASES)
def test_pixels_are_torchs_resized_cut_and_scaled(case):
    picture = case.x0
    if case.rows is not None:
        picture = F.interpolate(
            picture, case.pixels_bar.shape[2:], mode="bilinear", antialias=True, align_corners=False
        )
    unit = (picture + 1) / 2
    unit = unit.clamp(0, 1) if case.clamp else unit
    torch.testing.assert_close(plain(case.x0, case), (unit - case.mean) / case.std, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_by_hand_is_autograds_and_that_of_finite_differences(case):
    x0 = case.x0.clone().requires_grad_()
    with dispatch.count_calls() as calls:
        (mine,) = torch.autograd.grad(by_hand(x0, case), x0, case.pixels_bar)
    assert dict(calls) == {("preprocess", "reference"): 1, ("preprocess_vjp", "reference"): 1}
    (theirs,) = torch.autograd.grad(plain(x0, case), x0, case.pixels_bar)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: by_hand(x, case), (x0,))


@pytest.mark.parametrize("case", CASES)
def test_the_ops_are_well_formed(case):
    args = (case.x0.clone().requires_grad_(), *case[1:7], "reference")
    torch.library.opcheck(torch.ops.tiltscope.preprocess, args)
    inside = torch.ops.tiltscope.preprocess(*args)[1]
    args = (case.pixels_bar, inside, case.std, case.rows, case.columns, torch.float32, "reference")
    torch.library.opcheck(torch.ops.tiltscope.preprocess_vjp, args)


def test_a_picture_beyond_the_range_keeps_its_gradient_unless_it_is_cut():
    x0 = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5], dtype=torch.float64).view(1, 1, 1, 5).requires_grad_()
    tables = torch.zeros(1, 1, 1, 1).double(), torch.ones(1, 1, 1, 1).double()
    for clamp, slopes in ((False, [0.5] * 5), (True, [0.0, 0.5, 0.5, 0.5, 0.0])):
        pixels = preprocess(x0, *tables, clamp=clamp, dtype=torch.float64)
        assert torch.autograd.grad(pixels.sum(), x0)[0].flatten().tolist() == slopes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x0": torch.zeros(3, 4, 4)}, "x0: got shape"),
        ({"x0": torch.zeros(2, 3, 7, 5, dtype=torch.int64)}, "x0: got torch.int64"),
        ({"mean": torch.zeros(3).double()}, "mean: got shape"),
        ({"std": torch.zeros(1, 3, 1, 1)}, "std: got torch.float32"),
        ({"columns": None}, "columns: got None, allowed is given with rows, or neither"),
        ({"rows": torch.zeros(3, 8).double()}, "rows: got shape"),
        ({"dtype": torch.int32}, "dtype: got torch.int32"),
    ],
)
def test_a_wrong_argument_is_a_config_error_that_names_it(change, says):
    case = CASES[2]._replace(**change)
    with pytest.raises(tiltscope.errors.ConfigError, match=f"^{says}"):
        plain(case.x0, case)
