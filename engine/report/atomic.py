"""Writes that happen whole or not at all: a temporary file in the same folder, flushed to the disk, then renamed.

A reader, or a run that is continued after a kill, finds the old file or the new one. Knows nothing of what is written.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = ".tiltscope-tmp"


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """A file to write into that becomes `path` when the block ends well, and leaves no trace when it does not.

    Raises OSError (a full disk, say); `path` then is what it was before.
    """
    # The process number: two runs started by mistake in one folder must not write into one temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            # Without it a power cut can leave the new name on an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """`content` as the file `path`, whole or not at all."""
    with replacing(path) as file:
        file.write(content)


def clear_temporaries(folder: Path) -> None:
    """Remove what a killed process left half written in `folder` (not in folders below it)."""
    for each in folder.glob(f".*{_TEMPORARY}"):
        each.unlink(missing_ok=True)
