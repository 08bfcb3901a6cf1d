"""Pictures in, pictures and numbers out, a shard at a time: what was finished when a run was killed is not done again.

A shard is SHARD pictures (fewer where a picture has very many numbers). It is two files, each written whole or not at all, the
second one last: pictures and words (parquet), then activations [latents, pictures] and embeddings (safetensors). What a shard
holds depends on its pictures alone, so a run that was killed ends with the same bytes as one that was not.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tiltscope.engine.bundling.pictures import Pictures, Unreadable, encode
from tiltscope.engine.errors import BundleError
from tiltscope.engine.report.atomic import clear_temporaries, replacing, write_bytes

BATCH = 32
SHARD = 1024
ROW_GROUP = 64
# Of a shard's activations: beyond it, a shard has fewer pictures.
MOST_SHARD_BYTES = 2**27
LEFT_OUT = "left_out"


class Read(Protocol):
    """x0 [b, 3, h, w] in [-1, 1] -> (activations [b, latents], embeddings [b, size] or None), float32 on the CPU."""

    def __call__(self, x0: Float[Tensor, "batch 3 height width"], /) -> tuple[Tensor, Tensor | None]: ...


class Shard(NamedTuple):
    table: Path
    numbers: Path


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The shards of `num` pictures in the folder `work`. rows: pictures of a shard, a multiple of BATCH."""

    work: Path
    num: int
    rows: int

    @classmethod
    def plan(cls, work: Path, *, num: int, num_latents: int) -> "Shards":
        fitting = MOST_SHARD_BYTES // (4 * num_latents) // BATCH * BATCH
        return cls(work=work, num=num, rows=max(BATCH, min(SHARD, fitting)))

    def __len__(self) -> int:
        return -(-self.num // self.rows)

    def __getitem__(self, at: int) -> Shard:
        return Shard(self.work / f"shard-{at:06d}.parquet", self.work / f"shard-{at:06d}.safetensors")

    def range(self, at: int) -> range:
        return range(at * self.rows, min((at + 1) * self.rows, self.num))

    def left_out(self) -> Iterator[tuple[str, str]]:
        """(file, reason) of every picture that could not be used, in order."""
        for at in range(len(self)):
            for row in json.loads((pq.read_schema(self[at].table).metadata or {})[LEFT_OUT.encode()]):
                yield row[0], row[1]


def read_shards(
    shards: Shards,
    pictures: Pictures,
    read: Read,
    *,
    workers: int = 2,
    strict: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Every shard that is not there yet. on_progress is told how many pictures are done.

    strict: a picture that cannot be used raises BundleError; else it is left out and listed in its shard.
    """
    shards.work.mkdir(parents=True, exist_ok=True)
    clear_temporaries(shards.work)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for at in range(len(shards)):
            rows = shards.range(at)
            if not shards[at].numbers.is_file():
                _read_shard(shards[at], rows, pictures, read, pool, strict, lambda n: on_progress(n, shards.num))
            on_progress(rows.stop, shards.num)


class _Loaded(NamedTuple):
    columns: dict[str, Any]
    pixels: NDArray[np.uint8] | None
    encoded: bytes
    reason: str


def _load(pictures: Pictures, index: int) -> _Loaded:
    """Decoding, resizing and encoding release the interpreter: threads are enough."""
    columns = pictures.columns(index)
    try:
        pixels = pictures.load(index)
    except Unreadable as error:
        return _Loaded(columns, None, b"", str(error))
    return _Loaded(columns, pixels, encode(pixels), "")


def _loaded(pictures: Pictures, rows: range, pool: ThreadPoolExecutor) -> Iterator[_Loaded]:
    """In order, two batches ahead: while the networks read one, the next is being decoded."""
    ahead: deque[Future[_Loaded]] = deque()
    for index in rows:
        ahead.append(pool.submit(_load, pictures, index))
        if len(ahead) > 2 * BATCH:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _read_shard(
    shard: Shard,
    rows: range,
    pictures: Pictures,
    read: Read,
    pool: ThreadPoolExecutor,
    strict: bool,
    on_progress: Callable[[int], None],
) -> None:
    columns: list[dict[str, Any]] = []
    left_out: list[tuple[str, str]] = []
    waiting: list[NDArray[np.uint8]] = []
    parts: list[tuple[Tensor, Tensor | None]] = []

    def take() -> None:
        parts.append(_numbers(read, np.stack(waiting)))
        waiting.clear()

    for done, each in enumerate(_loaded(pictures, rows, pool), start=rows.start + 1):
        file = str(each.columns["file"])
        if each.pixels is None:
            if strict:
                raise BundleError(
                    f"picture {file} cannot be used: {each.reason}; mend it, take it away, or leave out --strict"
                )
            left_out.append((file, each.reason))
            continue
        named = PurePosixPath(file).with_suffix(".webp").as_posix()
        known = {name: value for name, value in each.columns.items() if name != "file"}
        columns.append({"image": {"bytes": each.encoded, "path": named}, **known})
        waiting.append(each.pixels)
        if len(waiting) == BATCH:
            take()
            on_progress(done)
    if waiting:
        take()
    _write_table(shard.table, columns, left_out)
    # Last: it is what makes the shard count as done.
    write_bytes(shard.numbers, save(_joined(parts)))


def _numbers(read: Read, pixels: NDArray[np.uint8]) -> tuple[Tensor, Tensor | None]:
    x0 = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    with torch.no_grad():
        activations, embeddings = read(x0)
    if not bool(activations.isfinite().all()):
        raise BundleError(
            "an activation of a natural picture is not finite; trunk, autoencoder or their normalisation is wrong"
        )
    if embeddings is not None:
        embeddings = torch.nn.functional.normalize(embeddings, dim=-1).half()
    return activations, embeddings


def _joined(parts: list[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    if not parts:
        return {}
    # Transposed: a latent's numbers lie together, as they will be read.
    found = {"activations": torch.cat([each for each, _ in parts]).T.contiguous()}
    embeddings = [each for _, each in parts if each is not None]
    return found | ({"embeddings": torch.cat(embeddings)} if embeddings else {})


def _write_table(path: Path, columns: list[dict[str, Any]], left_out: list[tuple[str, str]]) -> None:
    table = pa.Table.from_pylist(columns, schema=SCHEMA if not columns else _schema(columns[0]))
    table = table.replace_schema_metadata({LEFT_OUT: json.dumps(left_out)})
    with replacing(path) as file:
        pq.write_table(table, file, compression="none")


_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXTS = pa.list_(pa.string())
_COLUMNS = ("name", "category", "keywords", "group", "split")


def _schema(row: dict[str, Any]) -> pa.Schema:
    return pa.schema(
        [("image", _IMAGE)]
        + [(name, _TEXTS if isinstance(value, list) else pa.string()) for name, value in row.items() if name != "image"]
    )


SCHEMA = pa.schema([("image", _IMAGE)] + [(name, _TEXTS if name == "keywords" else pa.string()) for name in _COLUMNS])


def tables(shards: Shards) -> Iterator[pa.Table]:
    """Pictures and words, a few at a time; shards without a picture are passed over."""
    for at in range(len(shards)):
        with pq.ParquetFile(shards[at].table) as file:
            for batch in file.iter_batches(batch_size=ROW_GROUP):
                yield pa.Table.from_batches([batch])


def num_kept(shards: Shards) -> int:
    """Pictures in all shards."""
    return sum(pq.read_metadata(shards[at].table).num_rows for at in range(len(shards)))


def latent_block(shards: Shards, latents: slice) -> Float[np.ndarray, "latents pictures"]:
    """Some latents' activations on every picture, float32."""
    parts: list[NDArray[np.float32]] = []
    for at in range(len(shards)):
        with safe_open(shards[at].numbers, framework="np") as file:
            if "activations" in file.keys():  # noqa: SIM118  not a mapping
                parts.append(file.get_slice("activations")[latents])
    return np.concatenate(parts, axis=1)


def embeddings(shards: Shards) -> Iterator[NDArray[np.float16]]:
    """Of every picture, a shard at a time."""
    for at in range(len(shards)):
        with safe_open(shards[at].numbers, framework="np") as file:
            if "embeddings" in file.keys():  # noqa: SIM118  not a mapping
                yield file.get_tensor("embeddings")
