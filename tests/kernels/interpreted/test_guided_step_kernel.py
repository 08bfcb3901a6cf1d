"""The guided step's kernel under the interpreter against the definition in float64. Outputs are poisoned (conftest.py)."""

import pytest
import torch
from kernel_cases import check_guided_step, errors_of, guided_case

from tiltscope.kernels import dispatch
from tiltscope.kernels import guided_step as kernel

SLOTS = 7  # one of each kind: guided, unguided, done, failed before


def step(case, **options):
    return dispatch.guided_step(case, implementation="triton", **options)


@pytest.mark.parametrize("n", [1, 3, 17, 1023, 4097])
def test_slots_of_mixed_plans_rows_and_seeds_advance_as_defined(n):
    case = guided_case(SLOTS if n < 1024 else 3, (n,), seed=n)
    check_guided_step(step(case), case)


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_any_number_of_slots(batch):
    case = guided_case(batch, (17,), seed=batch)
    check_guided_step(step(case), case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "n"), [(each, 17) for each in range(1, 34)] + [(33, n) for n in (1, 3, 1023)] + [(12, 4097)]
)
def test_every_number_of_slots_and_every_size(batch, n):
    case = guided_case(batch, (n,), seed=batch)
    check_guided_step(step(case), case)


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 21, 19)])
def test_channels_last_is_the_same_picture_with_the_same_noise(shape):
    case = guided_case(2, shape)
    last = case.pictures(lambda t: t.contiguous(memory_format=torch.channels_last))
    got, plain = step(last), step(case)
    assert got.x.is_contiguous(memory_format=torch.channels_last)
    check_guided_step(got, case)
    assert torch.equal(got.x, plain.x)
    assert torch.equal(got.history, plain.history)


def test_slots_that_lie_apart_in_memory_and_scalars_that_do():
    wide = guided_case(6, (4, 8, 8))
    case = wide.slots(torch.tensor([0, 2, 4]))
    apart = case._replace(
        x=wide.x[::2],
        x0_hat=torch.stack([case.x0_hat, case.x0_hat], 1)[:, 0],
        grad_a=wide.grad_a[::2],
        history=wide.history[::2],
        key=case.key.t().contiguous().t(),
        strength=torch.stack([case.strength, case.strength], 1)[:, 0],
    )
    assert not apart.x.is_contiguous()
    assert not apart.strength.is_contiguous()
    check_guided_step(step(apart), case)


def test_samples_that_start_off_every_boundary_are_read_narrowly_and_right():
    case = guided_case(2, (1024,))
    memory = torch.empty(2 * 1024 + 1)
    off = memory[1:].view(2, 1024).copy_(case.x)
    assert off.data_ptr() % 16 != 0
    check_guided_step(step(case._replace(x=off)), case)


@pytest.mark.parametrize("n", [17, 4097, 2048])
def test_a_sample_alone_is_the_sample_in_company_bit_for_bit(n):
    case = guided_case(3, (n,))
    together = step(case)
    for slot in (2, 0):
        alone = step(case.slots(torch.tensor([slot])))
        assert all(torch.equal(mine[0], theirs[slot]) for mine, theirs in zip(alone, together, strict=True))


@pytest.mark.parametrize("n", [24, 2500])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_slot_that_turns_non_finite_keeps_its_last_good_state(n, bad):
    case = guided_case(2, (n,))
    case = case._replace(x0_hat=case.x0_hat.index_put((torch.tensor(0), torch.tensor(n - 1)), torch.tensor(bad)))
    got = step(case)
    assert got.ok.tolist() == [False, True]
    assert got.row.tolist() == [int(case.row[0]), int(case.row[1]) + 1]
    assert torch.equal(got.x[0], case.x[0])
    assert torch.equal(got.history[0], case.history[0])
    sound = torch.tensor([1])
    check_guided_step(type(got)(*(each[1:] for each in got)), case.slots(sound))


def test_a_drive_that_is_not_a_number_fails_a_guided_slot_and_no_other():
    case = guided_case(3, (5,))
    got = step(case._replace(drive=torch.full((3,), torch.nan)))
    assert case.guided.tolist() == [True, True, False]
    assert got.ok.tolist() == [False, False, True]


def test_an_unguided_slot_ignores_a_gradient_that_is_not_finite():
    case = guided_case(3, (5,))
    case.grad_a[2] = torch.nan
    got = step(case)
    assert got.ok.tolist() == [True] * 3
    assert float(got.delta_norm_sq[2]) == 0


@pytest.mark.parametrize("n", [5, 1028])
def test_without_a_gradient_every_slot_is_an_unguided_one(n):
    case = guided_case(4, (n,))
    case = case._replace(drive=torch.full_like(case.drive, torch.nan))
    bare, unguided = step(case._replace(grad_a=None)), step(case._replace(guided=torch.zeros_like(case.guided)))
    assert all(torch.equal(getattr(bare, name), getattr(unguided, name)) for name in ("x", "history", "row", "ok"))
    assert bare.grad_norm_sq.tolist() == bare.delta_norm_sq.tolist() == bare.z_dot_delta.tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mixed_form_reads_lower_precision_and_keeps_a_float32_state(dtype):
    case = guided_case(2, (1028,)).network_in(dtype)
    got = step(case)
    assert got.x.dtype == torch.float32
    check_guided_step(got, case)


def test_a_ticket_is_left_as_it_was_found_and_arguments_are_not_written_to():
    case = guided_case(2, (2050,))
    ticket = torch.zeros(2, dtype=torch.int32)
    before = [each.clone() for each in case]
    first = step(case, ticket=ticket)
    assert ticket.tolist() == [0, 0]
    assert all(
        torch.equal(
            a,
            b,
        )
        or a.isnan().any()
        for a, b in zip(before, case, strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, step(case, ticket=ticket), strict=True))


def test_rows_that_do_not_exist_read_no_memory_outside_the_table_and_move_nothing():
    # The wrapper itself: on a device nobody looks at the values first.
    case = guided_case(4, (5,))._replace(row=torch.tensor([-1, 10**12, 2, 0]), plan=torch.tensor([0, 0, 9, -1]))
    got = kernel.guided_step(case)
    assert torch.equal(got.x, case.x)
    assert torch.equal(got.row, case.row)


def test_the_kernel_is_as_near_to_the_definition_as_torch_in_float32():
    case = guided_case(3, (1023,))
    mine, torchs = errors_of(step(case), case), errors_of(dispatch.guided_step(case), case)
    assert all(mine[name] <= 2 * torchs[name] + 1e-7 for name in mine), (mine, torchs)


def test_calls_are_counted_by_what_ran():
    case = guided_case(1, (3,))
    with dispatch.count_calls() as calls:
        step(case)
        dispatch.guided_step(case)
        step(case)
    assert dict(calls) == {("guided_step", "triton"): 2, ("guided_step", "reference"): 1}


def test_the_op_is_well_formed_with_the_kernel_behind_it():
    case = guided_case(2, (5,))
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(
        torch.ops.tiltscope.guided_step, (*case, None, "triton"), test_utils=["test_schema", "test_faketensor"]
    )
