"""What PTX's instructions without side effects mean: functions of typed operands, an array each with one value a thread.

Approximate instructions are computed in float64 and rounded once; fma rounds its exact product's sum twice, which is one unit in
the last place, rarely. Source: PTX ISA, NVIDIA. The rest of the executor: ptx_executor.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_memory import PTXError

Values = NDArray[Any]
POISON = 0x7FC0DEAD  # a NaN
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES: dict[str, Any] = {"pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64}
for _bits in (8, 16, 32, 64):
    DTYPES |= {
        f"b{_bits}": UNSIGNED[_bits // 8],
        f"u{_bits}": UNSIGNED[_bits // 8],
        f"s{_bits}": np.dtype(f"i{_bits // 8}").type,
    }


@dataclass(frozen=True)
class Instruction:
    """One line: `op` is the name and its modifiers, `args` the operands as written."""

    text: str
    guard: str | None
    negated: bool
    op: tuple[str, ...]
    args: tuple[str, ...]


def flush(v: Values) -> Values:
    return np.where(np.abs(v) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), v), v).astype(np.float32)


def _exact(function: Callable[..., Values]) -> Callable[..., Values]:
    """In float64, rounded once to the operands' type."""
    return lambda *v: function(*(each.astype(np.float64) for each in v)).astype(v[0].dtype)


def _integer_divide(a: Values, b: Values) -> Values:
    quotient = np.abs(a.astype(np.int64)) // np.abs(np.where(b == 0, 1, b).astype(np.int64))
    return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)


def _shift(a: Values, by: Values, *, left: bool) -> Values:
    bits = a.itemsize * 8
    beyond = by.astype(np.uint64) >= bits  # PTX clamps the count
    near = np.minimum(by.astype(np.uint64), bits - 1).astype(a.dtype)
    if left:
        return np.where(beyond, np.zeros_like(a), a << near)
    return np.where(beyond & (a.dtype.kind == "u"), np.zeros_like(a), a >> near)


def _extract(a: Values, start: Values, length: Values) -> Values:
    """bfe: `length` bits from `start`, extended by sign where the type has one; fields that lie inside the word."""
    bits = a.itemsize * 8
    if ((start + length > bits) | (length == 0)).any():
        raise PTXError("bfe of a field that leaves the word")
    up = (bits - start - length).astype(a.dtype)
    return (a << up) >> (bits - length).astype(a.dtype)


def _high(a: Values, b: Values) -> Values:
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def _logic3(a: Values, b: Values, c: Values, table: Values) -> Values:
    made = np.zeros_like(a)
    for place in range(8):
        if int(table[0]) >> place & 1:
            made |= (a if place & 4 else ~a) & (b if place & 2 else ~b) & (c if place & 1 else ~c)
    return made


def _permute(a: Values, b: Values, choice: Values) -> Values:
    """prmt: each byte is one of the eight of (a, b), told by four bits of `choice`, or its sign eight times over."""
    pool = np.stack(
        [each.astype(np.uint32) >> np.uint32(8 * at) & np.uint32(255) for each in (a, b) for at in range(4)]
    )
    made = np.zeros_like(a, dtype=np.uint32)
    for at in range(4):
        nibble = choice >> np.uint32(4 * at) & np.uint32(15)
        byte = np.take_along_axis(pool, (nibble & np.uint32(7)).astype(np.int64)[None], 0)[0]
        byte = np.where(nibble >= 8, np.where(byte >= 128, np.uint32(255), np.uint32(0)), byte)
        made |= byte << np.uint32(8 * at)
    return made


