"""An artefact: the folder in which an exporter leaves a step for the runtime to load, self-test and run without it.

    CACHE/<key>/artefact.json           the key, and size and sha256 of every other file
    CACHE/<key>/selftest.safetensors    inputs of the step and the float64 reference's outputs (gate.py)
    CACHE/<key>/...                     the model, whatever the runner needs

The key holds what decides whether an artefact may serve: kind, weights, hook, readout shape, dtype, versions and machine. A
folder appears in one rename, so a killed build leaves none. CACHE is TILTSCOPE_HOME/artefacts; engines are code, so it must be
the user's own and closed to others.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path

from tiltscope.engine.errors import BundleError, RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.files import VerifiedFolder, read_json
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.exported import padded_rows
from tiltscope.engine.runtime.gate import SelfTest

DESCRIPTION, SELF_TEST = "artefact.json", "selftest.safetensors"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Artefact:
    """A built step on disk, every file checked against its hash."""

    folder: Path
    key: dict[str, Any]

    @property
    def self_test(self) -> SelfTest:
        return SelfTest.load(self.folder / SELF_TEST)


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


def artefact_key(kind: str, prior: Prior, feature: Feature, dtype: torch.dtype) -> dict[str, Any]:
    """What an artefact was built for; another value of any of these needs another artefact."""
    readout = feature.readout
    return {
        "kind": kind,
        "prior": prior.identity,
        "shape": list(prior.shape),
        # One engine serves every feature of a hook: only the shape of the readout is built in. A custom feature is built in.
        "hook": feature.trunk.hook if feature.trunk is not None else feature.identity,
        "readout": None if readout is None else [padded_rows(readout.num_rows), *readout.direction.shape[2:]],
        "dtype": str(dtype).removeprefix("torch."),
        "versions": _versions(),
        "machine": platform.machine(),
    }


def cached() -> list[tuple[Path, dict[str, Any] | None]]:
    """Every artefact's folder in the cache and its key, None where the folder does not say."""
    found: list[tuple[Path, dict[str, Any] | None]] = []
    for folder in sorted(each for each in cache_folder().iterdir() if each.is_dir() and not each.name.startswith(".")):
        try:
            found.append((folder, read_json(folder / DESCRIPTION).get("key")))
        except BundleError:
            found.append((folder, None))
    return found


def made_by_this_version(key: dict[str, Any] | None) -> bool:
    """Whether a run of this installation could ask for it."""
    return key is not None and key.get("versions") == _versions() and key.get("machine") == platform.machine()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("tiltscope", "torch", "diffusers", "transformers")}


def obtain(key: dict[str, Any], build: Callable[[Path], None], self_test: Callable[[], SelfTest]) -> Artefact:
    """The artefact of `key` from the cache; where it is missing, `build` fills a folder and `self_test` is stored with it.

    Raises RunnerError for a cache that is not safe, BundleError for a damaged artefact, and whatever `build` raises.
    """
    folder = cache_folder() / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if not folder.is_dir():
        _build(folder, key, build, self_test)
    description = read_json(folder / DESCRIPTION)
    if description.get("schema_version") != SCHEMA_VERSION or description.get("key") != key:
        raise RunnerError(f"{folder} was built for something else; remove it and run again")
    files = VerifiedFolder(folder, description["files"])
    for name in files.names:
        files.file(name)
    return Artefact(folder, key)


def _build(folder: Path, key: dict[str, Any], build: Callable[[Path], None], self_test: Callable[[], SelfTest]) -> None:
    place = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        build(place)
        self_test().save(place / SELF_TEST)
        files = {
            path.relative_to(place).as_posix(): {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in sorted(place.rglob("*"))
            if path.is_file()
        }
        description = {"schema_version": SCHEMA_VERSION, "key": key, "files": files}
        (place / DESCRIPTION).write_text(json.dumps(description, indent=2))
        try:
            place.rename(folder)
        except OSError:
            # Another process was first: its artefact serves as well. Anything else is a failure.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
