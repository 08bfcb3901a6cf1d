"""A bundle: one folder with a prior, a trunk, an autoencoder, natural pictures and what is known about them.

bundle.json describes it; only files whose hash it holds are read, checked the first time. No pickle, no code of the folder.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.resources import files
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.address import FeatureAddress, parse
from tiltscope.engine.feature.decoded import DecodedTrunk
from tiltscope.engine.feature.direction import load_direction
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.poolings import pooling_tensors
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.feature.reference import check
from tiltscope.engine.feature.sae import SparseAutoencoder, load_sae
from tiltscope.engine.feature.trunk import ARCHITECTURES, load_trunk
from tiltscope.engine.feature.trunk import FILES as TRUNK_FILES
from tiltscope.engine.files import VerifiedFolder, read_json
from tiltscope.engine.pool import Pool
from tiltscope.engine.prior.decoder import FILES as DECODER_FILES
from tiltscope.engine.prior.decoder import Decoder, load_decoder
from tiltscope.engine.prior.load import files_of, load_denoiser
from tiltscope.engine.prior.prior import Prior

if TYPE_CHECKING:
    from tiltscope.engine.report.evaluator import Evaluator

SCHEMA_VERSION = 1
DESCRIPTION = "bundle.json"
EVALUATOR_FILES = ("model.safetensors",)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class FeatureInfo:
    """What a bundle knows about one of its features, measured on the pool."""

    feature: str
    """its address"""
    name: str | None
    """what it is called; None: unnamed"""
    name_source: str | None
    """where the name comes from"""
    density: float
    """share of the pool's pictures on which it fires"""
    max: float
    """largest activation on the pool"""
    selectivity: float
    """mean z-score on the pictures that fire it most"""
    words: tuple[str, ...]
    """words its strongest pictures share"""
    alive: bool
    """whether any picture of the pool fires it"""


