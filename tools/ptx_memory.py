"""Memory as the executor of PTX (ptx_executor.py) sees it: every access checked and counted.

Refused: an access outside a buffer, a misaligned one, threads that store different values to one address, shared memory read
before it is written, two warps on one shared byte without a barrier between them, a block on global bytes that another block
wrote unless an atomic with release semantics after the write and one with acquire semantics before the access order the two.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
SHARED = 1  # the buffer a block's shared memory is; arguments are 2 and up
_SPACE = 40  # buffers lie 2^40 bytes apart: no overrun lands in a neighbour
_NEVER = -1
_MANY = -2


class PTXError(Exception):
    """The code does something that is wrong on a device, or something that is not modelled."""


@dataclass
class Buffer:
    """One argument's bytes, who wrote each, and how often each was moved."""

    data: Bytes
    writer: NDArray[np.int64] = field(init=False)
    released: NDArray[np.int64] = field(init=False)  # when the writer released it; _NEVER before
    reads: NDArray[np.int64] = field(init=False)
    writes: NDArray[np.int64] = field(init=False)
    widths: dict[tuple[str, int], int] = field(default_factory=dict)  # ("ld", 16): how many instructions a block

    def __post_init__(self) -> None:
        size = len(self.data)
        self.writer, self.released = np.full(size, _NEVER), np.full(size, _NEVER)
        self.reads, self.writes = np.zeros(size, np.int64), np.zeros(size, np.int64)


class Shared:
    """A block's shared memory: which bytes were written at all, and which warps used each since the last barrier."""

    def __init__(self, size: int) -> None:
        self.data = np.zeros(size, np.uint8)
        self._written = np.zeros(size, bool)
        self.barrier()

    def barrier(self) -> None:
        self._reader, self._writer = (np.full(len(self.data), _NEVER) for _ in range(2))

    def check(self, kind: str, at: NDArray[np.int64], warp: NDArray[np.int64], text: str) -> None:
        """at [threads, bytes], warp [threads]"""
        mine = np.broadcast_to(warp[:, None], at.shape)
        clash = ~np.isin(self._writer[at], (_NEVER,)) & (self._writer[at] != mine)
        if kind == "st":
            clash |= (self._reader[at] != _NEVER) & (self._reader[at] != mine)
        if clash.any():
            raise PTXError(f"{text}: shared byte {int(at[clash][0])} used by two warps with no barrier between them")
        if kind == "ld":
            if not self._written[at].all():
                raise PTXError(f"{text}: shared byte {int(at[~self._written[at]][0])} read before it is written")
            before = self._reader[at]
            self._reader[at] = np.where((before == _NEVER) | (before == mine), mine, _MANY)
            lost = self._reader[at] != mine  # another warp of the same instruction was the last to write its name
            self._reader[at[lost]] = _MANY
        else:
            self._writer[at] = mine
            # Two warps of one instruction may store one value (Memory.store sees that it is one); who reads it waits for both.
            self._writer[at[self._writer[at] != mine]] = _MANY
            self._written[at] = True


