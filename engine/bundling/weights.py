"""Weights of a model folder into one safetensors file, whether they lie in one file or in several with an index.

Only safetensors are read here: a header is checked against the file by the safetensors library, and an index may name files
of its own folder alone. Files are copied byte by byte; nothing is held in memory, whatever their size.
"""

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tiltscope.engine.bundling.pictures import first_few
from tiltscope.engine.errors import BundleError
from tiltscope.engine.files import read_json, tensor_names
from tiltscope.engine.report.atomic import replacing

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COPY_BYTES = 1 << 20


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files that hold a model's weights: `name`, or those of `name`.index.json, in order.

    Raises BundleError where there is neither, an index names a file outside the folder or one that is missing, or a file's
    header is not true of it.
    """
    whole, index = folder / name, folder / f"{name}.index.json"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        files = _indexed(folder, index)
    else:
        pickled = sorted(each.name for pattern in PICKLES for each in folder.glob(pattern))
        hint = f"; {first_few(pickled)} is no safetensors file: `tiltscope convert` makes one of it" if pickled else ""
        raise BundleError(f"{folder} holds no {name} and no {index.name}{hint}")
    for file in files:
        tensor_names(file)  # the library checks the header
    return files


def _indexed(folder: Path, index: Path) -> list[Path]:
    table: Any = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(each, str) for each in table.values()):
        raise BundleError(f"{index} must hold a weight_map from names to files")
    files: list[Path] = []
    for name in sorted(set(table.values())):
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise BundleError(f"{index} names the file {name!r}; only .safetensors files of its own folder are read")
        if not (folder / name).is_file():
            raise BundleError(f"{index} names the file {name!r}, which is not there; fetch the folder again")
        files.append(folder / name)
    return files


def copy_weights(files: list[Path], target: Path) -> None:
    """The tensors of all `files` in one. Raises BundleError for a name that two of them hold."""
    if len(files) == 1:
        copy_file(files[0], target)
        return
    headers = [_header(file) for file in files]
    layout: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[tuple[Path, int, int]] = []
    at = 0
    for file, (start, header) in zip(files, headers, strict=True):
        for name, entry in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"][0]):
            if name in layout:
                raise BundleError(f"two files of {file.parent} hold the tensor {name!r}; fetch the folder again")
            begin, end = entry["data_offsets"]
            layout[name] = dict(entry) | {"data_offsets": [at, at + end - begin]}
            parts.append((file, start + begin, end - begin))
            at += end - begin
    text = json.dumps(layout, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for file, start, size in parts:
            with file.open("rb") as source:
                source.seek(start)
                _copy(source, out, size)


def _header(file: Path) -> tuple[int, Mapping[str, Any]]:
    """(where the numbers start, what is said of each tensor) of a file whose header was checked."""
    with file.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header: dict[str, Any] = json.loads(source.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def _copy(source: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        chunk = source.read(min(size, _COPY_BYTES))
        if not chunk:
            raise BundleError(f"{source.name} ends before its tensors do; fetch it again")
        out.write(chunk)
        size -= len(chunk)


def copy_file(source: Path, target: Path) -> None:
    """Whole or not at all. Raises BundleError where the source cannot be read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as file, replacing(target) as out:
            shutil.copyfileobj(file, out, _COPY_BYTES)
    except FileNotFoundError as error:
        raise BundleError(f"{source} cannot be read: {error.strerror}") from error
