"""Reading files: JSON, safetensors, and folders with hashes. Whatever is wrong with a file is a BundleError that names it."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tiltscope.engine.errors import BundleError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_tensors(
    path: Path, names: Iterable[str] | None = None, *, dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    """Tensors of a safetensors file, cast to dtype (None: as they are); all of them, or those of `names` that are in the file."""
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            wanted = held if names is None else held & set(names)
            return {name: file.get_tensor(name).to(dtype) for name in sorted(wanted)}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file, sorted; nothing else of it is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return sorted(file.keys())
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def describe_file(path: Path) -> dict[str, Any]:
    """What a description says of a file: its sha256 and size; read in pieces."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The `files` of a folder's bundle.json: every file but that one and those in hidden folders."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: describe_file(path)
        for name, path in names.items()
        if name != "bundle.json" and not any(part.startswith(".") for part in PurePosixPath(name).parts)
    }


class VerifiedFolder:
    """A folder whose description holds size and sha256 of every file; each file is checked when it is first asked for.

    table: {relative path: {"sha256": 64 hex digits, "bytes": size}}. Only listed files are ever read.
    Raises BundleError for an entry that leaves the folder, and (on reading) for a file that is missing, truncated or changed.
    """

    def __init__(self, folder: Path, table: Mapping[str, Any]) -> None:
        self.folder = folder
        self._table: dict[str, tuple[str, int]] = {}
        self._checked: set[str] = set()
        for name, entry in table.items():
            pure = PurePosixPath(name)
            if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or not pure.parts:
                raise BundleError(
                    f"{folder}: file name {name!r} leaves the folder; only relative paths inside it are allowed"
                )
            digest, size = (entry.get("sha256"), entry.get("bytes")) if isinstance(entry, dict) else (None, None)
            if not isinstance(digest, str) or not isinstance(size, int):
                raise BundleError(f"{folder}: the entry of {name!r} must have sha256 and bytes, got {entry!r}")
            self._table[str(pure)] = (digest, size)

    @property
    def names(self) -> list[str]:
        return sorted(self._table)

    def digest(self, *parts: str) -> str:
        """The sha256 that the description gives for a file."""
        return self._table[str(PurePosixPath(*parts))][0]

    def file(self, *parts: str) -> Path:
        """The checked file at parts joined by /."""
        name = str(PurePosixPath(*parts))
        if name not in self._table:
            raise BundleError(f"{self.folder}: {name} is not listed in its description, so it is not read")
        path = self.folder / name
        if name not in self._checked:
            self._check(path, name)
            self._checked.add(name)
        return path

    def subfolder(self, path: str, names: Iterable[str]) -> Path:
        """The folder `path`, the files that will be read there checked first."""
        for name in names:
            self.file(path, name)
        return self.folder / path

    def _check(self, path: Path, name: str) -> None:
        digest, size = self._table[name]
        try:
            if not path.resolve(strict=True).is_relative_to(self.folder.resolve(strict=True)):
                raise BundleError(f"{path} is a link that leaves the folder; replace it by the file itself")
            with path.open("rb") as file:
                found_size = path.stat().st_size
                found = hashlib.file_digest(file, "sha256").hexdigest() if found_size == size else ""
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}") from error
        if found_size != size:
            raise BundleError(f"{path} has {found_size} bytes instead of {size}; fetch the bundle again")
        if found != digest:
            raise BundleError(
                f"{path} is damaged: its sha256 is not the one in the description; fetch the bundle again"
            )
