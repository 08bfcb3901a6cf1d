"""The compiled kernels of preprocess and sae_rows, executed: for every target what ptxas would be given is the definition, and
the defects that matter are seen. The executor itself: test_ptx_executor.py."""

import pytest
import torch
from feature_cases import check_preprocess, check_rows, preprocess_case, rows_case
from feature_runs import PIXELS, PIXELS_BAR, PRE, TOKENS_BAR, X0, X0_BAR, run_preprocess, run_sae_rows
from kernel_builds import (
    TARGETS,
    preprocess_variant,
    preprocess_vjp_variant,
    sae_rows_variant,
    sae_rows_vjp_variant,
    usage_of,
)
from ptx_executor import PTXError

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def checked_rows(target, *shape, dtype=torch.float32, aligned=True, **options):
    case = rows_case(*shape, dtype=dtype)
    variants = (build(TYPES[dtype], ALIGNED=aligned) for build in (sae_rows_variant, sae_rows_vjp_variant))
    pre, bar, forward, backward = run_sae_rows(*variants, target, case, **options)
    check_rows(pre, bar, case)
    assert forward.writes(PRE) == backward.writes(TOKENS_BAR) == {1}
    return forward, backward


def checked_preprocess(
    target, *sizes, dtype=torch.float32, x0_dtype=torch.float32, aligned=True, clamp=False, **options
):
    case = preprocess_case(1, *sizes, channels=2, clamp=clamp, dtype=dtype, x0_dtype=x0_dtype)
    form = {"RESIZED": case.rows is not None, "CLAMP": clamp, "ALIGNED": aligned}
    names = TYPES[x0_dtype], TYPES[dtype]
    variants = (build(*names, **form) for build in (preprocess_variant, preprocess_vjp_variant))
    pixels, bar, forward, backward = run_preprocess(*variants, target, case, **options)
    check_preprocess(pixels, bar, case)
    assert forward.writes(PIXELS) == backward.writes(X0_BAR) == {1}
    return forward, backward


def test_the_code_of_rows_for_one_target_is_the_definition():
    forward, backward = checked_rows(90, 1, (3, 4), 136, 1, (3, 1))
    assert forward.widths(0, "ld") == {16}
    assert backward.widths(TOKENS_BAR, "st") == {16}
    forward, _ = checked_rows(90, 1, (1, 9), 136, 1)
    assert forward.reads(0) == {1}  # linear: every token once


def test_the_code_of_preprocess_for_one_target_is_the_definition_and_without_a_resize_moves_each_byte_once():
    forward, backward = checked_preprocess(90, (32, 40))
    assert forward.reads(X0) == backward.reads(PIXELS_BAR) == {1}
    assert [forward.widths(at, kind) for at, kind in ((X0, "ld"), (PIXELS, "st"))] == [{16}, {16}]
    checked_preprocess(90, (9, 8), (4, 16), clamp=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_code_of_rows_for_every_target_is_the_definition(target):
    seen = [
        *checked_rows(target, 2, (1, 19), 136, 3),
        *checked_rows(target, 1, (5, 4), 136, 2, (3, 3)),
        *checked_rows(target, 1, (3, 4), 136, 1, (3, 5), dtype=torch.bfloat16),
        *checked_rows(target, 1, (3, 4), 136, 1, (3, 5), dtype=torch.float16),
        *checked_rows(target, 2, (3, 3), 13, 2, (7, 7), aligned=False),
    ]
    print(f"sm_{target}: at least {min(each.executed for each in seen):.1%} of instructions executed")
    assert min(each.executed for each in seen) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_code_of_preprocess_for_every_target_is_the_definition(target):
    seen = [
        *checked_preprocess(target, (32, 36)),
        *checked_preprocess(target, (32, 36), dtype=torch.bfloat16, clamp=True),
        *checked_preprocess(target, (33, 31), aligned=False, clamp=True),
        *checked_preprocess(target, (24, 16), (9, 40), clamp=True),
        *checked_preprocess(target, (9, 8), (16, 5), dtype=torch.bfloat16),
        *checked_preprocess(target, (7, 5), (13, 3), dtype=torch.float16, x0_dtype=torch.bfloat16, aligned=False),
    ]
    print(f"sm_{target}: at least {min(each.executed for each in seen):.1%} of instructions executed")
    assert min(each.executed for each in seen) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_stack_no_spills(target):
    for variant in (
        sae_rows_variant(),
        sae_rows_vjp_variant(),
        preprocess_variant(),
        preprocess_vjp_variant(),
        preprocess_variant(RESIZED=True, CLAMP=True),
        preprocess_vjp_variant(RESIZED=True, CLAMP=True),
    ):
        usage = usage_of(variant, target)
        assert (usage.stack, usage.local) == (0, 0), variant.name
        assert usage.registers <= 168, variant.name


def unmask_stores(ptx):
    import re

    changed, number = re.subn(r"@%p\d+ (st\.global\.\S+ \[)", r"\1", ptx)
    assert number
    return changed


@pytest.mark.parametrize(
    ("run", "says"),
    [
        pytest.param(
            lambda: checked_rows(90, 1, (1, 9), 13, 1, aligned=False, change=unmask_stores),
            "out of bounds|different values",
            id="rows, a broken mask",
        ),
        pytest.param(lambda: checked_rows(90, 2, (1, 9), 13, 1), "misaligned", id="rows, a false promise"),
        pytest.param(
            lambda: checked_preprocess(90, (7, 5), aligned=False, change=unmask_stores),
            "out of bounds|another block wrote",
            id="preprocess, a broken mask",
        ),
        pytest.param(lambda: checked_preprocess(90, (7, 5)), "misaligned", id="preprocess, a false promise"),
    ],
)
def test_a_planted_defect_is_seen(run, says):
    with pytest.raises(PTXError, match=says):
        run()
