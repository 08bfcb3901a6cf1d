"""A bundle from its parts: `make_bundle`, resumable, in bounded memory.

    copy the models  ->  read the pictures, shard by shard  ->  pool, statistics, names  ->  reference activations, bundle.json

What is not finished lies in OUT/.making and is taken up again by the same call; bundle.json is written last, so a folder that has
one is whole.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tiltscope.engine.bundle import DESCRIPTION, SCHEMA_VERSION, embedded_bundles
from tiltscope.engine.bundling.autoencoders import FILE as SAE_FILE
from tiltscope.engine.bundling.autoencoders import Autoencoder, import_sae
from tiltscope.engine.bundling.hub import local_folder
from tiltscope.engine.bundling.parts import Part, find_evaluator, find_prior, find_trunk, sae_section
from tiltscope.engine.bundling.pictures import FolderPictures, Pictures, first_few
from tiltscope.engine.bundling.pool import PoolFacts, write_features, write_pool
from tiltscope.engine.bundling.settings import BundleSettings
from tiltscope.engine.bundling.shards import Shards, read_shards
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.decoded import DecodedTrunk
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.reference import NUM_PICTURES, record
from tiltscope.engine.feature.sae import SparseAutoencoder
from tiltscope.engine.feature.trunk import load_trunk
from tiltscope.engine.files import VerifiedFolder, describe_file, describe_files, read_json
from tiltscope.engine.pool import PICTURES, Pool
from tiltscope.engine.prior.decoder import load_decoder
from tiltscope.engine.prior.load import load_denoiser
from tiltscope.engine.report.atomic import write_bytes
from tiltscope.engine.report.evaluator import Evaluator, load_evaluator

MAKING, PLAN = ".making", "plan.json"
REFERENCE = "reference/activations.safetensors"
LEFT_OUT_FILE = "pool/left_out.jsonl"


class Tracker(Protocol):
    """What is told of the progress: engine/cli/screen.py."""

    def begin(self, what: str) -> None: ...

    def set(self, done: int, total: int, *, samples: int | None = None, num: int | None = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Found:
    """Everything that a bundle will be made of, looked at and consistent; nothing is written yet."""

    settings: BundleSettings
    prior: Part
    decoder: Part | None
    trunk: Part
    evaluator: Part
    sae: Autoencoder
    hook: str
    pictures: Pictures
    picture_shape: tuple[int, ...]

    @property
    def models(self) -> list[Part]:
        return [self.prior, *([self.decoder] if self.decoder else []), self.trunk, self.evaluator]

    @property
    def trunk_size(self) -> tuple[int, int]:
        size = self.settings.trunk_size
        return size if size is not None else (self.picture_shape[1], self.picture_shape[2])

    def plan(self) -> dict[str, Any]:
        """What the finished bundle depends on; another plan is another bundle."""
        digest = hashlib.sha256()
        for path in (*(each for part in self.models for each in part.sources), *self.sae.sources):
            stat = path.stat()
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        free = {"prior", "trunk", "sae", "pool", "out", "decoder", "evaluator", "workers", "strict"}
        asked = {
            each.name: getattr(self.settings, each.name) for each in fields(BundleSettings) if each.name not in free
        }
        told = asked | {"hook": self.hook, "models": digest.hexdigest(), "pictures": self.pictures.identity()}
        return json.loads(json.dumps(told, default=str))


def find(settings: BundleSettings) -> Found:
    """Look at everything, write nothing. Raises ConfigError and BundleError as the parts do."""
    vae = None if settings.decoder is None else local_folder(settings.decoder, "decoder")
    folder = local_folder(settings.prior, "prior")
    prior, decoder = find_prior(folder, decoder=vae, pixel_unshuffle=settings.pixel_unshuffle)
    shape = tuple(prior.section["shape"])
    picture_shape = shape
    if decoder is not None:
        picture_shape = load_decoder(decoder.weights[1][0].parent, shape=shape).picture_shape
    sae = import_sae(local_folder(settings.sae, "sae"), kind=settings.sae_kind, token_length=settings.token_length)
    hook = settings.hook or sae.hook
    if hook is None:
        raise ConfigError(f"sae {settings.sae} does not say where it reads; give --hook, for example blocks.8")
    evaluator = settings.evaluator or embedded_bundles()["emoji64"] / "evaluator"
    return Found(
        settings=settings,
        prior=prior,
        decoder=decoder,
        trunk=find_trunk(local_folder(settings.trunk, "trunk")),
        evaluator=find_evaluator(evaluator),
        sae=sae,
        hook=hook,
        pictures=FolderPictures(
            settings.pool, size=(picture_shape[1], picture_shape[2]), background=settings.background
        ),
        picture_shape=picture_shape,
    )


def make_bundle(
    settings: BundleSettings, *, tracker: Tracker | None = None, say: Callable[[str], None] = print
) -> Path:
    """Make the bundle, or go on making it; returns its folder. A bundle that is whole already is left as it is.

    Raises ConfigError where something cannot be used as asked or OUT holds anything else, BundleError where a file is not what it
    says. Test: tests/bundling/test_make.py (killed half-way and continued: the same bytes).
    """
    out = settings.out
    found = find(settings)
    plan = found.plan()
    if not claim(out, plan):
        say(f"{out} is whole already")
        return out
    told = tracker or _Silent()
    told.begin("copying the models")
    for part in found.models:
        part.copy(out)
    if not (out / "sae" / SAE_FILE).is_file():
        found.sae.write(out / "sae")
    told.begin("loading the models")
    trunk = load_models(found, out)
    shards = Shards.plan(out / MAKING, num=found.pictures.num, num_latents=found.sae.num_latents)
    evaluator = load_evaluator(out / "evaluator")
    told.begin("reading pictures")
    read_shards(
        shards,
        found.pictures,
        _reader(trunk, found.sae.sae, evaluator),
        workers=settings.workers,
        strict=settings.strict,
        on_progress=told.set,
    )
    left_out = list(shards.left_out())
    if left_out:
        named = first_few([f"{name}: {reason}" for name, reason in left_out])
        say(f"{len(left_out)} of {found.pictures.num} pictures were left out, all listed in {LEFT_OUT_FILE} ({named})")
    told.begin("describing features")
    facts = write_pool(out / "pool", shards, hook=found.hook, num_latents=found.sae.num_latents, on_progress=told.set)
    _finish(found, out, plan, facts, left_out, trunk)
    return out


class _Silent:
    def begin(self, what: str) -> None:
        pass

    def set(self, done: int, total: int, *, samples: int | None = None, num: int | None = None) -> None:
        pass


def claim(out: Path, plan: Mapping[str, Any]) -> bool:
    """Make the folder ours, or find that it is; False where this very bundle is whole. Raises ConfigError for another's."""
    going_on = out / MAKING / PLAN
    if (out / DESCRIPTION).is_file():
        if read_json(out / DESCRIPTION).get("made_from") == plan:
            shutil.rmtree(out / MAKING, ignore_errors=True)
            return False
        raise ConfigError(f"out {out} holds another bundle; give a new folder, or take that one away")
    if going_on.is_file():
        before = read_json(going_on)
        other = sorted(name for name in plan if before.get(name) != plan[name])
        if other:
            raise ConfigError(
                f"out {out} holds an unfinished bundle made of something else ({', '.join(other)} differ); give a new folder, "
                "or take that one away"
            )
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out {out} is not empty; give a new folder")
    (out / MAKING).mkdir(parents=True, exist_ok=True)
    write_bytes(going_on, _json(plan))
    return True