class Memory:
    """All buffers of a launch, and the order that atomics put between its blocks."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}
        self.clock = 0

    def add(self, number: int, array: NDArray[Any]) -> int:
        """-> the address of its first byte."""
        self.buffers[number] = Buffer(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        return number << _SPACE


class BlockMemory:
    """One block's view: its shared memory, and what it has acquired."""

    def __init__(self, memory: Memory, block: int, threads: int, shared_bytes: int) -> None:
        self._memory, self._block = memory, block
        self.shared = Shared(shared_bytes)
        self._warp = np.arange(threads) // 32
        self._threads = np.arange(threads)
        self._acquired = np.full(threads, _NEVER)  # when each thread last acquired
        self._unordered: set[int] = set()  # threads that stored to global memory since the last barrier
        self._mine: list[tuple[int, NDArray[np.int64]]] = []

    def barrier(self) -> None:
        self.shared.barrier()
        self._unordered.clear()
        self._acquired[:] = self._acquired.max()

    def locate(self, address: NDArray[np.uint64], size: int, text: str) -> tuple[int, NDArray[np.int64]]:
        """-> (buffer, [threads, size] places in it)"""
        numbers = np.unique(address >> np.uint64(_SPACE))
        number = int(numbers[0])
        if len(numbers) != 1 or (number != SHARED and number not in self._memory.buffers):
            raise PTXError(f"{text}: no buffer at address {int(address[0]):#x}")
        length = len(self.shared.data) if number == SHARED else len(self._memory.buffers[number].data)
        offset = (address & np.uint64((1 << _SPACE) - 1)).astype(np.int64)
        if (offset + size > length).any():
            raise PTXError(f"{text}: out of bounds, {size} bytes at byte {int(offset.max())} of a buffer of {length}")
        if (offset % size).any():
            raise PTXError(f"{text}: misaligned, {size} bytes at byte {int(offset[offset % size != 0][0])}")
        return number, offset[:, None] + np.arange(size)

    def _claim(self, number: int, at: NDArray[np.int64], active: NDArray[np.bool_], text: str) -> Buffer:
        buffer = self._memory.buffers[number]
        foreign = (buffer.writer[at] != _NEVER) & (buffer.writer[at] != self._block)
        seen = (buffer.released[at] != _NEVER) & (buffer.released[at] <= self._acquired[active][:, None])
        if (foreign & ~seen).any():
            raise PTXError(
                f"{text}: block {self._block} touches bytes that another block wrote, and nothing orders them"
            )
        return buffer

    def load(self, address: NDArray[np.uint64], size: int, active: NDArray[np.bool_], text: str) -> Bytes:
        """address of the active threads -> [active, size] bytes"""
        number, at = self.locate(address, size, text)
        if number == SHARED:
            self.shared.check("ld", at, self._warp[active], text)
            return self.shared.data[at]
        buffer = self._claim(number, at, active, text)
        buffer.reads[np.unique(at)] += 1  # a broadcast is one read
        buffer.widths["ld", size] = buffer.widths.get(("ld", size), 0) + 1
        return buffer.data[at]

    def store(self, address: NDArray[np.uint64], values: Bytes, active: NDArray[np.bool_], text: str) -> None:
        """values [active, size]"""
        size = values.shape[1]
        number, at = self.locate(address, size, text)
        if number == SHARED:
            self.shared.check("st", at, self._warp[active], text)
            data = self.shared.data
        else:
            buffer = self._claim(number, at, active, text)
            data, once = buffer.data, np.unique(at)
            buffer.writer[once], buffer.released[once] = self._block, _NEVER
            buffer.writes[once] += 1
            buffer.widths["st", size] = buffer.widths.get(("st", size), 0) + 1
            self._mine.append((number, once))
            self._unordered.update(self._threads[active].tolist())
        data[at] = values
        if (data[at] != values).any():
            raise PTXError(f"{text}: threads store different values to one address")

    def add_atomically(self, address: int, value: int, thread: int, text: str) -> int:
        """A 32-bit atomic addition, release and acquire at device scope, by one thread -> the old value."""
        if others := self._unordered - {thread}:
            raise PTXError(f"{text}: released with stores of thread {min(others)} that no barrier puts before it")
        number, at = self.locate(np.array([address], np.uint64), 4, text)
        buffer = self._memory.buffers[number]
        word = buffer.data[at[0]].view(np.uint32)
        old = int(word[0])
        buffer.data[at[0]] = np.array([(old + value) & 0xFFFFFFFF], np.uint32).view(np.uint8)
        self._memory.clock += 1
        for where, places in self._mine:
            mine = places[self._memory.buffers[where].writer[places] == self._block]
            self._memory.buffers[where].released[mine] = self._memory.clock
        self._mine.clear()
        self._acquired[thread] = self._memory.clock
        # The counter itself is ordered by being atomic.
        buffer.writer[at[0]], buffer.released[at[0]] = self._block, self._memory.clock
        return old
