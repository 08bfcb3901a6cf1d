"""The cache of artefacts: built once however many ask, whole or absent whatever is killed, bounded in size.

    CACHE/<name>/              an entry; it appears, and leaves, in one rename
    CACHE/.locks/<name>        held shared by every process that uses the entry, exclusively by the one that builds or removes it
    CACHE/.building-<name>     an entry on its way; without a builder (its lock is free) it is what a killed one left behind
    CACHE/.removed-<name>      likewise, on its way out

CACHE is TILTSCOPE_HOME/artefacts. The system frees a lock when its process ends, however it ends. Least recently used entries go
first once all are larger than TILTSCOPE_CACHE_MIB together (default 8192); what a process uses stays. Knows folders; knows
neither what is in them nor torch.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from tiltscope.engine.errors import ConfigError, RunnerError

DEFAULT_MIB = 8192
_BUILDING, _REMOVED, _LOCKS = ".building-", ".removed-", ".locks"
logger = logging.getLogger(__name__)
# What this process uses: an entry's lock stays held until the process ends, so nobody removes a file that is yet to be opened.
_leases: dict[Path, int] = {}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A folder of the cache: its size, and when a process last asked for it (seconds since the epoch)."""

    folder: Path
    size: int
    last_used: float


def cache_folder(name: str = "artefacts") -> Path:
    """TILTSCOPE_HOME/`name` (default: in the platform's user cache), made with mode 0700.

    Raises RunnerError where it belongs to somebody else or others may write into it: what lies there is run.
    """
    home = os.environ.get("TILTSCOPE_HOME")
    folder = (Path(home) if home else user_cache_path("tiltscope")) / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise RunnerError(
            f"{folder} belongs to another user or can be written by others, and engines are code; "
            "chmod 700 it, or set TILTSCOPE_HOME to a folder of your own"
        )
    return folder


def kept_file(name: str, key: object) -> Path:
    """Where what was found for `key` (what JSON can say) is kept, in TILTSCOPE_HOME/`name`; the file may not be there yet."""
    return cache_folder(name) / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"


def limit_bytes() -> int:
    """What all entries together may take: TILTSCOPE_CACHE_MIB. Raises ConfigError where that is no positive number."""
    given = os.environ.get("TILTSCOPE_CACHE_MIB", str(DEFAULT_MIB))
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"TILTSCOPE_CACHE_MIB: got {given!r}, allowed are whole numbers of MiB from 1")
    return int(given) * 2**20


def obtain_entry(name: str, build: Callable[[Path], None]) -> Path:
    """The folder of entry `name`; where there is none, `build` fills one, in one process only while all others wait for it.

    The entry stays until this process ends. Raises what `build` raises, and then leaves nothing.
    """
    cache, limit = cache_folder(), limit_bytes()
    folder = cache / name
    while True:
        lease = _lock(cache, name, fcntl.LOCK_SH)
        if folder.is_dir():
            break
        os.close(lease)
        builder = _lock(cache, name, fcntl.LOCK_EX)
        try:
            # Whoever had the lock before may have built it.
            if not folder.is_dir():
                _build(folder, build)
        finally:
            os.close(builder)
        # Between the two locks somebody may have removed it again: look once more.
    os.utime(folder)
    if folder in _leases:
        os.close(lease)
    else:
        _leases[folder] = lease
    evict(limit)
    return folder


def entries() -> list[Entry]:
    """Every whole entry, the least recently used first."""
    found: list[Entry] = []
    for folder in cache_folder().iterdir():
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            found.append(Entry(folder=folder, size=size, last_used=folder.stat().st_mtime))
        except FileNotFoundError:  # another process removed it meanwhile
            continue
    return sorted(found, key=lambda each: (each.last_used, each.folder.name))


def evict(limit: int) -> list[Path]:
    """Remove the least recently used entries, those in use excepted, until all together take no more than `limit` bytes."""
    there = entries()
    total, removed = sum(each.size for each in there), list[Path]()
    for each in there:
        if total <= limit:
            break
        if remove_entry(each.folder):
            logger.info("removed %s from the cache: larger than TILTSCOPE_CACHE_MIB allows", each.folder)
            total -= each.size
            removed.append(each.folder)
    return removed


def remove_entry(folder: Path) -> bool:
    """Remove an entry. False, and nothing done, where a process uses it."""
    with _lock_if_free(folder.parent, folder.name) as free:
        if not free:
            return False
        if folder.is_dir():
            gone = folder.parent / f"{_REMOVED}{folder.name}"
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)  # from here on nobody sees half of it
            shutil.rmtree(gone)
        return True


def remove_leftovers() -> int:
    """Remove what killed processes left of building and removing. Returns how many folders that were."""
    cache, removed = cache_folder(), 0
    for folder in sorted(cache.iterdir()):
        for prefix in (_BUILDING, _REMOVED):
            if not folder.name.startswith(prefix):
                continue
            with _lock_if_free(cache, folder.name.removeprefix(prefix)) as free:
                if free:
                    shutil.rmtree(folder, ignore_errors=True)
                    removed += 1
    return removed


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    """Under the entry's exclusive lock: no other process writes to `place`."""
    place = folder.parent / f"{_BUILDING}{folder.name}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    try:
        build(place)
        place.rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _open(cache: Path, name: str) -> int:
    """A descriptor of the entry's lock file. Not inherited by child processes: a lock ends with the process that took it."""
    locks = cache / _LOCKS
    locks.mkdir(mode=0o700, exist_ok=True)
    return os.open(locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(cache: Path, name: str, how: int) -> int:
    """The entry's lock, waited for; closing the descriptor gives it back."""
    lock = _open(cache, name)
    try:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is building %s: waiting for it", cache / name)
            fcntl.flock(lock, how)
    except BaseException:  # an interrupt while waiting, say
        os.close(lock)
        raise
    return lock


@contextmanager
def _lock_if_free(cache: Path, name: str) -> Generator[bool]:
    """Whether nobody uses the entry; if so, nobody can until the block ends."""
    lock = _open(cache, name)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(lock)