def load_models(found: Found, out: Path) -> Trunk:
    """The trunk as it reads pictures of the pool. The prior is loaded too: what does not fit is said before hours of work."""
    shape = tuple(found.prior.section["shape"])
    load_denoiser(
        out / "prior",
        kind=found.prior.section["kind"],
        shape=shape,
        pixel_unshuffle=found.prior.section["pixel_unshuffle"],
    )
    trunk: Trunk = load_trunk(out / "trunk", found.hook, image_size=found.trunk_size)
    if found.trunk_size != found.picture_shape[1:]:
        trunk = DecodedTrunk(trunk, shape=found.picture_shape)
    found.sae.sae.check_trunk(trunk)
    return trunk.rescaled() if found.sae.sae.rescales else trunk


def _reader(
    trunk: Trunk, sae: SparseAutoencoder, evaluator: Evaluator
) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    def read(x0: Tensor) -> tuple[Tensor, Tensor | None]:
        return sae.latents(trunk(x0), trunk), evaluator.embed(x0)

    return read


def _finish(
    found: Found,
    out: Path,
    plan: dict[str, Any],
    facts: PoolFacts,
    left_out: list[tuple[str, str]],
    trunk: Trunk,
) -> None:
    write_features(out / "sae/features.parquet", facts.features)
    sae = {"hook": found.hook, "kind": found.sae.kind, "num_latents": found.sae.num_latents, **found.sae.facts}
    write_bytes(out / "sae/config.json", _json(sae))
    if left_out:
        lines = (json.dumps({"file_name": name, "reason": reason}, ensure_ascii=False) for name, reason in left_out)
        write_bytes(out / LEFT_OUT_FILE, ("\n".join(lines) + "\n").encode())
    name = found.settings.name or out.resolve().name
    section = {"path": "pool", "num": facts.num, "num_heldout": facts.num_heldout, "num_left_out": len(left_out)}
    if facts.latents_per_file is not None:
        section["latents_per_file"] = facts.latents_per_file
    trunk_section = dict(found.trunk.section)
    if found.settings.trunk_size is not None:
        trunk_section["image_size"] = list(found.settings.trunk_size)
    described: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "title": name,
        "description": f"Made by tiltscope bundle from {facts.num} pictures.",
        "licence": found.settings.licence,
        "attribution": [],
        "prior": found.prior.section,
        "trunk": trunk_section,
        "saes": [sae_section(found.sae, found.hook)],
        "evaluator": found.evaluator.section,
        "pool": section,
        "reference_activations": {found.hook: REFERENCE},
        "versions": _versions(),
        "made_from": plan,
    }
    (out / "reference").mkdir(exist_ok=True)
    write_bytes(out / REFERENCE, _reference(out, found, facts, trunk))
    write_bytes(out / "README.md", _card(found, facts, name).encode())
    described["files"] = describe_files(out)
    write_bytes(out / DESCRIPTION, _json(described))
    shutil.rmtree(out / MAKING)