_FMA = _exact(lambda a, b, c: a * b + c)
_ARITHMETIC: dict[str, Callable[..., Values]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_FLOAT: dict[str, Callable[..., Values]] = {
    **_ARITHMETIC,
    "fma": _FMA,
    "max": lambda *v: reduce(np.fmax, v),  # of two, or of three from sm_100 on
    "min": lambda *v: reduce(np.fmin, v),
    "abs": np.abs,
    "neg": np.negative,
    "div": _exact(np.divide),
    "sqrt": _exact(np.sqrt),
    "rsqrt": _exact(lambda v: 1 / np.sqrt(v)),
    "rcp": _exact(lambda v: 1 / v),
    "ex2": _exact(np.exp2),
    "lg2": _exact(np.log2),
}
APPROXIMATE = ("sqrt", "rsqrt", "rcp", "ex2", "lg2", "div")
_INTEGER: dict[str, Callable[..., Values]] = {
    "add": np.add,
    "sub": np.subtract,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "abs": np.abs,
    "div": _integer_divide,
    "rem": lambda a, b: a - _integer_divide(a, b) * b,
    "bfe": _extract,
}
_BITS: dict[str, Callable[..., Values]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "lop3": _logic3,
}
_COMPARE: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
REDUCTIONS: dict[str, Callable[..., Values]] = {"max": np.fmax, "min": np.fmin, "add": np.add}
CONTROL = {"ld", "st", "atom", "bra", "ret", "bar", "shfl", "redux", "ldmatrix", "stmatrix", "mov", "cvta"}
INT_TYPES = {name for name in DTYPES if name[0] in "us"}
_BIT_TYPES = {name for name in DTYPES if name[0] == "b"} | {"pred"}
Meaning = tuple[str, Callable[..., Values]]  # the operands' type, and the function of them


def meaning_of(each: Instruction) -> Meaning:
    """Raises PTXError for what is not in the tables."""
    name, *mods = each.op
    kind = mods[-1] if mods else ""
    rest = set(mods[:-1])
    if name in _FLOAT and kind in ("f32", "f64", "f32x2"):
        if rest <= {"rn", "approx", "full", "ftz"} and (
            ("approx" not in rest and "full" not in rest) or name in APPROXIMATE
        ):
            return kind, _FLOAT[name]
    elif name in _INTEGER and kind in INT_TYPES and not rest:
        return kind, _INTEGER[name]
    elif name in ("mul", "mad") and kind in INT_TYPES and len(rest) == 1:
        product = {"lo": np.multiply, "hi": _high, "wide": None}.get(next(iter(rest)), 0)
        if product != 0 and not (product is _high and kind[1:] != "32"):
            return kind, product or np.multiply
    elif (name in _BITS and kind in _BIT_TYPES and not rest) or (name == "selp" and kind in DTYPES and not rest):
        return kind, _BITS.get(name, np.where)
    elif name == "prmt" and mods == ["b32"]:
        return kind, _permute
    elif name in ("shl", "shr") and kind in DTYPES and not rest:
        return kind, lambda a, by: _shift(a, by, left=name == "shl")
    elif name == "setp" and mods[0] in ("nan", "num") and kind in ("f32", "f64") and len(mods) == 2:
        return kind, _COMPARE[mods[0]]
    elif name == "setp" and kind in DTYPES and len(mods) <= 3 and mods[0][:2] in _COMPARE and mods[0][2:] in ("", "u"):
        return kind, _COMPARE[mods[0][:2]]
    elif name == "cvt" and _CONVERSION.fullmatch(".".join(mods)):
        return kind, np.asarray
    raise PTXError(f"unknown instruction: {each.text}")


_CONVERSION = re.compile(
    r"(?:(?:rn|rzi|rmi|rpi|rni)\.)?(?:ftz\.)?(?:[us](?:8|16|32|64)|f16|f32|f64)\.(?:[us](?:8|16|32|64)|f16|f32|f64|bf16)"
    r"|rn\.bf16(?:x2)?\.f32|rn\.f16x2\.f32"
)
WHOLE: dict[str, Callable[[Values], Values]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def round_to_bfloat16(v: Values) -> Values:
    bits = v.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where((bits & np.uint64(0x7FFFFFFF)) > 0x7F800000, 0x7FFF, nearest).astype(np.uint16)
