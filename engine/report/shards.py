"""Tensors of many samples in safetensors files that are merged row by row, so that memory stays flat.

A file holds one row a sample in each of its tensors, and `index` and `ok` among them. What is read here is what this module
wrote: anything else (cut short, another format) does not count as a file. Knows nothing of pictures and folders.
"""

import json
import math
import operator
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.report.atomic import replacing

SHARD = 4096
_DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "U64": "<u8", "BOOL": "|b1", "U8": "|u1"}
_NAMES = {text[1:]: name for name, text in _DTYPES.items()}
_COPY_BYTES = 1 << 20


class IndexSet(Set[int]):
    """A set of sample indices at a bit each: a million of them is 128 KiB. Iterates in ascending order."""

    def __init__(self, indices: Iterable[int] = ()) -> None:
        self._bits: dict[int, int] = {}
        self._num = 0
        for index in indices:
            self.add(index)

    def add(self, index: int) -> None:
        if index not in self:
            self._bits[index // SHARD] = self._bits.get(index // SHARD, 0) | 1 << index % SHARD
            self._num += 1

    def num_in(self, shard: int) -> int:
        """How many of a shard's indices are in the set."""
        return self._bits.get(shard, 0).bit_count()

    def __contains__(self, index: object) -> bool:
        if not isinstance(index, SupportsIndex):
            return False
        at = operator.index(index)  # numpy's integers are no `int`
        return bool(self._bits.get(at // SHARD, 0) >> at % SHARD & 1)

    def __iter__(self) -> Iterator[int]:
        for shard in sorted(self._bits):
            bits, start = self._bits[shard], shard * SHARD
            yield from (start + at for at in range(SHARD) if bits >> at & 1)

    def __len__(self) -> int:
        return self._num


@dataclass(frozen=True)
class TensorFile:
    """A complete safetensors file: tensor name -> (dtype, shape of one row, offset of the first byte in the file)."""

    path: Path
    num: int
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    metadata: Mapping[str, str]

    def column(self, name: str) -> NDArray[Any]:
        """One tensor, all its rows."""
        dtype, row, offset = self.tensors[name]
        values = np.fromfile(self.path, dtype=_DTYPES[dtype], count=self.num * math.prod(row), offset=offset)
        return values.reshape(self.num, *row)

    def row_bytes(self, name: str) -> int:
        dtype, row, _ = self.tensors[name]
        return np.dtype(_DTYPES[dtype]).itemsize * math.prod(row)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A new file, whole or not at all; the same bytes for the same tensors. Raises KeyError for a dtype not used here."""
    columns = {name: each.detach().cpu().contiguous().numpy() for name, each in tensors.items()}
    layout = {name: (_NAMES[each.dtype.str[1:]], each.shape[1:]) for name, each in columns.items()}
    num = len(next(iter(columns.values())))
    with replacing(path) as out:
        for name in _write_header(out, layout, num, metadata):
            out.write(columns[name].data)


def open_tensors(path: Path) -> TensorFile | None:
    """The file's description, None where it is missing, cut short or not a file of rows."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(length)) if length <= size - 8 else {}
        metadata: dict[str, str] = header.pop("__metadata__", {})
        tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
        rows: set[int] = set()
        end = 0
        for name, each in header.items():
            tensors[name] = each["dtype"], tuple(each["shape"][1:]), 8 + length + each["data_offsets"][0]
            rows.add(each["shape"][0])
            end = max(end, each["data_offsets"][1])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        return None
    whole = size == 8 + length + end and len(rows) == 1 and {"index", "ok"} <= tensors.keys()
    known = all(dtype in _DTYPES for dtype, _, _ in tensors.values())
    return TensorFile(path, rows.pop(), tensors, metadata) if whole and known else None


def select(sources: Iterable[TensorFile]) -> dict[int, tuple[TensorFile, int]]:
    """Where each index is found: file and row. A sample that is ok goes before one that is not, then the later file."""
    chosen: dict[int, tuple[TensorFile, int]] = {}
    sound: set[int] = set()
    for source in sources:
        for row, (index, ok) in enumerate(
            zip(source.column("index").tolist(), source.column("ok").tolist(), strict=True)
        ):
            if ok or index not in sound:
                chosen[index] = source, row
            if ok:
                sound.add(index)
    return chosen


def merge(path: Path, rows: Sequence[tuple[TensorFile, int]], metadata: Mapping[str, str]) -> None:
    """One file of the rows given, in their order. At most a megabyte is held in memory, however large a row.

    Raises OSError where the files hold different tensors: they were written by different versions.
    """
    first = rows[0][0]
    layout = {name: (dtype, row) for name, (dtype, row, _) in first.tensors.items()}
    for source in {id(source): source for source, _ in rows}.values():
        if {name: (dtype, row) for name, (dtype, row, _) in source.tensors.items()} != layout:
            raise OSError(
                f"{source.path} and {first.path} hold different tensors; remove one, its samples are drawn again"
            )
    with replacing(path) as out:
        for name in _write_header(out, layout, len(rows), metadata):
            _copy_rows(rows, name, out)


def _write_header(
    out: BinaryIO, layout: Mapping[str, tuple[str, tuple[int, ...]]], num: int, metadata: Mapping[str, str]
) -> list[str]:
    """The header of `num` rows; returns the tensors' names in the order their bytes must follow.

    safetensors' own writer orders metadata differently in each process.
    """
    # Widest numbers first: every tensor then starts where its type wants it.
    names = sorted(layout, key=lambda name: (-np.dtype(_DTYPES[layout[name][0]]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        dtype, row = layout[name]
        start, end = end, end + num * np.dtype(_DTYPES[dtype]).itemsize * math.prod(row)
        header[name] = {"dtype": dtype, "shape": [num, *row], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    return names


def _copy_rows(rows: Sequence[tuple[TensorFile, int]], name: str, out: BinaryIO) -> None:
    size = rows[0][0].row_bytes(name)
    for source, start, num in _runs(rows):
        with source.path.open("rb") as file:
            file.seek(source.tensors[name][2] + start * size)
            left = num * size
            while left:
                block = file.read(min(left, _COPY_BYTES))
                if not block:
                    raise OSError(f"{source.path} became shorter while it was read")
                out.write(block)
                left -= len(block)


def _runs(rows: Sequence[tuple[TensorFile, int]]) -> Iterator[tuple[TensorFile, int, int]]:
    """(file, first row, number of rows) for every stretch of rows that follow each other in one file."""
    at = 0
    while at < len(rows):
        source, start = rows[at]
        num = 1
        while at + num < len(rows) and rows[at + num][0] is source and rows[at + num][1] == start + num:
            num += 1
        yield source, start, num
        at += num
