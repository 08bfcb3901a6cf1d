"""The compiled guided step and readout, executed: for every target what ptxas would be given is the definition, moves each
byte once, and the defects that matter are seen. The executor itself: test_ptx_executor.py."""

import pytest
import torch
from kernel_builds import TARGETS, guided_step_variant, readout_variant, readout_vjp_variant, usage_of
from kernel_cases import check_guided_step, guided_case
from kernel_runs import GRAD_A, HISTORY, HISTORY_OUT, X0_HAT, X_OUT, X, run_guided_step, run_readout
from ptx_executor import PTXError
from readout_cases import check_readout, readout_case

ALIGNED, ODD = guided_step_variant(), guided_step_variant(ALIGNED=False)


def moved_once(seen, widths):
    """4 reads and 2 writes an element, of the widths wanted: bytes an access of state and network."""
    assert all(seen.reads(place) == {1} and seen.writes(place) == {0} for place in (X, X0_HAT, GRAD_A, HISTORY))
    assert all(seen.writes(place) == {1} and seen.reads(place) == {0} for place in (X_OUT, HISTORY_OUT))
    assert [seen.widths(place, "ld") for place in (X, HISTORY, X0_HAT, GRAD_A)] == [{widths[0]}] * 2 + [{widths[1]}] * 2
    assert [seen.widths(place, "st") for place in (X_OUT, HISTORY_OUT)] == [{widths[0]}] * 2


