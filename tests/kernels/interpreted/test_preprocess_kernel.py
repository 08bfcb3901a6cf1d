"""The preprocess kernels under the interpreter against the definition in float64. Outputs are poisoned (conftest.py).

bfloat16 results are checked in the executor (test_compiled_feature.py): the interpreter cuts them off.
"""

import pytest
import torch
from feature_cases import check_preprocess, preprocess_case

from tiltscope.kernels.dispatch_preprocess import preprocess


def run(case):
    x0 = case.x0.requires_grad_()
    pixels = preprocess(
        x0, case.mean, case.std, case.rows, case.columns, clamp=case.clamp, dtype=case.dtype, implementation="triton"
    )
    (bar,) = torch.autograd.grad(pixels, x0, case.pixels_bar)
    return pixels.detach(), bar


# As many elements a plane as 1, 3, 17, 1023 and 4097 are, and multiples of 8, whose accesses are wide.
PLANES = [(1, 1), (1, 3), (1, 17), (3, 341), (17, 241), (8, 16)]


@pytest.mark.parametrize(("size", "clamp"), [(size, at % 2 == 0) for at, size in enumerate(PLANES)])
def test_range_clamp_and_scale_are_the_definitions(size, clamp):
    case = preprocess_case(2, size, clamp=clamp)
    check_preprocess(*run(case), case)


@pytest.mark.parametrize(
    ("size", "new_size", "clamp"),
    [
        ((1, 1), (1, 3), True),
        ((17, 9), (5, 23), True),
        ((12, 16), (12, 16), False),
        ((3, 5), (16, 16), False),
        pytest.param((8, 31), (3, 31), True, marks=pytest.mark.slow),
        pytest.param((40, 33), (7, 8), True, marks=pytest.mark.slow),
        pytest.param((7, 8), (40, 33), False, marks=pytest.mark.slow),
    ],
)
def test_the_antialiased_resize_is_the_definitions(size, new_size, clamp):
    """Smaller and larger, by whole numbers and not, each axis its own way."""
    case = preprocess_case(1, size, new_size, clamp=clamp)
    check_preprocess(*run(case), case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_types_are_narrowed_once(dtype):
    case = preprocess_case(1, (9, 8), (4, 16), dtype=dtype, x0_dtype=torch.float16)
    check_preprocess(*run(case), case)


def test_a_sample_alone_is_the_sample_in_company_bit_for_bit():
    case = preprocess_case(3, (9, 7), (5, 4), clamp=True)
    together = run(case)
    alone = run(case._replace(x0=case.x0[1:2].detach().clone(), pixels_bar=case.pixels_bar[1:2].clone()))
    assert all(torch.equal(mine[0], theirs[1]) for mine, theirs in zip(alone, together, strict=True))


def test_inputs_that_do_not_lie_in_a_row_are_read_as_they_are_meant():
    case = preprocess_case(2, (6, 5), (4, 8))
    channels_last = case._replace(
        x0=case.x0.contiguous(memory_format=torch.channels_last),
        pixels_bar=case.pixels_bar.transpose(2, 3).contiguous().transpose(2, 3),
    )
    assert not channels_last.x0.is_contiguous()
    assert not channels_last.pixels_bar.is_contiguous()
    check_preprocess(*run(channels_last), case)


def test_a_pixel_that_is_not_a_number_stays_one_and_stays_where_it_is():
    case = preprocess_case(2, (4, 4), clamp=True)
    case.x0[0, 1, 2, 3] = torch.nan
    pixels, _ = run(case)
    assert pixels.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("new_size", [None, (23, 29), (70, 64)])
def test_every_batch(batch, new_size):
    case = preprocess_case(batch, (33, 31), new_size, clamp=batch % 2 == 0)
    check_preprocess(*run(case), case)
