"""The natural pictures that a bundle is made of: found in a folder, named, split, and brought to one size. Knows no models.

Nothing of a picture is decoded before its size is known to be sane, and only by decoders that run no code of the file
(PNG, JPEG, WebP). What cannot be read is told as such, picture by picture; it is for the caller to leave it out or to stop.
"""

import hashlib
import io
import json
import os
import re
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from tiltscope.engine.errors import BundleError, ConfigError

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
CAPTIONS = ("name", "caption", "text")
# 8192 x 8192: far beyond any photograph of a data set, far below what fills a memory (200 MB decoded).
MOST_PIXELS = 2**26
MOST_BYTES = 2**28
HELDOUT_SHARE = 0.10
HELDOUT = {"heldout", "test", "val", "valid", "validation"}
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_EIGHT_BITS = ("1", "L", "P", "RGB", "CMYK", "YCbCr", *_TRANSPARENT)
_SHOWN = 3


class Unreadable(Exception):
    """One picture cannot be used; the message is the reason, without the file's name."""


class Pictures(Protocol):
    """Pictures in a fixed order, all of one size once loaded. May be read from several threads at a time."""

    num: int

    def columns(self, index: int) -> dict[str, Any]:
        """What is known of one picture: file, name, category, group, split (texts) and keywords (texts)."""
        ...

    def load(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        """Its pixels. Raises Unreadable."""
        ...

    def identity(self) -> str:
        """A digest that changes with the list of pictures."""
        ...


def unit_hash(text: str, salt: str) -> float:
    """A fixed number in [0, 1) of a text: a split needs no random state."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{text}".encode()).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class _File:
    path: str
    """relative to the folder, with /"""
    size: int
    changed_ns: int


class FolderPictures:
    """The PNG, JPEG and WebP files below a folder, in the order of their paths.

    metadata.jsonl in the folder, as `datasets` writes it, may say of a picture (`file_name`): name (or caption, or text),
    category, keywords (a list), group, split. A text file beside a picture (cat.txt for cat.png) is its name; else its file's
    words are. The folder is its category. Pictures of one `group` (default: each its own) stand on one side of the split;
    without a split, a tenth of the groups is held out, by a hash.
    """

    def __init__(self, folder: Path, *, size: tuple[int, int], background: int = 255) -> None:
        """size: [height, width] wanted; background: grey that transparency is laid on.

        Raises ConfigError where there is no such folder or no picture in it, BundleError where metadata.jsonl is unreadable or
        speaks of pictures that are not there.
        """
        if not folder.is_dir():
            raise ConfigError(f"pool {folder} is not a folder; give one that holds PNG, JPEG or WebP pictures")
        self.folder, self.size, self.background = folder, size, background
        self._files: list[_File] = []
        self._captions: dict[str, _File] = {}
        for root, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                self._take(Path(root, name))
        self._files.sort(key=lambda each: each.path)
        self.num = len(self._files)
        if not self.num:
            raise ConfigError(f"pool {folder} holds no picture; allowed are {', '.join(SUFFIXES)}")
        self._rows = _Metadata(folder / METADATA) if (folder / METADATA).is_file() else None
        if self._rows is not None:
            self._rows.check({each.path for each in self._files})

    def _take(self, path: Path) -> None:
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in (*SUFFIXES, ".txt") or not path.is_file():
            return
        found = path.stat()
        file = _File(path.relative_to(self.folder).as_posix(), found.st_size, found.st_mtime_ns)
        if suffix == ".txt":
            self._captions[file.path] = file
        else:
            self._files.append(file)

    def identity(self) -> str:
        digest = hashlib.sha256()
        for each in (*self._files, *(self._captions[path] for path in sorted(self._captions))):
            digest.update(f"{each.path}\0{each.size}\0{each.changed_ns}\n".encode("utf-8", "surrogateescape"))
        if self._rows is not None:
            digest.update(self._rows.digest.encode())
        return digest.hexdigest()

    def columns(self, index: int) -> dict[str, Any]:
        path = self._files[index].path
        told = {} if self._rows is None else self._rows.row(path)
        group = path if told.get("group") is None else str(told["group"])
        split = str(told.get("split") or "").lower()
        heldout = split in HELDOUT if split else unit_hash(group, "pool split") < HELDOUT_SHARE
        keywords = told.get("keywords") or []
        return {
            "file": path,
            "name": self._name(path, told),
            "category": str(told.get("category") or Path(path).parent.name.replace("_", " ")),
            "keywords": [str(word) for word in keywords] if isinstance(keywords, list) else str(keywords).split(),
            "group": group,
            "split": "heldout" if heldout else "train",
        }

    def _name(self, path: str, told: Mapping[str, Any]) -> str:
        for key in CAPTIONS:
            if told.get(key):
                return str(told[key])
        beside = Path(path).with_suffix(".txt").as_posix()
        if beside in self._captions:
            text = (self.folder / beside).read_bytes()[:4096].decode("utf-8", "replace")
            if lines := [line.strip() for line in text.splitlines() if line.strip()]:
                return lines[0]
        stem = Path(path).stem
        return " ".join(word for word in re.split(r"[\W_]+", stem) if word and not word.isdecimal()) or stem

    def load(self, index: int) -> UInt8[np.ndarray, "height width 3"]:
        file = self._files[index]
        if file.size > MOST_BYTES:
            raise Unreadable(f"{file.size:,} bytes; at most {MOST_BYTES:,} are read")
        return load_picture(self.folder / file.path, size=self.size, background=self.background)


class _Metadata:
    """metadata.jsonl by file name, its rows read when they are asked for: of a million, only the places are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # (place << 32) + length: half the memory of a pair, and there may be a million.
        self._places: dict[str, int] = {}
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                at = 0
                for number, line in enumerate(file, start=1):
                    digest.update(line)
                    if line.strip():
                        self._places[str(self._parse(line, number)["file_name"])] = (at << 32) + len(line)
                    at += len(line)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self.digest = digest.hexdigest()

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BundleError(f"{self._path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise BundleError(f'{self._path} line {number} must be a JSON object with "file_name"')
        return row

    def check(self, files: set[str]) -> None:
        if strangers := sorted(set(self._places) - files):
            more = f" and {len(strangers) - _SHOWN} more" if len(strangers) > _SHOWN else ""
            raise BundleError(
                f"{self._path} speaks of {len(strangers)} pictures that are not in the folder "
                f"({', '.join(strangers[:_SHOWN])}{more}); take their lines out, or add them"
            )

    def row(self, name: str) -> dict[str, Any]:
        if name not in self._places:
            return {}
        at, length = self._places[name] >> 32, self._places[name] & (2**32 - 1)
        # Not a seek and a read: threads share the descriptor.
        return self._parse(os.pread(self._descriptor, length, at), 0)


def load_picture(path: Path, *, size: tuple[int, int], background: int) -> UInt8[np.ndarray, "height width 3"]:
    """Turned as its camera says, laid on grey where transparent, its middle cut out in the wanted proportions and resized.

    Bicubic, antialiased; untouched where it has the size already. Raises Unreadable for a file of another format, a damaged one,
    one of more than MOST_PIXELS (before anything is decoded), and one of more than 8 bits a channel.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise Unreadable(f"{width} x {height} pixels; at most {MOST_PIXELS:,} are decoded")
            if opened.mode not in _EIGHT_BITS:
                raise Unreadable(f"pixels of kind {opened.mode}; allowed are 8 bits a channel")
            turned: Image.Image = ImageOps.exif_transpose(opened)
            return np.asarray(_fitted(_opaque(turned, background), size)).copy()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(f"more than {MOST_PIXELS:,} pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, struct.error) as error:
        # What Pillow's decoders raise on damaged files; its own words name the cause best.
        raise Unreadable(" ".join(str(error).replace(str(path), "the file").split()) or type(error).__name__) from error


def _opaque(picture: Image.Image, background: int) -> Image.Image:
    if picture.mode not in _TRANSPARENT and "transparency" not in picture.info:
        return picture.convert("RGB")
    above = picture.convert("RGBA")
    canvas = Image.new("RGBA", above.size, (background,) * 3 + (255,))
    canvas.alpha_composite(above)
    return canvas.convert("RGB")


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if picture.size == (width, height):
        return picture
    scale = min(picture.width / width, picture.height / height)
    cut = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = (picture.width - cut[0]) // 2, (picture.height - cut[1]) // 2
    # Cut first: resize(box=...) lets its filter look beyond the box.
    return picture.crop((left, top, left + cut[0], top + cut[1])).resize((width, height), Image.Resampling.BICUBIC)


def encode(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Lossless WebP: the bytes from which the very same pixels come back."""
    buffer = io.BytesIO()
    # Method 6 takes twenty times as long for one per cent.
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def first_few(items: Sequence[str]) -> str:
    """The first names of a list, and how many more."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
