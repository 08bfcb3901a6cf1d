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
from tiltscope.engine.feature.address import FeatureAddress
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
# Row groups of pictures kept: one of a pool that has one, and of a large pool a few megabytes.
KEPT_GROUPS = 8


def block_name(number: int) -> str:
    """The file of the `number`-th block of latents, where one file would be too large to be written at once."""
    return f"activations-{number:05d}.parquet"


class Pool:
    """num natural pictures, their words, split, stored activations and evaluator embeddings.

    names, categories, code_points ("1f436"): one text a picture; keywords: texts a picture; heldout: bool [num], in no training
    """

    def __init__(
        self,
        files: VerifiedFolder,
        path: str,
        *,
        num: int,
        shape: tuple[int, ...],
        hooks: Iterable[str],
        latents_per_file: int | None = None,
    ) -> None:
        """path: the pool's folder in the bundle; num: rows that bundle.json promises; hooks: those with stored statistics.

        latents_per_file: how many latents each file of activations holds; None: all are in one.
        """
        self._files = files
        self._path = path
        self.num = num
        self._shape = shape
        self._hooks = tuple(hooks)
        self._per_file = latents_per_file
        self._groups: dict[int, Any] = {}
        # By feature object: two custom features may share a name.
        self._computed: WeakKeyDictionary[Feature, NDArray[np.float64]] = WeakKeyDictionary()

    @cached_property
    def _columns(self) -> dict[str, list[Any]]:
        """The words of all pictures; the pictures themselves are read a row group at a time."""
        path = self._files.file(self._path, PICTURES)
        held = set(pq.read_schema(path).names)
        missing = {"image", "name", "category", "keywords", "split"} - held
        wanted = ["name", "category", "keywords", "split", *(["code_points"] if "code_points" in held else [])]
        columns = {} if missing else pq.read_table(path, columns=wanted).to_pydict()
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
        """Empty for a pool that is not of emoji."""
        return tuple(self._columns.get("code_points", ()))

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
        with Image.open(io.BytesIO(self._encoded(index))) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        if tuple(picture.shape) != self._shape:
            raise BundleError(
                f"{PICTURES}: picture {index} is {list(picture.shape)}, the prior's are {list(self._shape)}"
            )
        return picture

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The first row of every row group, and the number of rows."""
        found = pq.read_metadata(self._files.file(self._path, PICTURES))
        sizes = [found.row_group(at).num_rows for at in range(found.num_row_groups)]
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def _encoded(self, index: int) -> bytes:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if group not in self._groups:
            if len(self._groups) >= KEPT_GROUPS:
                self._groups.pop(next(iter(self._groups)))
            with pq.ParquetFile(self._files.file(self._path, PICTURES)) as file:
                self._groups[group] = file.read_row_group(group, columns=["image"]).column("image")
        return self._groups[group][index - int(self._starts[group])].as_py()["bytes"]

    def x0(self, indices: Iterable[int]) -> Float[Tensor, "n 3 height width"]:
        """images(indices)/127.5 - 1, float32 in [-1, 1]."""
        return self.images(indices).to(torch.float32) / 127.5 - 1

    @cached_property
    def _stored(self) -> dict[str, frozenset[str]]:
        """The columns of each file of activations that was asked for."""
        return {}

    def _file_of(self, address: FeatureAddress) -> str | None:
        """The file that holds a feature's column; None where no file does."""
        name = ACTIVATIONS
        if self._per_file is not None:
            if address.kind != "sae" or address.hook not in self._hooks or not isinstance(address.index, int):
                return None
            name = block_name(address.index // self._per_file)
            if str(PurePosixPath(self._path, name)) not in self._files.names:
                return None
        if name not in self._stored:
            self._stored[name] = frozenset(pq.read_schema(self._files.file(self._path, name)).names)
        return name if str(address) in self._stored[name] else None

    def activations(self, feature: Feature) -> Float[np.ndarray, "num"]:
        """a(x0) of every picture, float64: from stored columns (weighted sums of them too), else computed once.

        The caller's own copy: writing into it changes nothing here.
        """
        if feature not in self._computed:
            self._computed[feature] = self._from_columns(feature) if self._is_stored(feature) else self._run(feature)
        return self._computed[feature].copy()

    def _is_stored(self, feature: Feature) -> bool:
        # An address means this bundle's hook and weights only for this bundle's features.
        return (
            feature.pool is self and bool(feature.terms) and all(self._file_of(a) is not None for _, a in feature.terms)
        )

    def _from_columns(self, feature: Feature) -> NDArray[np.float64]:
        total = np.zeros(self.num)
        for weight, address in feature.terms:
            total += weight * self._column(address)
        return total

    def _column(self, address: FeatureAddress) -> NDArray[np.float64]:
        name = str(self._file_of(address))
        # By ParquetFile and DLPack: read_table and to_numpy import pandas where it is installed, a tenth of a start of `explain`.
        with pq.ParquetFile(self._files.file(self._path, name)) as file:
            column = file.read(columns=[str(address)]).column(0)
        if len(column) != self.num or column.null_count:
            raise BundleError(
                f"{name} has {len(column)} rows of {address}, {column.null_count} of them empty, not {self.num} numbers"
            )
        return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks]).astype(np.float64)

    def _run(self, feature: Feature) -> NDArray[np.float64]:
        feature = feature.on_pictures()
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
