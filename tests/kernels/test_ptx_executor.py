"""The executor of PTX by itself: instructions against numpy and torch, and each thing it must refuse."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx_executor import Kernel, PTXError, launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

N = 128


@triton.jit
def _to_bfloat16(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(tl.bfloat16))


@triton.jit
def _functions(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    v = tl.load(source + at)
    made = (
        tl.exp(v) + tl.sigmoid(v) + tl.rsqrt(v) + tl.log2(v) / v + tl.max(v) + tl.exp2(-v) + tl.sqrt_rn(v) + tl.floor(v)
    )
    tl.store(target + at, made)


def compiled(kernel, target_type, target):
    types = {"source": "*fp32", "target": target_type, "N": "constexpr"}
    made = triton.compile(ASTSource(kernel, types, {"N": N}, {}), target=GPUTarget("cuda", target, 32))
    return Kernel(made.asm["ptx"]), made.metadata.shared


@pytest.mark.parametrize("target", [80, 100])
def test_conversion_to_bfloat16_rounds_to_nearest_even_as_torch_does(target):
    v = np.random.default_rng(0).standard_normal(N).astype(np.float32)
    v[:5] = 1 + 2**-8 + 2**-9, 1 + 2**-8, 1 + 3 * 2**-8, np.nan, np.inf
    kernel, shared = compiled(_to_bfloat16, "*bf16", target)
    got = np.zeros(N, np.uint16)
    launch(kernel, 1, [v, got], shared)
    expected = torch.from_numpy(v).bfloat16()
    mine = torch.from_numpy(got.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(mine.nan_to_num(), expected.nan_to_num())
    assert bool(mine[3].isnan())


@pytest.mark.parametrize("target", [80, 100])
def test_functions_and_reductions_are_numpys(target):
    v = np.random.default_rng(1).uniform(0.1, 4, N).astype(np.float32)
    kernel, shared = compiled(_functions, "*fp32", target)
    got = np.zeros(N, np.float32)
    launch(kernel, 1, [v, got], shared)
    w = v.astype(np.float64)
    expected = np.exp(w) + 1 / (1 + np.exp(-w)) + 1 / np.sqrt(w) + np.log2(w) / w + w.max() + np.exp2(-w) + np.sqrt(w)
    np.testing.assert_allclose(got, expected + np.floor(w), rtol=1e-6)


# Each thread t stores words at 16 t. r3 = t * 2654435769, r4 = t * 1013904242.
HEAD = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0
)
.reqntid 64
{
	.reg .pred %p<4>;
	.reg .b32 %r<20>;
	.reg .b64 %rd<4>;
	ld.param.b64 %rd1, [k_param_0];
	mov.u32 %r1, %tid.x;
	mul.lo.s32 %r3, %r1, -1640531527;
	mul.lo.s32 %r4, %r1, 1013904242;
	mul.wide.u32 %rd2, %r1, 16;
	add.s64 %rd3, %rd1, %rd2;
"""


def run_by_hand(body, shared=64):
    got = np.zeros((64, 4), np.uint32)
    launch(Kernel(HEAD + body + "\n\tret;\n}\n"), 1, [got], shared)
    return got


