"""The pool of a bundle: the pictures, every latent's activation on them, what the latents are called, evaluator embeddings.

Activations come from the engine's own trunk and readout: the numbers stored are the numbers that sampling uses.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from training import to_unit_range

HOOK = "blocks.5"
NUM_TOP = 10


def write_table(path: Path, columns: dict[str, Any], **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, compression="zstd", compression_level=15, **options)


def pooled_activations(bundle: Path, images: Tensor, *, batch: int = 32) -> Tensor:
    """Every latent's pooled activation (`centre`), by the engine's own trunk and readout: uint8 [n, 64, 64, 3] ->
    float32 [n, latents].
    """
    from tiltscope.engine.feature.sae import load_sae
    from tiltscope.engine.feature.trunk import load_trunk

    trunk, sae = load_trunk(bundle / "trunk", HOOK), load_sae(bundle / "sae/sae.safetensors")
    with torch.no_grad():
        return torch.cat([sae.latents(trunk(to_unit_range(chunk)), trunk) for chunk in images.split(batch)])


def describe_features(activations: np.ndarray, pool: dict[str, Any]) -> dict[str, Any]:
    """The columns of sae/features.parquet."""
    from name_features import name_features, words_of

    words = [words_of(n, k, c) for n, k, c in zip(pool["name"], pool["keywords"], pool["category"], strict=True)]
    titles = [words_of(n, [], "") for n in pool["name"]]
    names = name_features(activations, words, titles, pool["code_points"], np.array(pool["split"]) == "heldout")
    double = activations.astype(np.float64)
    mean, sd = double.mean(0), double.std(0)
    top = np.argsort(-activations, axis=0, kind="stable")[:NUM_TOP]
    z = (np.take_along_axis(double, top, axis=0) - mean) / np.where(sd > 0, sd, 1.0)
    common = []
    for j in range(activations.shape[1]):
        firing = [words[i] for i in top[:, j] if activations[i, j] > 0]
        count = Counter(w for ws in firing for w in ws)
        common.append([w for w, n in sorted(count.items(), key=lambda pair: (-pair[1], pair[0])) if n >= 2][:12])
    return {
        "feature": [f"{HOOK}:sae:{j}" for j in range(activations.shape[1])],
        "density": (activations > 0).mean(0),
        "max": activations.max(0).astype(np.float64),
        "selectivity": z.mean(0),
        "name": [None if n is None else n.word for n in names],
        "name_source": [None if n is None else n.source for n in names],
        "words": common,
        "alive": (activations > 0).any(0),
    }


def pool_columns(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], Tensor]:
    """The columns of pool/pool.parquet (pictures as lossless webp) and the pictures themselves, uint8 [n, 64, 64, 3]."""
    from PIL import Image

    rows = np.flatnonzero(arrays["fluent_pool"])

    def webp(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(
            buffer, "WEBP", lossless=True, quality=100, method=4
        )  # 6: twenty times slower, 1 % smaller
        return buffer.getvalue()

    images = arrays["fluent_images"][rows]
    code_points = arrays["fluent_code_points"][rows].tolist()
    columns = {
        "image": [{"bytes": webp(p), "path": f"{c}.webp"} for p, c in zip(images, code_points, strict=True)],
        "name": arrays["fluent_name"][rows].tolist(),
        "code_points": code_points,
        "category": arrays["fluent_category"][rows].tolist(),
        "keywords": [[w for w in k.split("\t") if w] for k in arrays["fluent_keywords"][rows].tolist()],
        "split": ["heldout" if h else "train" for h in arrays["fluent_heldout"][rows]],
    }
    return columns, torch.from_numpy(images)


def read_pool(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What `write_pool` returned, from its files (without the pictures)."""
    import pyarrow.parquet as pq

    table = pq.read_table(
        folder / "pool/pool.parquet", columns=["name", "code_points", "category", "keywords", "split"]
    )
    activations = pq.read_table(folder / "pool/activations.parquet")
    return table.to_pydict(), np.stack([column.to_numpy() for column in activations.columns], axis=1)


def write_pool(folder: Path, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], np.ndarray]:
    """pool/: pictures, every latent's activation with its mean and sd, embeddings. Needs trunk/, sae/ and evaluator/.

    Returns the columns of the table and the activations [pictures, latents].
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.torch import save_file

    from tiltscope.engine.report.evaluator import load_evaluator

    columns, images = pool_columns(arrays)
    # `datasets` reads this key: the column is a picture, not a struct.
    text = {"dtype": "string", "_type": "Value"}
    kinds = {"image": {"_type": "Image"}, "keywords": {"feature": text, "_type": "List"}}
    features = {"info": {"features": {name: kinds.get(name, text) for name in columns}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, folder / "pool/pool.parquet", compression="zstd")

    activations = pooled_activations(folder, images)
    plain = {f"{HOOK}:sae:{j}": activations[:, j].numpy() for j in range(activations.shape[1])}
    # One column is read at a time: no dictionary, statistics or schema copy that would outweigh it.
    options = {"use_dictionary": False, "write_statistics": False, "store_schema": False}
    write_table(folder / "pool/activations.parquet", plain, **options)
    double = activations.double()
    save_file({"mean": double.mean(0), "sd": double.std(0, correction=0)}, folder / "pool/statistics.safetensors")
    embeddings = F.normalize(load_evaluator(folder / "evaluator").embed(to_unit_range(images)), dim=-1)
    save_file({"embeddings": embeddings.half()}, folder / "pool/embeddings.safetensors")
    return columns, activations.numpy()