def test_the_code_for_one_target_is_the_definition_and_moves_each_byte_once():
    case = guided_case(2, (1284,))
    got, seen = run_guided_step(ALIGNED, 90, case)
    check_guided_step(got, case)
    moved_once(seen, (16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_code_for_every_target_is_the_definition_and_moves_each_byte_once(target):
    """Slots of every kind; one and several programs a sample; aligned and not; every type; both memory orders."""
    lowest = 1.0
    for variant, shape, dtype, widths in (
        (ALIGNED, (2080,), torch.float32, (16, 16)),
        (guided_step_variant(SINGLE=True), (1024,), torch.float32, (16, 16)),
        (guided_step_variant("bf16"), (1028,), torch.bfloat16, (16, 8)),
        (guided_step_variant("fp16"), (1028,), torch.float16, (16, 8)),
        (ODD, (1029,), torch.float32, (4, 4)),
        (guided_step_variant(ALIGNED=False, SINGLE=True), (17,), torch.float32, (4, 4)),
        (guided_step_variant(CHANNELS_LAST=True), (4, 17, 16), torch.float32, (16, 16)),
    ):
        case = guided_case(6, shape).network_in(dtype)
        if len(shape) == 3:
            case = case.pictures(lambda t: t.contiguous(memory_format=torch.channels_last))
        got, seen = run_guided_step(variant, target, case)
        check_guided_step(got, case)
        moved_once(seen, widths)
        lowest = min(lowest, seen.executed)
    print(f"sm_{target}: at least {lowest:.1%} of instructions executed; the rest puts a failed sample back")
    assert lowest > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_failed_sample_is_put_back_and_every_instruction_is_then_executed(target):
    case = guided_case(2, (1284,))
    case.x0_hat[0, 1283] = torch.inf
    got, seen = run_guided_step(ALIGNED, target, case)
    assert got.ok.tolist() == [False, True]
    assert torch.equal(got.x[0], case.x[0])
    assert torch.equal(got.history[0], case.history[0])
    assert seen.reads(X) == {1, 2}
    assert seen.executed == 1.0


def test_approximate_instructions_as_wrong_as_the_manual_allows_stay_within_the_tolerance():
    # sqrt.approx.ftz.f32: at most 1 unit in the last place, PTX ISA 8.7. It is the only approximate one.
    case = guided_case(1, (1024,))
    got, _ = run_guided_step(guided_step_variant(SINGLE=True), 90, case, approximation=2.0**-23)
    check_guided_step(got, case)


def without(text):
    def change(ptx):
        assert text in ptx
        return ptx.replace(text, "// " + text)

    return change


def unmask_stores(ptx):
    import re

    changed, number = re.subn(r"@%p\d+ (st\.global\.b32 \[ %rd\d+ \+ 0 \], \{ %r\d+ \};)", r"\1", ptx)
    assert number
    return changed


def swap(old, new):
    def change(ptx):
        assert old in ptx
        return ptx.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("variant", "n", "options", "says"),
    [
        pytest.param(ODD, 1029, {"change": unmask_stores}, "out of bounds|another block wrote", id="a broken mask"),
        pytest.param(ODD, 1029, {"short_by": 1}, "out of bounds", id="an output one element short"),
        pytest.param(ALIGNED, 1029, {}, "misaligned", id="a false promise of divisibility"),
        pytest.param(ALIGNED, 1028, {"change": without("bar.sync")}, "no barrier between", id="no barrier"),
        pytest.param(
            ALIGNED, 1028, {"change": swap("%ctaid.x", "0")}, "another block wrote", id="two blocks, one sample"
        ),
        pytest.param(
            ALIGNED, 1028, {"change": swap(".acq_rel.", ".relaxed.")}, "unknown", id="an atomic that orders nothing"
        ),
        pytest.param(
            ALIGNED, 1028, {"change": swap("-766435501", "-766435502")}, "beyond", id="a wrong Philox constant"
        ),
        pytest.param(ALIGNED, 1028, {"ticket": 1}, "another block wrote", id="a ticket that was not zero"),
    ],
)
def test_a_planted_defect_is_seen(variant, n, options, says):
    case = guided_case(2, (n,))
    with pytest.raises((PTXError, AssertionError), match=says):
        check_guided_step(run_guided_step(variant, 90, case, **options)[0], case)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_stack_no_spills_wide_access_and_few_enough_registers(target):
    for variant in (
        ALIGNED,
        guided_step_variant("bf16"),
        guided_step_variant("fp16"),
        guided_step_variant(SINGLE=True),
    ):
        usage = usage_of(variant, target)
        assert (usage.stack, usage.local, usage.shared) == (0, 0, 16)
        # 64 but for the form of small samples on sm_100 and sm_120, whose packed arithmetic takes pairs.
        assert usage.registers <= (72 if target >= 100 and variant.constants["SINGLE"] else 64)
        assert usage.occupancy >= 0.43
        # 8 elements a thread: two 128-bit loads of each float32 tensor; 16-bit ones in 64 bits, for the sake of the layout.
        assert usage.wide == ((8 if "fp32" in variant.name else 4), 4)
    for variant in (ODD, guided_step_variant(CHANNELS_LAST=True)):
        usage = usage_of(variant, target)
        assert (usage.stack, usage.local) == (0, 0)
        assert usage.registers <= 96


def checked_readout(target, shape, tokens, *, aligned, **options):
    name, dtype = tokens
    case = readout_case(*shape)
    case = case._replace(tokens=case.tokens.to(dtype))
    variants = readout_variant(name, ALIGNED=aligned), readout_vjp_variant(name, ALIGNED=aligned, ALL=32)
    activation, drive, bar, forward, backward = run_readout(*variants, target, case, **options)
    check_readout(activation, drive, bar, case)
    # One row: the tokens are read once. Every byte of what is made is written once: pooled, pre; the cotangent.
    assert forward.reads(0) == {shape[3]}
    assert forward.writes(6) == forward.writes(7) == backward.writes(8) == {1}
    return forward, backward


FLOAT = "fp32", torch.float32


def test_the_readouts_code_for_one_target_is_the_definition():
    forward, backward = checked_readout(90, (1, 19, 136, 1), FLOAT, aligned=True)
    assert forward.widths(0, "ld") == {16}
    assert backward.widths(8, "st") == {16}
    assert min(forward.executed, backward.executed) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_readouts_code_for_every_target_is_the_definition(target):
    for shape, tokens, aligned in (
        ((2, 19, 136, 3), FLOAT, True),
        ((1, 17, 136, 1), ("bf16", torch.bfloat16), True),
        ((1, 17, 136, 1), ("fp16", torch.float16), True),
        ((2, 9, 13, 2), FLOAT, False),
    ):
        seen = checked_readout(target, shape, tokens, aligned=aligned)
        print(
            f"sm_{target} {shape} {tokens[0]}: {', '.join(f'{each.executed:.1%}' for each in seen)} of instructions executed"
        )


@pytest.mark.parametrize(
    ("shape", "aligned", "change", "says"),
    [
        pytest.param((2, 9, 13, 1), False, unmask_stores, "out of bounds|another block wrote", id="a broken mask"),
        pytest.param((2, 9, 13, 1), True, str, "misaligned", id="a false promise of divisibility"),
        pytest.param((1, 9, 16, 1), True, without("bar.sync"), "no barrier between", id="no barrier"),
    ],
)
def test_a_defect_planted_in_the_readout_is_seen(shape, aligned, change, says):
    with pytest.raises(PTXError, match=says):
        checked_readout(90, shape, FLOAT, aligned=aligned, change=change)