class Bundle:
    """What `tiltscope.load` returns. Everything heavy is read on first use and then kept.

    name, path, meta (bundle.json), identity ("sha256:" of bundle.json, which holds the hashes of all files)
    """

    def __init__(self, path: Path) -> None:
        """Raises BundleError where bundle.json is missing, unreadable, of another schema or incomplete."""
        self.path = path
        self.meta = read_json(path / DESCRIPTION)
        version = self.meta.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise BundleError(
                f"{path / DESCRIPTION}: schema_version {version!r} is not known; allowed: {SCHEMA_VERSION}"
            )
        self.identity = "sha256:" + hashlib.sha256((path / DESCRIPTION).read_bytes()).hexdigest()
        self.name: str = self._get(self.meta, "name", str)
        self.files = VerifiedFolder(path, self._get(self.meta, "files", dict))
        self._trunks: dict[str, Trunk] = {}
        self._rescaled: dict[str, Trunk] = {}
        self._features: dict[str, Feature] = {}

    def __repr__(self) -> str:
        return f"Bundle({self.name!r}, path={str(self.path)!r})"

    def with_prior(self, prior: Prior) -> "Bundle":
        """This bundle with another prior of pictures of the same size: its features, pool and evaluator stay.

        So a denoiser of one's own is explained and compared with what the bundle knows of natural pictures. Raises ConfigError
        for a prior of another shape.
        """
        if prior.shape != self.picture_shape or prior.decoder is not None:
            raise ConfigError(
                f"prior {prior.name}: its samples are {list(prior.shape)}, the bundle's pictures {list(self.picture_shape)}; "
                "give a prior of such pictures"
            )
        other = Bundle(self.path)
        other.identity = "sha256:" + hashlib.sha256(f"{self.identity} {prior.identity}".encode()).hexdigest()
        # Where cached properties keep what they were.
        other.__dict__ |= {"prior": prior, "decoder": None, "shape": self.picture_shape, "pool": self.pool}
        return other

    def _get(self, section: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
        value = section.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BundleError(f"{self.path / DESCRIPTION}: {key} must be a {kind.__name__}, got {value!r}")
        return value

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it; `location` is what load() opens it by: its name where it is embedded, else its folder."""
        embedded = embedded_bundles().get(self.name) == self.path
        return {
            "name": self.name,
            "identity": self.identity,
            "location": self.name if embedded else str(self.path.resolve()),
            "licence": self.meta.get("licence"),
            "attribution": self.meta.get("attribution"),
        }

    def verify(self) -> int:
        """Check every file against its hash; the number of files. Raises BundleError naming the first that is wrong."""
        for name in self.files.names:
            self.files.file(name)
        return len(self.files.names)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """[channel, height, width] of a sample."""
        shape = self._get(self._get(self.meta, "prior", dict), "shape", list)
        if len(shape) != 3 or not all(isinstance(s, int) and s > 0 for s in shape):
            raise BundleError(
                f"{self.path / DESCRIPTION}: prior.shape must be three positive whole numbers, got {shape}"
            )
        return tuple(shape)

    @cached_property
    def prior(self) -> Prior:
        """The bundle's prior, float32. Raises BundleError."""
        section = self._get(self.meta, "prior", dict)
        path = self._get(section, "path", str)
        kind = self._get(section, "kind", str)
        names = files_of(kind)
        denoiser = load_denoiser(
            self.files.subfolder(path, names),
            kind=kind,
            shape=self.shape,
            pixel_unshuffle=self._get(section, "pixel_unshuffle", int),
            stated=section,
        )
        # With the weights, what else is no configuration: the prompt's tokens.
        digests = [self.files.digest(path, name) for name in names if name.endswith(".safetensors")]
        if self.decoder is not None:
            # Two bundles with one denoiser and different decoders draw different pictures.
            digests.append(self.files.digest(self._get(section["decoder"], "path", str), DECODER_FILES[1]))
        joined = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
        identity = f"sha256:{joined}"
        return Prior.from_network(
            denoiser,
            shape=self.shape,
            name=self.name,
            identity=identity,
            pool=self.pool,
            decoder=self.decoder,
            guidance_interval=self._guidance_interval(section),
        )

    def _guidance_interval(self, section: Mapping[str, Any]) -> tuple[float, float] | None:
        """The noise levels that the prior asks to be guided at; None: all."""
        found = section.get("guidance_interval")
        if found is None:
            return None
        if not (
            isinstance(found, list)
            and len(found) == 2
            and all(type(each) in (int, float) for each in found)
            and 0 <= found[0] <= found[1] <= 1
        ):
            raise BundleError(
                f"{self.path / DESCRIPTION}: prior.guidance_interval must be [sigma_lo, sigma_hi] with "
                f"0 <= sigma_lo <= sigma_hi <= 1, got {found!r}"
            )
        return float(found[0]), float(found[1])

    @cached_property
    def decoder(self) -> Decoder | None:
        """What makes pictures of the prior's latents; None where its samples are pictures."""
        section = self._get(self.meta, "prior", dict)
        if "decoder" not in section:
            return None
        path = self._get(self._get(section, "decoder", dict), "path", str)
        return load_decoder(self.files.subfolder(path, DECODER_FILES), shape=self.shape)

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """[3, height, width] of a picture of the prior and of the pool."""
        return self.shape if self.decoder is None else self.decoder.picture_shape

    @cached_property
    def pool(self) -> Pool:
        """The natural pictures."""
        section = self._get(self.meta, "pool", dict)
        return Pool(
            self.files,
            self._get(section, "path", str),
            num=self._get(section, "num", int),
            shape=self.picture_shape,
            hooks=self.sae_hooks,
            latents_per_file=self._per_file(section),
        )

    def _per_file(self, section: Mapping[str, Any]) -> int | None:
        found = section.get("latents_per_file")
        if found is not None and not (type(found) is int and found > 0):
            raise BundleError(
                f"{self.path / DESCRIPTION}: pool.latents_per_file must be a positive whole number, got {found!r}"
            )
        return found

    @property
    def sae_hooks(self) -> tuple[str, ...]:
        """The hooks that have a sparse autoencoder."""
        return tuple(self._get(section, "hook", str) for section in self._get(self.meta, "saes", list))

    def trunk(self, hook: str) -> Trunk:
        """The trunk up to `hook`, float32; the same object each time. Raises ConfigError for a hook it does not have."""
        if hook not in self._trunks:
            section = self._get(self.meta, "trunk", dict)
            kind = self._get(section, "kind", str)
            if kind not in ARCHITECTURES:
                raise BundleError(
                    f"{self.path / DESCRIPTION}: trunk kind {kind!r} is not known; allowed: {', '.join(ARCHITECTURES)}"
                )
            folder = self.files.subfolder(self._get(section, "path", str), TRUNK_FILES)
            if (found := read_json(folder / TRUNK_FILES[0]).get("model_type")) != kind:
                raise BundleError(
                    f"{self.path / DESCRIPTION}: trunk kind is {kind!r}, but model_type of {folder / TRUNK_FILES[0]} is {found!r}"
                )
            size = self._image_size(section)
            trunk = load_trunk(folder, hook, image_size=size)
            if self.decoder is not None or self.shape[1:] != size:
                trunk = DecodedTrunk(trunk, shape=self.shape, decoder=self.decoder)
            self._trunks[hook] = trunk
        return self._trunks[hook]

    def _image_size(self, section: Mapping[str, Any]) -> tuple[int, int]:
        """[height, width] that the trunk reads: its own image_size in bundle.json, else the pictures'."""
        size = section.get("image_size", list(self.picture_shape[1:]))
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
            raise BundleError(
                f"{self.path / DESCRIPTION}: trunk.image_size must be two positive whole numbers, got {size!r}"
            )
        return size[0], size[1]

    def _sae_trunk(self, hook: str) -> Trunk:
        """What the autoencoder at `hook` reads: the trunk, or the one with rescaled tokens."""
        if not self.sae(hook).rescales:
            return self.trunk(hook)
        if hook not in self._rescaled:
            self._rescaled[hook] = self.trunk(hook).rescaled()
        return self._rescaled[hook]

    @cached_property
    def _saes(self) -> dict[str, SparseAutoencoder]:
        return {}

    def sae(self, hook: str) -> SparseAutoencoder:
        """The sparse autoencoder at `hook`. Raises ConfigError where there is none."""
        if hook not in self.sae_hooks:
            raise ConfigError(
                f"bundle {self.name} has no sparse autoencoder at {hook!r}; allowed: {', '.join(self.sae_hooks)}"
            )
        if hook not in self._saes:
            section = self.meta["saes"][self.sae_hooks.index(hook)]
            sae = load_sae(
                self.files.file(self._get(section, "path", str), "sae.safetensors"),
                kind=self._get(section, "kind", str),
                token_length=section.get("token_length", "as_is"),
            )
            sae.check_trunk(self.trunk(hook))
            self._check_reference(hook, sae)
            self._saes[hook] = sae
        return self._saes[hook]

    def _check_reference(self, hook: str, sae: SparseAutoencoder) -> None:
        """Raises BundleError where trunk and autoencoder do not answer as they did when the bundle was made."""
        stored = self.meta.get("reference_activations", {})
        if hook in stored:
            trunk = self.trunk(hook).on_pictures()
            check(self.files.file(self._get(stored, hook, str)), trunk.rescaled() if sae.rescales else trunk, sae)

    def feature(self, text: str) -> Feature:
        """The feature HOOK:KIND:INDEX[@POOLING]; the same object each time (a direction's file is read anew).

        Raises ConfigError where the text is not of that form, or a hook, latent, channel, position or file is not there.
        """
        address = parse(text)
        key = str(address)
        if address.kind == "direction":
            return self._build(address)
        if key not in self._features:
            self._features[key] = self._build(address)
        return self._features[key]

    def _build(self, address: FeatureAddress) -> Feature:
        trunk = self.trunk(address.hook)
        identity = str(address)
        if isinstance(address.index, str):
            direction, digest = load_direction(address.index, width=trunk.width)
            identity = f"{address.hook}:direction:sha256:{digest}@{address.pooling}"
            readout = _linear_readout(direction, trunk, address.pooling)
        elif address.kind == "sae":
            sae = self.sae(address.hook)
            sae.check_index(address.index, address.hook)
            trunk = self._sae_trunk(address.hook)
            readout = sae.readout(slice(address.index, address.index + 1), trunk, pooling=address.pooling)
        else:
            if address.index >= trunk.width:
                raise ConfigError(f"channel {address.index} is not in the trunk; allowed: 0 to {trunk.width - 1}")
            unit = torch.zeros(trunk.width)
            unit[address.index] = 1.0
            readout = _linear_readout(unit, trunk, address.pooling)
        if trunk.hook in self.sae_hooks and self.sae(trunk.hook).window:
            # One form of readout a hook: then its features add, and one graph serves them all.
            readout = readout.as_window(self.sae(trunk.hook).window, trunk.grid)
        return Feature.from_readout(
            trunk, readout, name=str(address), identity=identity, terms=[(1.0, address)], pool=self.pool
        )

    @cached_property
    def _infos(self) -> tuple[FeatureInfo, ...]:
        infos: list[FeatureInfo] = []
        for section in self._get(self.meta, "saes", list):
            path = self.files.file(self._get(section, "path", str), "features.parquet")
            for row in pq.read_table(path).to_pylist():
                missing = [each.name for each in fields(FeatureInfo) if each.name not in row]
                if missing:
                    raise BundleError(f"{path} lacks the column {missing[0]!r}")
                known: dict[str, Any] = {each.name: row[each.name] for each in fields(FeatureInfo)}
                known["words"] = tuple(known["words"])
                infos.append(FeatureInfo(**known))
        return tuple(infos)

    def features(self) -> list[FeatureInfo]:
        """Every latent that the bundle has measured, in index order."""
        return list(self._infos)

    def info(self, feature: Feature) -> FeatureInfo | None:
        """What is known of a single latent of this bundle, whatever its pooling; None for any other feature."""
        if feature.address is None or feature.pool is not self.pool:
            return None
        return self._by_address.get(f"{feature.address.hook}:{feature.address.kind}:{feature.address.index}")

    def label(self, feature: Feature) -> str | None:
        """The name of a single latent of this bundle; None where it has none."""
        info = self.info(feature)
        return info.name if info else None

    @cached_property
    def _by_address(self) -> dict[str, FeatureInfo]:
        return {info.feature: info for info in self._infos}

    def evaluator(self) -> "Evaluator":
        """The network that judges and never guides. Raises BundleError where the bundle has none."""
        return self._evaluator

    @cached_property
    def _evaluator(self) -> "Evaluator":
        from tiltscope.engine.report.evaluator import load_evaluator

        section = self._get(self.meta, "evaluator", dict)
        return load_evaluator(self.files.subfolder(self._get(section, "path", str), EVALUATOR_FILES))

    def latents(self, x0: Float[Tensor, "batch 3 height width"], hook: str) -> Float[Tensor, "batch latents"]:
        """Pooled (centre) activations of ALL latents of the hook's autoencoder, float32, by the code that sampling runs.

        x0: pictures, also where the prior's samples are latents of such.
        """
        trunk = self._sae_trunk(hook).on_pictures()
        with torch.no_grad():
            return self.sae(hook).latents(trunk(x0), trunk)


def _linear_readout(direction: Float[Tensor, "width"], trunk: Trunk, pooling: str | None) -> Readout:
    """One row without bias or threshold: drive and activation are the same."""
    mixture, mask = pooling_tensors(pooling, grid=trunk.grid, num_prefix_tokens=trunk.num_prefix_tokens)
    return Readout(
        direction=direction.view(1, 1, -1),
        bias=torch.zeros(1, 1),
        threshold=torch.full((1, 1), float("-inf")),
        weight=torch.ones(1, 1),
        pooling=mixture.view(1, 1, 3),
        mask=mask.view(1, 1, -1),
    )


def embedded_bundles() -> dict[str, Path]:
    """Name -> folder of the bundles that ship in the package."""
    folder = Path(str(files("tiltscope"))) / "bundles"
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: path for path in found if (path / DESCRIPTION).is_file()}


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long for the file system, say
        return False


def load(name_or_folder: str | PathLike[str]) -> Bundle:
    """Open a bundle: an embedded one by its name, or a folder. Nothing but bundle.json is read yet.

    Raises ConfigError where there is no such bundle, BundleError where the folder is not one.
    """
    try:
        text, folder, embedded = fspath(name_or_folder), Path(name_or_folder), embedded_bundles()
    except TypeError as error:
        raise ConfigError(f"a bundle is a name or a folder, got {type(name_or_folder).__name__}") from error
    if isinstance(name_or_folder, str) and text in embedded:
        return Bundle(embedded[text])
    if text and _is_folder(folder):
        return Bundle(folder)
    hint = (
        " (bundles cannot be fetched from a hub yet: download it and give its folder)"
        if _HUB_ID.fullmatch(text)
        else ""
    )
    allowed = ", ".join(embedded) or "none is embedded here"
    raise ConfigError(f"bundle {text!r} is not known{hint}; allowed: {allowed}, or a folder that holds {DESCRIPTION}")
