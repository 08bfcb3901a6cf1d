"""An artefact: the folder in which an exporter leaves a step for the runtime to load, self-test and run without it.

    CACHE/<key>/artefact.json           the key, and size and sha256 of every other file
    CACHE/<key>/selftest.safetensors    inputs of the step and the float64 reference's outputs (gate.py)
    CACHE/<key>/...                     the model, whatever the runner needs

What an engine makes of a model file before it can run it is an entry of its own, without a self-test (opened.py).

The key holds what decides whether an artefact may serve: kind, the weights themselves, hook, readout shape, dtype, versions,
machine, and what else the exporter says its files depend on. How folders come, stay and go is cache.py's affair.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiltscope.engine.errors import BundleError, RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.files import VerifiedFolder, read_json
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.cache import (
    Entry,
    entries,
    evict,
    limit_bytes,
    obtain_entry,
    remove_entry,
    remove_leftovers,
)
from tiltscope.engine.runtime.exported import padded_rows
from tiltscope.engine.runtime.function_parts import answers_of_feature, answers_of_prior
from tiltscope.engine.runtime.gate import SelfTest

DESCRIPTION, SELF_TEST = "artefact.json", "selftest.safetensors"
SCHEMA_VERSION = 2
# What graphs take, give and are made of, and what the self-test holds of it; another number for every change, so that files
# of an older form are not opened.
GRAPH_FORM = 6


@dataclass(frozen=True)
class Artefact:
    """A built step on disk, every file checked against its hash. It stays there until this process ends."""

    folder: Path
    key: dict[str, Any]

    @property
    def self_test(self) -> SelfTest:
        return SelfTest.load(self.folder / SELF_TEST)


def artefact_key(
    kind: str, prior: Prior, feature: Feature, dtype: torch.dtype, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What an artefact was built for; another value of any of these needs another artefact. facts: the exporter's own."""
    readout = feature.readout
    return {
        "kind": kind,
        "form": GRAPH_FORM,
        "prior": prior.identity,
        "shape": list(prior.shape),
        # One engine serves every feature of a hook: only the shape of the readout is built in. A custom feature is built in.
        "hook": feature.trunk.hook if feature.trunk is not None else feature.identity,
        "readout": None if readout is None else [padded_rows(readout.num_rows), *readout.direction.shape[2:]],
        # An identity says where weights came from, these what they are now: a network changed in place needs another file.
        "weights": [
            answers_of_prior(prior) if prior.network is None else weights_hash(prior.network.network),
            answers_of_feature(feature, prior.shape) if feature.trunk is None else weights_hash(feature.trunk),
        ],
        "dtype": str(dtype).removeprefix("torch."),
        **here(),
        **(facts or {}),
    }


def weights_hash(module: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cached() -> list[tuple[Entry, dict[str, Any] | None]]:
    """Every artefact in the cache, the least recently used first, with its key; None where the folder does not say."""
    found: list[tuple[Entry, dict[str, Any] | None]] = []
    for entry in entries():
        try:
            found.append((entry, read_json(entry.folder / DESCRIPTION).get("key")))
        except BundleError:
            found.append((entry, None))
    return found


def prune() -> tuple[int, list[Path]]:
    """Remove what no run of this installation can use, and then the least recently used beyond the cache's bound.

    That is: artefacts of other versions or machines, damaged ones, and what killed processes left. Returns how many folders
    went, and those that stay although they should go because a process uses them.
    """
    removed, kept = remove_leftovers(), list[Path]()
    for entry, key in cached():
        if made_by_this_version(key) and _is_whole(entry.folder):
            continue
        if remove_entry(entry.folder):
            removed += 1
        else:
            kept.append(entry.folder)
    return removed + len(evict(limit_bytes())), kept


def made_by_this_version(key: dict[str, Any] | None) -> bool:
    """Whether a run of this installation could ask for it."""
    return key is not None and key.get("versions") == _versions() and key.get("machine") == platform.machine()


def file_hashes(folder: Path) -> dict[str, str]:
    """{file: sha256} as the description of an artefact says; `obtain` has checked them."""
    return {name: entry["sha256"] for name, entry in read_json(folder / DESCRIPTION)["files"].items()}


def here() -> dict[str, Any]:
    """Of every key: which installation made it, on which kind of machine."""
    return {"versions": _versions(), "machine": platform.machine()}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("tiltscope", "torch", "diffusers", "transformers")}


def obtain(
    key: dict[str, Any], build: Callable[[Path], None], self_test: Callable[[], SelfTest] | None = None
) -> Artefact:
    """The artefact of `key` from the cache; where it is missing, `build` fills a folder; `self_test`, if any, is stored with it.

    key: what JSON can say. A tuple in it is the list that the description will give back.

    Raises RunnerError for a cache that is not safe or an artefact of something else, BundleError for a damaged one, and whatever
    `build` raises.
    """
    said = json.dumps(key, sort_keys=True)
    name, key = hashlib.sha256(said.encode()).hexdigest(), json.loads(said)

    def build_whole(place: Path) -> None:
        build(place)
        if self_test is not None:
            self_test().save(place / SELF_TEST)
        files = {
            path.relative_to(place).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
            for path in sorted(place.rglob("*"))
            if path.is_file()
        }
        description = {"schema_version": SCHEMA_VERSION, "key": key, "files": files}
        (place / DESCRIPTION).write_text(json.dumps(description, indent=2))

    folder = obtain_entry(name, build_whole)
    try:
        description = read_json(folder / DESCRIPTION)
        if description.get("schema_version") != SCHEMA_VERSION or description.get("key") != key:
            raise RunnerError(f"{folder} was built for something else; remove it and run again")
        _check_files(folder, description)
    except BundleError as error:
        raise BundleError(f"{error}; or, as this is an artefact: remove {folder} and run again") from error
    return Artefact(folder, key)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(folder: Path, description: Mapping[str, Any]) -> None:
    files = VerifiedFolder(folder, description.get("files", {}))
    for name in files.names:
        files.file(name)


def _is_whole(folder: Path) -> bool:
    try:
        _check_files(folder, read_json(folder / DESCRIPTION))
    except BundleError:
        return False
    return True
