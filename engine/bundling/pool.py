"""From shards to a pool: one table of pictures, activations by latent, their statistics, embeddings, and what latents are about.

    mean_j, sd_j          of latent j over the pool (population)
    density_j, max_j      share of pictures on which it fires, and its largest activation
    selectivity_j         mean z-score on the NUM_TOP pictures that fire it most

Never holds all activations: a block of latents at a time, over all pictures, of BLOCK_BYTES at most.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import save

from tiltscope.engine.bundling.naming import Name, Naming, strongest, words_of
from tiltscope.engine.bundling.shards import ROW_GROUP, Shards, embeddings, latent_block, num_kept, tables
from tiltscope.engine.errors import BundleError
from tiltscope.engine.pool import ACTIVATIONS, EMBEDDINGS, PICTURES, STATISTICS, block_name
from tiltscope.engine.report.atomic import replacing, write_bytes

NUM_TOP = 10
NUM_WORDS = 12
# Fewer say nothing of a feature; a split needs some on both sides.
LEAST_PICTURES = 20
BLOCK_BYTES = 2**28
_TEXT = {"dtype": "string", "_type": "Value"}
# Columns that `datasets` must not take for a text.
_KINDS = {"image": {"_type": "Image"}, "keywords": {"feature": _TEXT, "_type": "List"}}


@dataclass
class _Measured:
    """What is found of every latent, in order."""

    density: list[float] = field(default_factory=list[float])
    max: list[float] = field(default_factory=list[float])
    mean: list[float] = field(default_factory=list[float])
    sd: list[float] = field(default_factory=list[float])
    selectivity: list[float] = field(default_factory=list[float])
    words: list[list[str]] = field(default_factory=list[list[str]])

    def see(self, values: Float[np.ndarray, "pictures"], words: "Callable[[int], set[str]]") -> None:
        double = values.astype(np.float64)
        mean, sd = float(double.mean()), float(double.std())
        top = strongest(values, NUM_TOP)
        self.density.append(float((values > 0).mean()))
        self.max.append(float(double.max()))
        self.mean.append(mean)
        self.sd.append(sd)
        self.selectivity.append(float(((double[top] - mean) / (sd if sd > 0 else 1.0)).mean()))
        count = Counter(word for at in top.tolist() if values[at] > 0 for word in words(at))
        common = [word for word, num in sorted(count.items(), key=lambda pair: (-pair[1], pair[0])) if num >= 2]
        self.words.append(common[:NUM_WORDS])


@dataclass(frozen=True, kw_only=True)
class PoolFacts:
    """What bundle.json says of the pool, and the table of features."""

    num: int
    num_heldout: int
    latents_per_file: int | None
    """None: all in one file"""
    features: dict[str, Any]

    @property
    def num_named(self) -> int:
        return sum(name is not None for name in self.features["name"])

    @property
    def num_alive(self) -> int:
        return sum(self.features["alive"])


def write_pool(
    folder: Path,
    shards: Shards,
    *,
    hook: str,
    num_latents: int,
    compression: int = 3,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PoolFacts:
    """The pool's files from complete shards. on_progress is told how many latents are done.

    compression: zstd's level for activations. Raises BundleError where too few pictures are left to say anything.
    """
    if (num := num_kept(shards)) < LEAST_PICTURES:
        gone = list(shards.left_out())
        why = f" ({len(gone)} were left out, the first for: {gone[0][1]})" if gone else ""
        raise BundleError(f"the pool has {num} usable pictures{why}; give at least {LEAST_PICTURES}")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / PICTURES) as file:
        _write_pictures(file, tables(shards))
    words = _Words(folder / PICTURES)
    naming = Naming(words.all(), words.titles(), words.column("group"), words.heldout)
    measured = _Measured()
    per_file = max(1, BLOCK_BYTES // (4 * num))
    for number, start in enumerate(range(0, num_latents, per_file)):
        latents = slice(start, min(start + per_file, num_latents))
        block = latent_block(shards, latents)
        names = [f"{hook}:sae:{j}" for j in range(latents.start, latents.stop)]
        target = folder / (ACTIVATIONS if per_file >= num_latents else block_name(number))
        with replacing(target) as file:
            _write_activations(file, names, block, compression)
        for values in block:
            measured.see(values, words)
        naming.see(block)
        on_progress(latents.stop, num_latents)
    statistics = {name: torch.tensor(getattr(measured, name), dtype=torch.float64) for name in ("mean", "sd")}
    write_bytes(folder / STATISTICS, save(statistics))
    _write_embeddings(folder / EMBEDDINGS, embeddings(shards), num)
    return PoolFacts(
        num=num,
        num_heldout=int(words.heldout.sum()),
        latents_per_file=None if per_file >= num_latents else per_file,
        features=_feature_columns(hook, measured, naming.names()),
    )


def _feature_columns(hook: str, measured: _Measured, names: Sequence[Name | None]) -> dict[str, Any]:
    return {
        "feature": [f"{hook}:sae:{j}" for j in range(len(names))],
        "density": measured.density,
        "max": measured.max,
        "selectivity": measured.selectivity,
        "name": pa.array([None if n is None else n.word for n in names], pa.string()),
        "name_source": pa.array([None if n is None else n.source for n in names], pa.string()),
        "words": pa.array(measured.words, pa.list_(pa.string())),
        "alive": [density > 0 for density in measured.density],
    }


class _Words:
    """The words of every picture, kept as arrow keeps them: a Python set each would be a gigabyte of a million."""

    def __init__(self, pictures: Path) -> None:
        self._table = pq.read_table(pictures, columns=["name", "category", "keywords", "group", "split"])
        self.heldout = np.array([split == "heldout" for split in self.column("split")])

    def column(self, name: str) -> list[Any]:
        return self._table.column(name).to_pylist()

    def __call__(self, index: int) -> set[str]:
        name, category, keywords = (
            self._table.column(each)[index].as_py() for each in ("name", "category", "keywords")
        )
        return words_of(name, keywords or [], category)

    def all(self) -> Iterator[set[str]]:
        for batch in self._table.to_batches(max_chunksize=ROW_GROUP):
            rows = batch.to_pydict()
            for name, keywords, category in zip(rows["name"], rows["keywords"], rows["category"], strict=True):
                yield words_of(name, keywords or [], category)

    def titles(self) -> Iterator[set[str]]:
        return (words_of(name, [], "") for name in self.column("name"))


def _write_pictures(file: Any, parts: Iterator[pa.Table]) -> None:
    first = next(parts)
    described = {name: _KINDS.get(name, _TEXT) for name in first.column_names}
    # `datasets` reads this key: the column is a picture, not a struct.
    schema = first.schema.with_metadata({"huggingface": json.dumps({"info": {"features": described}})})
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        writer.write_table(first.cast(schema))
        for part in parts:
            writer.write_table(part.cast(schema))


def _write_activations(file: Any, names: Sequence[str], block: NDArray[np.float32], level: int) -> None:
    # One column is read at a time: no dictionary, statistics or schema copy that would outweigh it.
    options: dict[str, Any] = {"use_dictionary": False, "write_statistics": False, "store_schema": False}
    table = pa.table([pa.array(values) for values in block], names=list(names))
    pq.write_table(table, file, compression="zstd", compression_level=level, **options)


def _write_embeddings(path: Path, parts: Iterator[NDArray[np.float16]], num: int) -> None:
    """A safetensors file of one tensor `embeddings` [num, size], a shard at a time; no file where there are none."""
    first = next(parts, None)
    if first is None:
        return
    shape = [num, first.shape[1]]
    described = {"embeddings": {"dtype": "F16", "shape": shape, "data_offsets": [0, 2 * math.prod(shape)]}}
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.write(first.tobytes())
        for part in parts:
            file.write(part.tobytes())


def write_features(path: Path, columns: dict[str, Any]) -> None:
    """sae/features.parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(pa.table(columns), file, compression="zstd", compression_level=15)