T = np.arange(64)
A, B = ((T * number % 2**32).astype(np.uint32) for number in (2654435769, 1013904242))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mul.hi.u32 %r5, %r3, %r4;", (A.astype(np.uint64) * B) >> 32),
        ("mul.hi.s32 %r5, %r3, %r4;", (A.view(np.int32).astype(np.int64) * B.view(np.int32)) >> 32),
        ("lop3.b32 %r5, %r3, %r4, %r1, 0x96;", A ^ B ^ T.astype(np.uint32)),
        ("lop3.b32 %r5, %r3, %r4, %r1, 0xE8;", (A & B) | (A & T.astype(np.uint32)) | (B & T.astype(np.uint32))),
        ("shr.u32 %r5, %r3, %r1;", np.where(T < 32, A >> np.minimum(T, 31).astype(np.uint32), 0)),
        ("shr.s32 %r5, %r3, %r1;", A.view(np.int32) >> np.minimum(T, 31).astype(np.int32)),
        ("shl.b32 %r5, %r3, %r1;", np.where(T < 32, A << np.minimum(T, 31).astype(np.uint32), 0)),
        ("bfe.u32 %r5, %r3, 5, 7;", A >> 5 & 127),
        (
            "prmt.b32 %r5, %r3, %r4, 0x5140U;",
            (A & 255) | (B & 255) << 8 | (A >> 8 & 255) << 16 | (B >> 8 & 255) << 24,
        ),
        ("prmt.b32 %r5, %r3, %r4, 0xBBBB;", np.where(A >> 31, 0xFFFFFFFF, 0)),
        ("bfe.s32 %r5, %r3, 5, 7;", ((A >> 5 & 127).astype(np.int64) ^ 64) - 64),
        ("div.s32 %r5, %r3, 7;", np.trunc(A.view(np.int32) / 7).astype(np.int64)),
        ("cvt.rn.f32.u32 %r5, %r3;", A.astype(np.float32).view(np.uint32)),
        ("cvt.rn.f32.s32 %r5, %r3;", A.view(np.int32).astype(np.float32).view(np.uint32)),
        ("setp.lt.s32 %p1, %r3, %r4;\n selp.b32 %r5, 1, 0, %p1;", A.view(np.int32) < B.view(np.int32)),
        ("mov.b32 %r6, 0f7FC00000;\n setp.le.f32 %p1, %r6, %r6;\n selp.b32 %r5, 1, 0, %p1;", T * 0),
        ("mov.b32 %r6, 0f7FC00000;\n setp.leu.f32 %p1, %r6, %r6;\n selp.b32 %r5, 1, 0, %p1;", T * 0 + 1),
        ("setp.nan.f32 %p1, 0f7FC00000, 0f3F800000;\n selp.b32 %r5, 1, 0, %p1;", T * 0 + 1),
        ("setp.num.f32 %p1, 0f3F800000, 0f3F800000;\n selp.b32 %r5, 1, 0, %p1;", T * 0 + 1),
        ("setp.num.f32 %p1, 0f7FC00000, 0f3F800000;\n selp.b32 %r5, 1, 0, %p1;", T * 0),
        ("setp.nan.f32 %p1, 0f3F800000, 0f3F800000;\n selp.b32 %r5, 1, 0, %p1;", T * 0),
        ("shfl.sync.bfly.b32 %r5, %r1, 5, 31, -1;", T ^ 5),
        ("shfl.sync.up.b32 %r5, %r1, 4, 0, -1;", np.where(T % 32 < 4, T, T - 4)),
        ("mov.b32 %r6, 35;\n shfl.sync.idx.b32 %r5, %r1, %r6, 31, -1;", T // 32 * 32 + 3),
        ("{ .reg .b32 tmp; mov.b64 {tmp, %r5}, %rd3; }", T * 0 + 2**9),
        (
            "cvt.rn.f32.u32 %r6, %r1;\n mov.b32 %r7, 0f41F00000;\n max.f32 %r5, %r6, %r6, %r7;",
            np.maximum(T, 30).astype(np.float32).view(np.uint32),
        ),
        ("redux.sync.max.s32 %r5, %r3, -1;", np.repeat(A.view(np.int32).reshape(2, 32).max(1), 32)),
        ("redux.sync.add.s32 %r5, %r1, -1;", np.repeat(T.reshape(2, 32).sum(1), 32)),
    ],
)
def test_an_instruction_is_what_the_manual_says(line, expected):
    got = run_by_hand(f"{line}\n\tst.global.b32 [%rd3+0], %r5;")
    np.testing.assert_array_equal(got[:, 0], np.asarray(expected).astype(np.int64) % 2**32)


LOOP = """
	mov.b32 %r5, 0;
	mov.b32 %r6, 0;
$L_loop:
	setp.gt.s32 %p1, %r6, %r1;
	@%p1 bra $L_done;
	add.s32 %r5, %r5, %r6;
	add.s32 %r6, %r6, 1;
	bra $L_loop;
$L_done:
	shfl.sync.bfly.b32 %r7, %r5, 1, 31, -1;
	st.global.v2.b32 [%rd3+8], {%r5, %r7};
"""


def test_threads_that_leave_a_loop_at_different_times_meet_again():
    got = run_by_hand(LOOP)
    triangle = T * (T + 1) // 2
    np.testing.assert_array_equal(got[:, 2], triangle)
    np.testing.assert_array_equal(got[:, 3], triangle[T ^ 1])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("st.global.b32 [%rd3+1024], %r1;", "out of bounds"),
        ("st.global.b32 [%rd3+2], %r1;", "misaligned"),
        ("st.global.v2.b32 [%rd3+4], {%r1, %r1};", "misaligned"),
        ("st.global.b32 [%rd1+0], %r1;", "different values to one address"),
        ("ld.shared.b32 %r5, [global_smem];\n st.global.b32 [%rd3], %r5;", "before it is written"),
        (
            "setp.eq.b32 %p1, %r1, 0;\n@%p1 st.shared.b32 [global_smem], %r1;\nld.shared.b32 %r5, [global_smem];",
            "no barrier",
        ),
        ("mov.b32 %r6, 0;\n st.shared.b32 [%r6], 1;\n ld.shared.b32 %r5, [%r6];", "no barrier between"),
        ("mov.b32 %r6, 0;\n st.shared.b32 [%r6], %r1;", "different values to one address"),
        ("setp.lt.u32 %p1, %r1, 40;\n@%p1 bar.sync 0;", "reach the barrier"),
        (
            "setp.eq.b32 %p1, %r1, 7;\n@%p1 mov.b32 %r9, 1;\nadd.s32 %r5, %r8, 1;\nmov.b32 %r8, 1;",
            "before it is written",
        ),
        ("setp.lt.u32 %p1, %r1, 8;\n@%p1 shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;", "whole-warp"),
        ("tanh.approx.f32 %r5, %r1;", "unknown instruction"),
        ("{ mov.b32 %r5, %r1; mov.b32 %r6, %r1; }", "not understood"),
        ("add.sat.s32 %r5, %r1, %r1;", "unknown instruction"),
        ("add.cc.u32 %r5, %r1, %r1;", "unknown instruction"),
        ("st.global.b32 [%rd3], %r1;\n atom.global.gpu.acq_rel.add.u32 %r5, [%rd1], %r1;", "no barrier puts before"),
    ],
)
def test_what_is_wrong_on_a_device_is_refused(body, says):
    with pytest.raises(PTXError, match=says):
        run_by_hand(body)
