"""The natural pictures of a bundle: what top-K draws from, lambda is calibrated on and samples are measured against.

Row order of pool/pool.parquet is the pool index everywhere. Everything is read on first use.
"""

import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.feature import Feature, check_activation
from tiltscope.engine.files import VerifiedFolder, read_json, read_tensors

PICTURES, ACTIVATIONS, STATISTICS, EMBEDDINGS, CALIBRATIONS = (
    "pool.parquet",
    "activations.parquet",
    "statistics.safetensors",
    "embeddings.safetensors",
    "calibrations.json",
)
BATCH = 64


class Pool:
    """num natural pictures, their words, split, stored activations and evaluator embeddings.

    names, categories, code_points ("1f436"): one text a picture; keywords: texts a picture; heldout: bool [num], in no training
    """

    def __init__(
        self, files: VerifiedFolder, path: str, *, num: int, shape: tuple[int, ...], hooks: Iterable[str]
    ) -> None:
        """path: the pool's folder in the bundle; num: rows that bundle.json promises; hooks: those with stored statistics."""
        self._files = files
        self._path = path
        self.num = num
        self._shape = shape
        self._hooks = tuple(hooks)
        # By feature object: two custom features may share a name.
        self._computed: WeakKeyDictionary[Feature, NDArray[np.float64]] = WeakKeyDictionary()

    @cached_property
    def _columns(self) -> dict[str, list[Any]]:
        path = self._files.file(self._path, PICTURES)
        columns = pq.read_table(path).to_pydict()
        missing = {"image", "name", "code_points", "category", "keywords", "split"} - set(columns)
        if missing or len(columns["name"]) != self.num:
            problem = (
                f"lacks the column {min(missing)!r}" if missing else f"has {len(columns['name'])} rows, not {self.num}"
            )
            raise BundleError(f"{path} {problem}")
        return columns

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._columns["name"])

    @property
    def code_points(self) -> tuple[str, ...]:
        return tuple(self._columns["code_points"])

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(self._columns["category"])

    @property
    def keywords(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(words) for words in self._columns["keywords"])

    @cached_property
    def heldout(self) -> Bool[np.ndarray, "num"]:
        return np.array([split == "heldout" for split in self._columns["split"]])

    def words(self, index: int) -> tuple[str, ...]:
        """What a picture is called: its name, then its keywords."""
        return (self._columns["name"][index], *self._columns["keywords"][index])

    def images(self, indices: Iterable[int]) -> UInt8[Tensor, "n 3 height width"]:
        """The pictures at these pool indices, in this order."""
        rows = [int(i) for i in indices]
        wrong = [i for i in rows if not 0 <= i < self.num]
        if wrong:
            raise ConfigError(f"pool index {wrong[0]} is not in the pool; allowed: 0 to {self.num - 1}")
        if not rows:
            return torch.zeros(0, *self._shape, dtype=torch.uint8)
        return torch.stack([self._decode(i) for i in rows])

    def _decode(self, index: int) -> Tensor:
        with Image.open(io.BytesIO(self._columns["image"][index]["bytes"])) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        if tuple(picture.shape) != self._shape:
            raise BundleError(
                f"{PICTURES}: picture {index} is {list(picture.shape)}, the prior's are {list(self._shape)}"
            )
        return picture

    def x0(self, indices: Iterable[int]) -> Float[Tensor, "n 3 height width"]:
        """images(indices)/127.5 - 1, float32 in [-1, 1]."""
        return self.images(indices).to(torch.float32) / 127.5 - 1

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(pq.read_schema(self._files.file(self._path, ACTIVATIONS)).names)

    def activations(self, feature: Feature) -> Float[np.ndarray, "num"]:
        """a(x0) of every picture, float64: from stored columns (weighted sums of them too), else computed once.

        The caller's own copy: writing into it changes nothing here.
        """
        if feature not in self._computed:
            self._computed[feature] = self._from_columns(feature) if self._is_stored(feature) else self._run(feature)
        return self._computed[feature].copy()

    def _is_stored(self, feature: Feature) -> bool:
        # An address means this bundle's hook and weights only for this bundle's features.
        return feature.pool is self and bool(feature.terms) and all(str(a) in self._stored for _, a in feature.terms)

    def _from_columns(self, feature: Feature) -> NDArray[np.float64]:
        names = [str(address) for _, address in feature.terms]
        table = pq.read_table(self._files.file(self._path, ACTIVATIONS), columns=sorted(set(names)))
        if table.num_rows != self.num:
            raise BundleError(f"{ACTIVATIONS} has {table.num_rows} rows, not {self.num}")
        columns = {name: table.column(name).to_numpy().astype(np.float64) for name in set(names)}
        return np.sum([weight * columns[name] for (weight, _), name in zip(feature.terms, names, strict=True)], axis=0)

    def _run(self, feature: Feature) -> NDArray[np.float64]:
        dtype = torch.float32 if feature.trunk is None else feature.trunk.dtype
        check_activation(feature, self._shape, dtype)
        batches = [range(start, min(start + BATCH, self.num)) for start in range(0, self.num, BATCH)]
        with torch.no_grad():
            parts = [feature.activation(self.x0(batch).to(dtype)).double() for batch in batches]
        return torch.cat(parts).numpy()

    @cached_property
    def calibrations(self) -> dict[str, Any]:
        """What the bundle brings of calibrations on the sampler, by key (engine/calibration.py)."""
        if str(PurePosixPath(self._path, CALIBRATIONS)) not in self._files.names:
            return {}
        return read_json(self._files.file(self._path, CALIBRATIONS))

    def embeddings(self) -> Float[np.ndarray, "num size"]:
        """The evaluator's embedding of every picture, L2-normalised, float32 (stored in float16)."""
        path = self._files.file(self._path, EMBEDDINGS)
        found = read_tensors(path, ["embeddings"]).get("embeddings")
        if found is None or found.ndim != 2 or found.shape[0] != self.num:
            raise BundleError(f"{path} must hold embeddings [{self.num}, size]")
        return torch.nn.functional.normalize(found, dim=-1).numpy()

    def statistics(self, hook: str) -> tuple[Float[np.ndarray, "latents"], Float[np.ndarray, "latents"]]:
        """(mean, sd) over the pool of every latent's activation at this hook (pooling centre), float64; own copies."""
        if hook not in self._hooks:
            raise ConfigError(
                f"the pool has no statistics at hook {hook!r}; allowed: {', '.join(self._hooks) or 'none'}"
            )
        path = self._files.file(self._path, STATISTICS)
        found = read_tensors(path, ["mean", "sd"], dtype=torch.float64)
        if set(found) != {"mean", "sd"}:
            raise BundleError(f"{path} must hold mean and sd")
        return found["mean"].numpy(), found["sd"].numpy()