def _reference(out: Path, found: Found, facts: PoolFacts, trunk: Trunk) -> bytes:
    files = VerifiedFolder(out, {f"pool/{PICTURES}": describe_file(out / "pool" / PICTURES)})
    pixels = Pool(files, "pool", num=facts.num, shape=found.picture_shape, hooks=()).images(range(NUM_PICTURES))
    with torch.no_grad():
        activations = found.sae.sae.latents(trunk(pixels.float() / 127.5 - 1), trunk)
    return record(pixels, trunk, found.sae.sae, activations)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("tiltscope", "torch", "diffusers", "transformers")}


def _card(found: Found, facts: PoolFacts, name: str) -> str:
    return (
        f"# {name}\n\nA bundle for tiltscope, made by `tiltscope bundle`. Licence: {found.settings.licence}.\n\n"
        "| part | what it is |\n|---|---|\n"
        f"| `prior/` | {found.prior.section['kind']}, samples of shape {found.prior.section['shape']} |\n"
        f"| `trunk/` | {found.trunk.section['kind']}, read at `{found.hook}`, pictures of {list(found.trunk_size)} px |\n"
        f"| `sae/` | {found.sae.num_latents} latents ({found.sae.kind}); {facts.num_alive} fire on the pool, {facts.num_named} "
        "have a name |\n"
        "| `evaluator/` | judges pictures, never guides |\n"
        f"| `pool/` | {facts.num} pictures, {facts.num_heldout} held out |\n"
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
