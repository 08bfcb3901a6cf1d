"""Samples on disk: pictures as an image folder, tensors, a manifest; a stopped run goes on where it was.

    OUT/manifest.json                        whose folder this is; written first, and once more at the end
    OUT/samples/000_seed0.png                pictures, with metadata.jsonl beside them: `datasets` opens the folder
    OUT/samples.safetensors                  x0, activation, ... one row a sample, by ascending index
    OUT/.parts/                              one small file for each chunk, until it is merged
    OUT/samples-00000.safetensors OUT/samples/00000/       instead, for each 4,096 indices, once there are more samples than that

A sample is finished when its picture and its row are both on the disk: a chunk's pictures are written first, then its part in
one rename. Memory is flat in the number of samples. Knows Samples and Explanation as records; draws nothing.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.report import manifest as manifests
from tiltscope.engine.report.atomic import clear_temporaries, write_bytes
from tiltscope.engine.report.layout import about, is_pictured, picture_name, tensors_of, write_grid, write_metadata
from tiltscope.engine.report.page import methods_of, render, with_methods
from tiltscope.engine.report.pictures import GRID_LIMIT, encode_png, to_array
from tiltscope.engine.report.shards import SHARD, IndexSet, merge, open_tensors, select, write_tensors
from tiltscope.engine.samples import Explanation, Samples

# Above this the manifest shows the first GRID_LIMIT samples and names the files that list all of them.
LISTED_IN_MANIFEST = SHARD
_PIECE = 64
_OURS = ("samples", "samples.png", "samples.safetensors", "index.html", "answers", ".parts")
_LISTED: tuple[str, ...] = ("index", "seed", "activation", "drive", "lam", "ok", "nfe", "n_vjp")


def check_folder(folder: str | Path, identity: str) -> None:
    """Whether a run of this identity may write into `folder`, which need not exist yet. Writes nothing that stays.

    Raises ConfigError where it is a file, is not writable, holds another run, or holds samples whose run is not known.
    """
    folder = Path(folder)
    other = "choose another output folder"
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise ConfigError(f"{folder} is a file, and the output must be a folder: {other}")
        nearest = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
        # Permission bits do not tell (a superuser, a read-only mount, a full disk): try it.
        os.rmdir(tempfile.mkdtemp(prefix=".tiltscope-", dir=nearest))
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror or error}): {other}, or make it writable"
        ) from error
    if not folder.is_dir():
        return
    held = manifests.read(folder)
    if held is None:
        found = [name for name in _OURS if os.path.lexists(folder / name)]
        if found:
            raise ConfigError(f"{folder} holds {found[0]} but no manifest.json that says which run it is of: {other}")
    elif held["identity"] != identity:
        what = " ".join(str(held[name]) for name in ("command", "feature") if name in held) or "another run"
        raise ConfigError(
            f"{folder} holds another run ({what}, identity {held['identity'][:8]}), this one has identity {identity[:8]}: "
            f"{other}, or repeat that run's settings to continue it"
        )


class SampleWriter:
    """The samples of one run, chunk by chunk, into one folder; opened again, it knows what is there.

    Raises ConfigError on construction as check_folder does, having written nothing. OSError (a full disk) passes through
    `add` and `close` with everything finished before kept. ok=False samples are kept as rows, have no picture and do not count
    as finished.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        self._folder = Path(folder)
        self._identity = identity
        self._done = IndexSet()
        check_folder(self._folder, identity)
        self._begun = self._folder.is_dir() and manifests.read(self._folder) is not None
        self._sharded = any(self._folder.glob("samples-*.safetensors"))
        if self._begun:
            self._recover()

    def finished(self) -> IndexSet:
        """Indices of the samples that need not be drawn again. A live view: it grows with `add`."""
        return self._done

    def add(self, chunk: Samples) -> None:
        """Write a chunk; once this returns, its ok samples are finished and survive a kill."""
        self._begin()
        for shard, rows in _pieces(chunk.index):
            indices = chunk.index[rows].tolist()
            new = sum(index not in self._done for index in indices)
            if not self._sharded and len(self._done) + new > SHARD:
                self._split()
            ok = chunk.ok[rows].tolist()
            pictures = self._pictures(shard)
            if chunk.images is not None:
                pictures.mkdir(parents=True, exist_ok=True)
                for row, index, good in zip(rows.tolist(), indices, ok, strict=True):
                    if good:
                        write_bytes(pictures / picture_name(index, chunk.seed), encode_png(to_array(chunk.images[row])))
            # Named by its indices: the same chunk drawn again replaces its part.
            name = f"{shard:07d}-{hashlib.sha256(json.dumps(indices).encode()).hexdigest()[:16]}.safetensors"
            self._parts.mkdir(exist_ok=True)
            write_tensors(self._parts / name, tensors_of(chunk, rows), about(chunk))
            for index, good in zip(indices, ok, strict=True):
                if good:
                    self._done.add(index)
            if self._sharded and self._done.num_in(shard) == SHARD:
                self._merge(shard)

    def close(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Merge the tensors, write metadata, grid and manifest; returns the manifest as written. More may be added later.

        `manifest` is completed (manifest.py) and given num_finished, and samples: each one's index, seed, activation, drive,
        lam, ok, nfe and n_vjp, for the first 64 only where there are more than 4,096.
        """
        self._begin()
        if self._sharded:
            for shard in sorted({_shard_of(part) for part in self._part_paths()}):
                self._merge(shard)
        elif self._part_paths():
            self._merge(None)
        if self._parts.is_dir():
            self._parts.rmdir()
        write_grid(self._folder, self._first_pictures())
        listed, more = [], False
        for row in self.rows():
            if len(listed) == LISTED_IN_MANIFEST:
                listed, more = listed[:GRID_LIMIT], True
                break
            listed.append(row)
        facts: dict[str, Any] = {"num_finished": len(self._done), "samples": listed}
        if more:
            facts["samples_are_in"] = "samples-*.safetensors"
        whole = manifests.complete(dict(manifest) | {"identity": self._identity} | facts)
        manifests.write(self._folder, whole)
        return whole

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is known of each merged sample beside its picture, by ascending index; call `close` first."""
        for path in self._tensor_paths():
            if (source := open_tensors(path)) is not None:
                columns = [source.column(name).tolist() for name in _LISTED]
                yield from (dict(zip(_LISTED, values, strict=True)) for values in zip(*columns, strict=True))

    def columns(self, *names: str) -> list[NDArray[Any]]:
        """Whole tensors of the merged samples, one row a sample; call `close` first."""
        found = [source for path in self._tensor_paths() if (source := open_tensors(path)) is not None]
        return [np.concatenate([source.column(name) for source in found]) for name in names]

    @property
    def _parts(self) -> Path:
        return self._folder / ".parts"

    def _part_paths(self) -> list[Path]:
        return sorted(self._parts.glob("*.safetensors")) if self._parts.is_dir() else []

    def _tensor_paths(self) -> list[Path]:
        flat = self._folder / "samples.safetensors"
        # By number: more than 99,999 shards have names of different lengths.
        shards = sorted(self._folder.glob("samples-*.safetensors"), key=_shard_number)
        return [flat] * flat.exists() + shards

    def _pictures(self, shard: int | None) -> Path:
        samples = self._folder / "samples"
        return samples / f"{shard:05d}" if self._sharded and shard is not None else samples

    def _begin(self) -> None:
        """Claim the folder before the first picture, so that a killed run's folder still says whose it is."""
        if self._begun:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        manifests.write(
            self._folder,
            {"schema_version": manifests.SCHEMA_VERSION, "identity": self._identity, "state": "running"},
        )
        self._begun = True

    def _recover(self) -> None:
        """What an earlier sitting left, whole or killed at any point."""
        for folder in (self._folder, self._parts, self._folder / "samples", *self._folder.glob("samples/*/")):
            clear_temporaries(folder)
        if self._sharded and ((self._folder / "samples.safetensors").exists() or any(self._flat_pictures())):
            self._split()
        there: dict[Path, frozenset[str]] = {}
        for path in (*self._tensor_paths(), *self._part_paths()):
            if (source := open_tensors(path)) is None:
                # Never half written by us; damaged since. Its samples are drawn again.
                path.unlink()
                continue
            columns = (source.column(name).tolist() for name in ("index", "seed", "ok"))
            for index, seed, ok in zip(*columns, strict=True):
                folder = self._pictures(index // SHARD)
                if folder not in there:
                    there[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
                if ok and (not is_pictured(source) or picture_name(index, seed) in there[folder]):
                    self._done.add(index)

    def _split(self) -> None:
        """From one file and one folder to shards. Killed anywhere and repeated, it ends the same."""
        flat = self._folder / "samples.safetensors"
        source = open_tensors(flat)
        parts = {_shard_of(part) for part in self._part_paths()}
        inside = set() if source is None else {index // SHARD for index in source.column("index").tolist()}
        self._sharded = True
        for shard in sorted(parts | inside):
            self._merge(shard)
        for picture in self._flat_pictures():
            folder = self._pictures(int(picture.name.partition("_")[0]) // SHARD)
            folder.mkdir(exist_ok=True)
            os.replace(picture, folder / picture.name)
        (self._folder / "samples" / "metadata.jsonl").unlink(missing_ok=True)
        flat.unlink(missing_ok=True)

    def _flat_pictures(self) -> list[Path]:
        return list((self._folder / "samples").glob("*_seed*.png"))

    def _merge(self, shard: int | None) -> None:
        """All rows of a shard (None: of the flat folder) into its file, with its metadata; then its parts go."""
        flat = self._folder / "samples.safetensors"
        path = flat if shard is None else self._folder / f"samples-{shard:05d}.safetensors"
        parts = [part for part in self._part_paths() if shard is None or _shard_of(part) == shard]
        found = [open_tensors(each) for each in dict.fromkeys((flat, path, *parts))]
        sources = [each for each in found if each is not None]
        chosen = select(sources)
        indices = sorted(index for index in chosen if shard is None or index // SHARD == shard)
        merge(path, [chosen[index] for index in indices], sources[-1].metadata)
        write_metadata(self._pictures(shard), open_tensors(path))
        for part in parts:
            part.unlink()

    def _first_pictures(self) -> list[Path]:
        first: list[Path] = []
        for path in self._tensor_paths():
            source = open_tensors(path)
            if source is None or not is_pictured(source):
                continue
            for index, seed, ok in zip(
                *(source.column(name).tolist() for name in ("index", "seed", "ok")), strict=True
            ):
                if ok:
                    first.append(self._pictures(index // SHARD) / picture_name(index, seed))
                if len(first) == GRID_LIMIT:
                    return first
        return first


def save_samples(samples: Samples, folder: str | Path) -> Path:
    """Samples.save: into a new folder, or into one of the same run, whose other samples stay.

    Samples that carry no run's identity (one answer of an explanation) get one from what they hold.
    """
    folder = Path(folder)
    facts = {"feature": samples.feature, "target": samples.target} | samples.manifest
    identity = facts.get("identity") or _content_identity(samples)
    writer = SampleWriter(folder, identity)
    writer.add(samples)
    writer.close(facts)
    return folder


def save_explanation(explanation: Explanation, folder: str | Path) -> Path:
    """Explanation.save: four answers, the tilt once more at the top, the page, and last the manifest.

    The folder then holds what the page shows: pictures of an earlier, longer run of the same identity go.
    """
    folder = Path(folder)
    identity = explanation.manifest.get("identity") or _content_identity(explanation.answers["tilt"])
    check_folder(folder, identity)
    samples = explanation.answers["tilt"]
    columns = [getattr(samples, name) for name in _LISTED if name != "seed"]
    names = [name for name in _LISTED if name != "seed"]
    listed = [
        dict(zip(names, (each.item() for each in values), strict=True)) | {"seed": samples.seed}
        for values in zip(*columns, strict=True)
    ][: LISTED_IN_MANIFEST if len(samples) <= LISTED_IN_MANIFEST else GRID_LIMIT]
    facts = dict(explanation.manifest) | {"identity": identity, "feature": explanation.feature, "samples": listed}
    whole = manifests.complete({"command": "explain", "metrics": explanation.metrics} | facts)
    folder.mkdir(parents=True, exist_ok=True)
    if manifests.read(folder) is None:
        manifests.write(folder, {name: whole[name] for name in ("schema_version", "identity")} | {"state": "running"})
    for name, answer in explanation.answers.items():
        _write_answer(folder / "answers" / name, answer)
    _write_answer(folder, samples)
    page, path = render(explanation, whole), folder / "index.html"
    if path.is_file():  # the same question: what compare has put there still answers it
        page = with_methods(page, methods_of(path.read_text(encoding="utf-8")))
    write_bytes(path, page.encode())
    manifests.write(folder, whole)
    return folder


def _write_answer(folder: Path, samples: Samples) -> None:
    """Exactly these samples, in the order given: an answer's order has a meaning (top-K: strongest first)."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_temporaries(folder)
    sharded = len(samples) > SHARD
    kept: set[Path] = set()
    first: list[Path] = []
    for number, start in enumerate(range(0, len(samples), SHARD)):
        rows = torch.arange(start, min(start + SHARD, len(samples)))
        pictures = folder / "samples" / f"{number:05d}" if sharded else folder / "samples"
        if samples.images is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            clear_temporaries(pictures)
            for row in rows[samples.ok[rows]].tolist():
                path = pictures / picture_name(int(samples.index[row]), samples.seed)
                write_bytes(path, encode_png(to_array(samples.images[row])))
                kept.add(path)
                first += [path] if len(first) < GRID_LIMIT else []
        path = folder / (f"samples-{number:05d}.safetensors" if sharded else "samples.safetensors")
        write_tensors(path, tensors_of(samples, rows), about(samples))
        write_metadata(pictures, open_tensors(path))
        kept |= {path, pictures / "metadata.jsonl"}
    for path in (*folder.glob("samples*.safetensors"), *folder.glob("samples/**/*_seed*.png")):
        if path not in kept:
            path.unlink()
    for path in folder.glob("samples/**/metadata.jsonl"):
        if path not in kept:
            path.unlink()
    write_grid(folder, first)


def _pieces(index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(shard, rows) covering all rows: no piece crosses a shard, none is so large that its bytes would weigh."""
    shards: dict[int, list[int]] = {}
    for row, each in enumerate(index.tolist()):
        shards.setdefault(each // SHARD, []).append(row)
    for shard, rows in shards.items():
        for start in range(0, len(rows), _PIECE):
            yield shard, torch.tensor(rows[start : start + _PIECE])


def _shard_of(part: Path) -> int:
    return int(part.name.partition("-")[0])


def _shard_number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _content_identity(samples: Samples) -> str:
    digest = hashlib.sha256(
        json.dumps([samples.feature, samples.target, samples.seed, samples.index.tolist()]).encode()
    )
    digest.update(samples.x0.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
