"""The generator of philox.py as Triton device functions, for kernels to call. Words are equal bit for bit, normals to rounding.

Logarithm, sine and cosine are polynomials and not libdevice's: those take any argument, and pay for it with a branch an element,
a stack in local memory (cosine) and a cubin half as large again. Minimax fits by reweighted least squares at Chebyshev nodes, in
float64; relative errors before rounding: logarithm 6e-9, sine 6e-9. Rounded in float32, a normal is within 4 units in the last
place of max(|z|, 1) of the float64 definition applied to the same uniforms (tests/kernels/interpreted/test_philox.py).
"""

# Device functions are compiled by Triton, not run by Python: their parameters carry no Python types.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 counter and key words -> four uint32 words."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high2 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low2 = c2 * 0xCD9E8D57
        c0 = high2 ^ c1 ^ k0
        c1 = low2
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """(word + 0.5) 2^-32 in float32, in (0, 1]."""
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def radius(u):
    """sqrt(-2 ln u) for u in [2^-33, 1].

    ln(m 2^k) = k ln 2 + ln m with m in [sqrt(1/2), sqrt(2)),   ln(1 + f) = f - f^2/2 + f^3 P(f)
    """
    bits = u.to(tl.int32, bitcast=True)
    shifted = (bits - 0x3F3504F3) & -0x800000  # 0x3F3504F3 is sqrt(1/2)
    f = (bits - shifted).to(tl.float32, bitcast=True) - 1.0
    k = (shifted >> 23).to(tl.float32)
    p = -0.07634429837255889 * f + 0.12761550337556304
    p = p * f - 0.1316019506797694
    p = p * f + 0.1420176247050935
    p = p * f - 0.16623356478220436
    p = p * f + 0.20001226667335506
    p = p * f - 0.25000821056247713
    p = p * f + 0.33333331709694525
    p = (p * f - 0.5) * f * f + f
    # ln 2 in two parts: the first times k is exact.
    log = k * 0.693145751953125 + (k * 1.42860682030941723212e-6 + p)
    return tl.sqrt(tl.maximum(-2.0 * log, 0.0))


@triton.jit
def _sin_turns(q):
    """sin(2 pi q) for |q| <= 1/4: 2 pi q + q^3 S(q^2), 2 pi in two parts."""
    v = q * q
    s = 39.77009274688461 * v - 76.5834353812871
    s = s * v + 81.60263375832727
    s = s * v - 41.34168458816956
    return q * 6.28125 + (q * 0.0019353071795864769 + s * v * q)


@triton.jit
def cos_turns(u):
    """cos(2 pi u) for u in [0, 1]."""
    return _sin_turns(0.25 - tl.minimum(u, 1.0 - u))


@triton.jit
def sin_turns(u):
    """sin(2 pi u) for u in [0, 1]; each fold is exact in floating point."""
    return _sin_turns(tl.where(u < 0.25, u, tl.where(u > 0.75, u - 1.0, 0.5 - u)))


@triton.jit
def four_normals(c0, c1, c2, c3, k0, k1):
    """The normals z_0..z_3 of one counter (philox.py), all four words used: [N] -> four [N]."""
    w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, k0, k1)
    first = radius(uniform(w0))
    second = radius(uniform(w2))
    u1 = uniform(w1)
    u3 = uniform(w3)
    return first * cos_turns(u1), first * sin_turns(u1), second * cos_turns(u3), second * sin_turns(u3)


@triton.jit
def one_normal(lane, c0, c1, c2, c3, k0, k1):
    """z_lane of each counter, lane in 0..3: the same numbers as four_normals, for elements that do not lie four in a row."""
    w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, k0, k1)
    upper = lane >= 2
    u = uniform(tl.where(upper, w3, w1))
    cos = cos_turns(u)
    sin = sin_turns(u)
    return radius(uniform(tl.where(upper, w2, w0))) * tl.where((lane & 1) == 1, sin, cos)
