"""Every Triton kernel compiled ahead of time, without a device, for every target: what ptxas made of it, read off the cubin.

A variant is what a launch would pick: constants, and the types of its tensors. Ahead of time no pointer exists, so nothing is
promised about one but what the constant ALIGNED promises.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tiltscope.kernels import guided_step, preprocess, readout, resample, sae_rows

TARGETS = (80, 86, 89, 90, 100, 120)
# A multiprocessor's registers, and the warps and blocks that fit it; CUDA C++ programming guide, "compute capabilities".
_REGISTERS = 65536
_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
_BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
_SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants and the types of its arguments."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4


@dataclass(frozen=True)
class Usage:
    """What one variant takes on one target. wide: 128-bit accesses (loads, stores) in the machine code; local: spills."""

    registers: int
    stack: int
    local: int
    shared: int
    wide: tuple[int, int]
    instructions: int
    threads: int
    target: int

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that fit by registers, shared memory and blocks: a bound, not measured."""
        warps = self.threads // 32
        a_warp = -(-self.registers * 32 // 256) * 256  # registers are handed out 256 at a time
        by_shared = _SHARED_KIB[self.target] * 1024 // (self.shared + 1024)
        blocks = min(_REGISTERS // (a_warp * warps), _WARPS[self.target] // warps, _BLOCKS[self.target], by_shared)
        return blocks * warps / _WARPS[self.target]


_INT64 = ("num_rows_ptr", "plan_ptr", "row_ptr", "key_ptr", "index_ptr", "particle_ptr", "row_out_ptr")
_BOOL = ("ok_ptr", "guided_ptr", "ok_out_ptr")


def guided_step_variant(network: str = "fp32", **constants: Any) -> Variant:
    """guided_step with D and grad_a in `network`; constants as in the kernel, by default the aligned form of large samples."""
    types = dict.fromkeys(guided_step.POINTERS, "*fp32")
    types |= dict.fromkeys(_INT64, "*i64") | dict.fromkeys(_BOOL, "*i1") | {"ticket_ptr": "*i32"}
    types |= dict.fromkeys(("x0_hat_ptr", "grad_a_ptr"), f"*{network}")
    types |= {name: "i64" if name.startswith("stride") else "i32" for name in guided_step.SIZES}
    chosen = {
        "GROUPS": guided_step.GROUPS,
        "PARTS": guided_step.PARTS,
        "ALIGNED": True,
        "CHANNELS_LAST": False,
        "SINGLE": False,
    } | constants
    label = ", ".join(
        [network, *(name.lower() if value else f"not {name.lower()}" for name, value in constants.items())]
    )
    return Variant(f"guided_step ({label})", guided_step._guided_step_kernel, types, chosen, guided_step.NUM_WARPS)


def readout_variant(tokens: str = "fp32", *, ALIGNED: bool = True) -> Variant:
    """The readout of tokens of a type."""
    types = dict.fromkeys(readout.POINTERS, "*fp32") | {"tokens_ptr": f"*{tokens}", "mask_ptr": "*i1"}
    constants = {"TOKENS": readout.TOKENS, "WIDTH": readout.WIDTH, **_readout_constants(ALIGNED)}
    constants["T"] = readout.LSE_TEMPERATURE
    return _readout_variant("readout", readout._readout_kernel, types, constants, tokens)


def readout_vjp_variant(tokens: str = "fp32", *, ALIGNED: bool = True, ALL: int = 512) -> Variant:
    """Its VJP, for at most ALL tokens."""
    types = dict.fromkeys(readout.VJP_POINTERS, "*fp32") | {"tokens_bar_ptr": f"*{tokens}", "mask_ptr": "*i1"}
    constants = {"TOKENS": readout.VJP_TOKENS, "WIDTH": readout.WIDTH, "ALL": ALL, **_readout_constants(ALIGNED)}
    return _readout_variant("readout_vjp", readout._readout_vjp_kernel, types, constants, tokens)


def _readout_constants(aligned: bool) -> dict[str, Any]:
    return {"INVERSE": 1 / readout.LSE_TEMPERATURE, "ALIGNED": aligned}


def _readout_variant(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tokens: str) -> Variant:
    label = tokens if constants["ALIGNED"] else f"{tokens}, not aligned"
    types |= dict.fromkeys(readout.SIZES, "i32")
    return Variant(f"{name} ({label})", kernel, types, constants, readout.NUM_WARPS)


def sae_rows_variant(tokens: str = "fp32", *, ALIGNED: bool = True) -> Variant:
    """Rows of an encoder over tokens of a type; one variant serves linear rows and windows of any size."""
    types = dict.fromkeys(sae_rows.POINTERS, "*fp32") | {"tokens_ptr": f"*{tokens}"}
    constants = {"TOKENS": sae_rows.TOKENS, "WIDTH": sae_rows.WIDTH, "ALIGNED": ALIGNED}
    return _sae_rows_variant("sae_rows", sae_rows._sae_rows_kernel, types, constants, tokens)


def sae_rows_vjp_variant(tokens: str = "fp32", *, ALIGNED: bool = True) -> Variant:
    """Its VJP."""
    types = dict.fromkeys(sae_rows.VJP_POINTERS, "*fp32") | {"tokens_bar_ptr": f"*{tokens}"}
    constants = {"TOKENS": sae_rows.VJP_TOKENS, "WIDTH": sae_rows.WIDTH, "ALIGNED": ALIGNED}
    return _sae_rows_variant("sae_rows_vjp", sae_rows._sae_rows_vjp_kernel, types, constants, tokens)


def _sae_rows_variant(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], tokens: str) -> Variant:
    label = tokens if constants["ALIGNED"] else f"{tokens}, not aligned"
    types |= {size: "i64" if size.startswith("stride") else "i32" for size in sae_rows.SIZES}
    return Variant(f"{name} ({label})", kernel, types, constants, sae_rows.NUM_WARPS)


def preprocess_variant(picture: str = "fp32", pixels: str = "fp32", **constants: bool) -> Variant:
    """Pictures of a type to pixels of a type; constants RESIZED, CLAMP, ALIGNED."""
    types = dict.fromkeys(preprocess.POINTERS, f"*{pixels}") | {"x0_ptr": f"*{picture}", "inside_ptr": "*i1"}
    return _preprocess_variant("preprocess", preprocess._preprocess_kernel, types, (picture, pixels), constants)


def preprocess_vjp_variant(picture: str = "fp32", pixels: str = "fp32", **constants: bool) -> Variant:
    """Its VJP."""
    types = dict.fromkeys(preprocess.VJP_POINTERS, f"*{pixels}") | {"x0_bar_ptr": f"*{picture}", "inside_ptr": "*i1"}
    return _preprocess_variant("preprocess_vjp", preprocess._preprocess_vjp_kernel, types, (picture, pixels), constants)


def _preprocess_variant(
    name: str, kernel: Any, types: dict[str, str], of: tuple[str, str], constants: dict[str, bool]
) -> Variant:
    chosen = {"BLOCK": preprocess.BLOCK, "RESIZED": False, "CLAMP": False, "ALIGNED": True} | constants
    words = [each.lower() if value else f"not {each.lower()}" for each, value in constants.items()]
    label = ", ".join([of[0] if of[0] == of[1] else f"{of[0]} to {of[1]}", *words])
    types |= dict.fromkeys(preprocess.SIZES, "i32")
    return Variant(f"{name} ({label})", kernel, types, chosen, preprocess.NUM_WARPS)


def resample_variant(weight: str = "fp32", *, ALL: int = 64) -> Variant:
    """Resampling of log-weights of a type, ALL particles a group."""
    types = dict.fromkeys(resample.POINTERS, f"*{weight}") | {"ancestor_ptr": "*i64", "due_ptr": "*i1", "num": "i32"}
    constants = {"ALL": ALL, "CHUNK": min(ALL, max(1, resample.TILE // ALL)), "THRESHOLD": 0.5}
    return Variant(f"resample ({weight}, {ALL})", resample._resample_kernel, types, constants, resample.NUM_WARPS)


def variants() -> list[Variant]:
    """What the table in docs/kernels.md lists: every kernel, every type, every form."""
    forms: tuple[dict[str, bool], ...] = ({}, {"SINGLE": True}, {"ALIGNED": False}, {"CHANNELS_LAST": True})
    made = [guided_step_variant(network, **form) for network in ("fp32", "bf16") for form in forms]
    made.append(guided_step_variant("fp16"))
    for build in (readout_variant, readout_vjp_variant, sae_rows_variant, sae_rows_vjp_variant):
        made += [build(tokens) for tokens in ("fp32", "bf16", "fp16")]
        made.append(build(ALIGNED=False))
    forms = ({}, {"ALIGNED": False}, {"RESIZED": True}, {"RESIZED": True, "CLAMP": True})
    for build in (preprocess_variant, preprocess_vjp_variant):
        made += [build(**form) for form in forms]
        made += [build("fp32", "bf16", **form) for form in ({}, {"RESIZED": True})]
    return [*made, resample_variant(), resample_variant(ALL=1024), resample_variant("fp64", ALL=1024)]


def compile_for(variant: Variant, target: int) -> Any:
    """Triton's compiled kernel for sm_<target>."""
    types = dict(variant.types) | dict.fromkeys(variant.constants, "constexpr")
    source = ASTSource(variant.kernel, types, dict(variant.constants), {})
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": variant.num_warps})
    return made


def usage_of(variant: Variant, target: int) -> Usage:
    made = compile_for(variant, target)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        resources, sass = (_cuobjdump(option, cubin) for option in ("-res-usage", "-sass"))
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    return Usage(
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=made.metadata.shared,
        wide=(len(re.findall(r"LDG\.E\S*\.128", sass)), len(re.findall(r"STG\.E\S*\.128", sass))),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        threads=32 * variant.num_warps,
        target=target,
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    made = subprocess.run([_program(), option, cubin], capture_output=True, text=True, check=True)
    return made.stdout


@cache
def _program() -> str:
    """triton's wheel brings it."""
    return str(knobs.nvidia.cuobjdump.path)
