"""PTX, as Triton compiled it, run on a CPU with numpy: what ptxas would be given is itself executed and checked.

All threads of a block run in lock step, a numpy array a register; threads that diverge wait at the higher program counter and
join again there. Blocks run one after another. An instruction or modifier that ptx_meaning.py does not know is refused when the
kernel is loaded. Memory is checked as ptx_memory.py says; a barrier or a shuffle that not every thread reaches is refused, and
so is a register read before it is written (one that is written nowhere is the unused half of a packed pair, and holds NaN).

Not modelled: warp scheduling, what ptxas does afterwards, and the error of approximate instructions; `approximation` multiplies
their results by 1 +- that much instead. The text is read by ptx_code.py, what instructions mean is in ptx_meaning.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ptx_code import Kernel as Kernel
from ptx_meaning import (
    APPROXIMATE,
    DTYPES,
    INT_TYPES,
    POISON,
    REDUCTIONS,
    UNSIGNED,
    WHOLE,
    Instruction,
    Values,
    flush,
    meaning_of,
    round_to_bfloat16,
)
from ptx_memory import SHARED, BlockMemory, Buffer, Memory
from ptx_memory import PTXError as PTXError

_LAST = {"bfly": "31", "up": "0", "idx": "31"}  # the lane at which a whole warp's shuffle ends


class Block:
    """The registers and the run of one block."""

    def __init__(
        self,
        kernel: Kernel,
        place: tuple[int, int, int],
        arguments: Sequence[int],
        memory: BlockMemory,
        approximation: float,
    ) -> None:
        self._kernel, self._place, self._memory = kernel, place, memory
        self._values = dict(zip(kernel.params, arguments, strict=True))
        self._registers: dict[str, Values] = {}
        self._size = kernel.threads
        self._approximation = approximation

    def read(self, operand: str, kind: str) -> Values:
        """An operand, one value a thread, as the type `kind`."""
        dtype, n = np.dtype(DTYPES[kind]), self._size
        x, y, z = self._place
        special: dict[str, Any] = {"%tid.x": np.arange(n), "%laneid": np.arange(n) % 32, "%ntid.x": n}
        special |= {"%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
        if operand in special:
            return np.broadcast_to(np.asarray(special[operand]).astype(dtype), (n,))
        if operand.startswith("%"):
            if operand not in self._registers:
                if operand in self._kernel.assigned:
                    raise PTXError(f"register {operand} is read before it is written")
                return np.full(n, POISON, np.uint32).astype(UNSIGNED[dtype.itemsize]).view(dtype)
            held = self._registers[operand]
            if kind == "pred":
                return held
            return held.astype(UNSIGNED[dtype.itemsize]).view(dtype)
        if operand == "global_smem":
            number = SHARED << 40
        elif operand.startswith(("0f", "0F")):
            number = int(operand[2:], 16)
            return np.full(n, number, np.uint32).astype(UNSIGNED[dtype.itemsize]).view(dtype)
        elif operand.startswith(("0d", "0D")):
            return np.full(n, int(operand[2:], 16), np.uint64).view(dtype)
        else:
            number = int(operand.rstrip("U"), 0)
        if dtype.kind == "f":
            return np.full(n, number, dtype)
        if dtype.kind == "b":
            return np.full(n, bool(number))
        return np.full(n, number % (1 << dtype.itemsize * 8), UNSIGNED[dtype.itemsize]).view(dtype)

    def write(self, register: str, values: Values, active: Values) -> None:
        if register == "_":
            return
        raw = values
        if values.dtype != np.bool_:
            width = self._kernel.widths[register[1:].rstrip("0123456789")]
            signed = values.dtype.kind == "i" and values.itemsize < width  # sign-extended to its register
            raw = (values.astype(f"i{width}") if signed else values).view(
                UNSIGNED[width if signed else values.itemsize]
            )
            raw = raw.astype(UNSIGNED[width])
        held = self._registers.setdefault(register, np.zeros(self._size, raw.dtype))
        np.copyto(held, raw, where=active)

    def address(self, operand: str, space: str) -> Values:
        base, _, plus = operand.strip("[] ").partition("+")
        offset = int(plus.strip() or "0", 0)
        base = base.strip()
        if space == "shared":
            low = (
                (self.read(base, "b32").astype(np.int64) + offset) & 0xFFFFFFFF
                if base != "global_smem"
                else np.full(self._size, offset)
            )
            return low.astype(np.uint64) + np.uint64(SHARED << 40)
        return self.read(base, "b64") + np.uint64(offset % (1 << 64))

    def compute(self, each: Instruction) -> Values:
        name, *mods = each.op
        kind, function = meaning_of(each)
        args = each.args[1:]
        if name == "cvt":
            return self._convert(mods, args)
        if name == "selp":
            return np.where(self.read(args[2], "pred"), self.read(args[0], kind), self.read(args[1], kind))
        if name in ("shl", "shr"):
            return function(self.read(args[0], kind), self.read(args[1], "b32"))
        if name == "bfe":
            return function(self.read(args[0], kind), *(self.read(each, "u32").astype(np.int64) for each in args[1:]))
        if kind == "f32x2":
            halves = [self.read(each, "b64").view(np.float32).reshape(-1, 2) for each in args]
            return np.ascontiguousarray(function(*halves).astype(np.float32)).view(np.uint64).reshape(-1)
        v = [self.read(each, kind) for each in args[: 3 if name != "lop3" else 4]]
        if "ftz" in mods and kind == "f32":
            v = [flush(each) for each in v]
        if name == "setp":
            made = function(v[0], v[1])
            if kind[0] != "f" or mods[0] in ("nan", "num"):
                return made
            unordered = np.isnan(v[0]) | np.isnan(v[1])
            return made | unordered if mods[0][2:] == "u" else made & ~unordered
        if name in ("mul", "mad") and kind in INT_TYPES:
            if "wide" in mods:
                double = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 4}")
                made = v[0].astype(double) * v[1].astype(double)
                return made + self.read(args[2], f"{kind[0]}{int(kind[1:]) * 2}") if name == "mad" else made
            made = function(v[0], v[1])
            return made + v[2] if name == "mad" else made
        made = function(*v)
        if self._approximation and name in APPROXIMATE and ("approx" in mods or "full" in mods):
            sign = np.where(np.arange(self._size) % 2 == 0, 1, -1)
            made = (made.astype(np.float64) * (1 + sign * self._approximation)).astype(made.dtype)
        return flush(made) if "ftz" in mods and made.dtype == np.float32 else made

    def _convert(self, mods: list[str], args: Sequence[str]) -> Values:
        to, source = mods[-2:]
        if source == "bf16":
            return (self.read(args[0], "b16").astype(np.uint32) << np.uint32(16)).view(np.float32)
        if to in ("bf16", "bf16x2", "f16x2"):
            parts = [self.read(each, "f32") for each in args]
            low = [
                round_to_bfloat16(each) if to != "f16x2" else each.astype(np.float16).view(np.uint16) for each in parts
            ]
            return low[0] if len(low) == 1 else (low[0].astype(np.uint32) << np.uint32(16)) | low[1]
        v = self.read(args[0], source)
        dtype = np.dtype(DTYPES[to])
        if mods[0] in WHOLE:
            v = WHOLE[mods[0]](v.astype(np.float64))
        if v.dtype.kind == "f" and dtype.kind in "ui":
            v = np.clip(np.nan_to_num(v), np.iinfo(dtype).min, np.iinfo(dtype).max)
        return v.astype(dtype)

    def access(self, each: Instruction, active: Values) -> None:
        """ld and st of global and shared memory; v2 and v4 are one access."""
        name, space, *mods = each.op
        kind = mods[-1]
        if (
            space not in ("global", "shared")
            or not set(mods[:-1]) <= {"v2", "v4", "cg", "nc", "volatile"}
            or kind not in DTYPES
        ):
            raise PTXError(f"unknown instruction: {each.text}")
        item = np.dtype(DTYPES[kind]).itemsize
        registers = _list(each.args[0 if name == "ld" else 1])
        if not active.any():
            return
        at = self.address(each.args[1 if name == "ld" else 0], space)[active]
        if name == "st":
            parts = [self.read(register, f"b{item * 8}")[active] for register in registers]
            raw = np.stack(parts, 1).view(np.uint8).reshape(len(at), -1)
            self._memory.store(at, raw, active, each.text)
            return
        loaded = self._memory.load(at, item * len(registers), active, each.text)
        for place, register in enumerate(registers):
            values = np.zeros(self._size, DTYPES[kind])
            values[active] = np.ascontiguousarray(loaded[:, place * item : (place + 1) * item]).view(DTYPES[kind])[:, 0]
            self.write(register, values, active)

    def matrix(self, each: Instruction, active: Values) -> None:
        """ldmatrix, stmatrix: 8x8 matrices of 16 bits.

        Thread 8 i + r of a warp says where row r of matrix i lies. A register of thread t holds element (t / 4, 2 (t % 4)) and
        the one to its right; transposed, those of the transpose.
        """
        name, *mods = each.op
        if (
            mods[:3] != ["sync", "aligned", "m8n8"]
            or mods[-2:] != ["shared", "b16"]
            or mods[3] not in ("x1", "x2", "x4")
        ):
            raise PTXError(f"unknown instruction: {each.text}")
        if not active.all():
            raise PTXError(f"{each.text}: only where every thread reaches it")
        transposed = "trans" in mods
        registers = _list(each.args[0 if name == "ldmatrix" else 1])
        address = self.address(each.args[1 if name == "ldmatrix" else 0], "shared").reshape(-1, 32)
        lane = np.arange(32)
        for number, register in enumerate(registers):
            # Every lane's access to the two elements of its register, one after the other.
            parts: list[Values] = []
            values = self.read(register, "b32").reshape(-1, 32) if name == "stmatrix" else None
            for half in (0, 1):
                line, column = (2 * (lane % 4) + half, lane // 4) if transposed else (lane // 4, 2 * (lane % 4) + half)
                at = (address[:, 8 * number + line] + (2 * column).astype(np.uint64)).reshape(-1)
                if values is None:
                    parts.append(self._memory.load(at, 2, active, each.text))
                else:
                    piece = (values >> np.uint32(16 * half)).astype(np.uint16).reshape(-1, 1)
                    self._memory.store(at, np.ascontiguousarray(piece).view(np.uint8), active, each.text)
            if values is None:
                loaded = np.ascontiguousarray(np.concatenate(parts, 1)).view(np.uint32)[:, 0]
                self.write(register, loaded, active)

    def move(self, each: Instruction, active: Values) -> None:
        name, *mods = each.op
        if (name, mods[0]) != ("cvta", "to") and len(mods) != 1:
            raise PTXError(f"unknown instruction: {each.text}")
        kind, (to, source) = mods[-1], each.args
        if to.startswith("{"):
            parts = _list(to)
            width = int(kind[1:]) // len(parts)
            pieces = np.ascontiguousarray(self.read(source, kind)).view(DTYPES[f"b{width}"]).reshape(self._size, -1)
            for place, register in enumerate(parts):
                self.write(register, np.ascontiguousarray(pieces[:, place]), active)
        elif source.startswith("{"):
            parts = _list(source)
            pieces = [self.read(part, f"b{int(kind[1:]) // len(parts)}") for part in parts]
            self.write(to, np.stack(pieces, 1).view(DTYPES[f"b{kind[1:]}"]).reshape(-1), active)
        else:
            self.write(to, self.read(source, kind), active)

    def run(self) -> set[int]:
        """-> the places in the code that were reached."""
        code, n = self._kernel.code, self._size
        counter, alive, reached = np.zeros(n, np.int64), np.ones(n, bool), set[int]()
        while alive.any():
            here = int(counter[alive].min())
            each = code[here]
            present = alive & (counter == here)
            active = present
            if each.guard is not None:
                active = present & (self.read(each.guard, "pred") ^ each.negated)
            reached.add(here)
            counter[present] += 1
            name = each.op[0]
            if name == "bra":
                counter[active] = self._kernel.labels[each.args[0]]
            elif name == "ret":
                alive &= ~active
            elif name == "bar":
                if (active != alive).any():
                    raise PTXError(f"{each.text}: {active.sum()} of {alive.sum()} threads reach the barrier")
                self._memory.barrier()
            elif name == "ld" and each.op[1] == "param":
                kind = each.op[2]
                value = self._values[each.args[1].strip("[] ")] % (1 << np.dtype(DTYPES[kind]).itemsize * 8)
                self.write(each.args[0], np.full(n, value, DTYPES[kind.replace("s", "u")]), active)
            elif name in ("ld", "st"):
                self.access(each, active)
            elif name == "atom":
                self.atomic(each, active)
            elif name == "shfl":
                self.shuffle(each, active)
            elif name in ("ldmatrix", "stmatrix"):
                self.matrix(each, active)
            elif name == "redux":
                _, order, how, kind = each.op if len(each.op) == 4 else (*each.op[:2], "", "")
                known = how in REDUCTIONS and kind in ("s32", "u32", "f32") and not (how == "add" and kind == "f32")
                if order != "sync" or not known:
                    raise PTXError(f"unknown instruction: {each.text}")
                if not active.all():
                    raise PTXError(f"{each.text}: only whole-warp reductions that every thread reaches")
                warps = self.read(each.args[1], kind).reshape(-1, 32)
                self.write(each.args[0], np.repeat(REDUCTIONS[how].reduce(warps, 1).astype(DTYPES[kind]), 32), active)
            elif name in ("mov", "cvta"):
                self.move(each, active)
            else:
                with np.errstate(all="ignore"):
                    self.write(each.args[0], self.compute(each), active)
        return reached

    def shuffle(self, each: Instruction, active: Values) -> None:
        """A register of another lane: lane ^ distance; `up`, lane - distance or its own where none is; `idx`, one by number."""
        _, order, how, *_ = each.op
        whole = each.args[-1] in ("-1", "0xffffffff") and active.all()
        if order != "sync" or how not in ("bfly", "up", "idx") or each.args[3] != _LAST[how] or not whole:
            raise PTXError(f"{each.text}: only whole-warp shuffles that every thread reaches")
        thread, by = np.arange(self._size), self.read(each.args[2], "u32").astype(np.int64)
        if how == "bfly":
            source = thread ^ by
        elif how == "up":
            source = np.where(thread % 32 < by, thread, thread - by)
        else:
            source = thread // 32 * 32 + by % 32
        self.write(each.args[0].split("|")[0], self.read(each.args[1], "b32")[source], active)

    def atomic(self, each: Instruction, active: Values) -> None:
        if each.op != ("atom", "global", "gpu", "acq_rel", "add", "u32"):
            raise PTXError(f"unknown instruction: {each.text}")
        values = np.zeros(self._size, np.uint32)
        for thread in np.flatnonzero(active).tolist():
            at, plus = self.address(each.args[1], "global")[thread], self.read(each.args[2], "b32")[thread]
            values[thread] = self._memory.add_atomically(int(at), int(plus), thread, each.text)
        self.write(each.args[0], values, active)


def _list(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


@dataclass(frozen=True)
class Seen:
    """What a launch did. buffers: by argument's place. executed: the share of the instructions that some block reached."""

    buffers: dict[int, Buffer]
    executed: float

    def reads(self, place: int) -> set[int]:
        """How often each byte of an argument was read, by distinct instructions and blocks."""
        return set(self.buffers[place].reads.tolist())

    def writes(self, place: int) -> set[int]:
        return set(self.buffers[place].writes.tolist())

    def widths(self, place: int, kind: str) -> set[int]:
        """The sizes in bytes of the accesses of a kind, "ld" or "st"."""
        return {size for name, size in self.buffers[place].widths if name == kind}


def launch(
    kernel: Kernel,
    grid: int | tuple[int, int, int],
    arguments: Sequence[Any],
    shared_bytes: int,
    *,
    approximation: float = 0.0,
) -> Seen:
    """Runs a grid of blocks, the first coordinate fastest.

    arguments: integers, and numpy arrays, which are written in place as device memory is.
    """
    memory = Memory()
    numbers = [
        memory.add(at + 2, each) if isinstance(each, np.ndarray) else int(each) for at, each in enumerate(arguments)
    ]
    numbers += [0] * (len(kernel.params) - len(numbers))  # triton's scratch pointers, which these kernels do not use
    reached: set[int] = set()
    sizes = (grid, 1, 1) if isinstance(grid, int) else grid
    for block, (z, y, x) in enumerate(np.ndindex(*sizes[::-1])):
        view = BlockMemory(memory, block, kernel.threads, max(shared_bytes, 16))
        reached |= Block(kernel, (x, y, z), numbers, view, approximation).run()
    for at, each in enumerate(arguments):
        if isinstance(each, np.ndarray):
            each[...] = memory.buffers[at + 2].data.view(each.dtype).reshape(each.shape)
    return Seen({number - 2: each for number, each in memory.buffers.items()}, len(reached) / len(kernel.code))
