"""What a set of samples is on disk: names, tensors, the image folder's metadata, the grid.

Pure of any run: the writer decides which samples, where and when.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.report.atomic import write_bytes
from tiltscope.engine.report.pictures import decode_png, encode_png, grid
from tiltscope.engine.report.shards import TensorFile
from tiltscope.engine.samples import Samples


def tensors_of(samples: Samples, rows: Tensor) -> dict[str, Tensor]:
    """The tensors of samples.safetensors for some rows of `samples`."""
    names = ("x0", "activation", "drive", "lam", "index", "nfe", "n_vjp", "ok", "heat")
    # Of particles their weights and activations, not the pictures: those are P times as large as the samples.
    names += ("weights", "particle_activation", "group_log_z", "group_phi", "group_ess", "lineages")
    held = {name: getattr(samples, name) for name in names}
    # uint64: seeds reach 2^64 - 1.
    seed = torch.full((len(rows),), samples.seed, dtype=torch.uint64)
    return {name: each[rows] for name, each in held.items() if each is not None} | {"seed": seed}


def about(samples: Samples) -> dict[str, str]:
    """What a tensor file says of itself."""
    return {"format": "pt", "feature": samples.feature, "pictures": "no" if samples.images is None else "png"}


def is_pictured(source: TensorFile) -> bool:
    """Whether each row that is ok has a picture."""
    return source.metadata.get("pictures") == "png"


def picture_name(index: int, seed: int) -> str:
    """A picture's file name: 007_seed0.png."""
    return f"{index:03d}_seed{seed}.png"


def write_grid(folder: Path, pictures: Sequence[Path]) -> None:
    """samples.png from picture files; where there are none, none is left."""
    path = folder / "samples.png"
    if pictures:
        write_bytes(path, encode_png(grid([decode_png(each.read_bytes()) for each in pictures])))
    else:
        path.unlink(missing_ok=True)


def write_metadata(folder: Path, source: TensorFile | None) -> None:
    """metadata.jsonl for an image folder; nothing where there are no pictures."""
    if source is None or not is_pictured(source):
        return
    feature = source.metadata["feature"]
    names = ("lam", "activation", "seed", "index")
    columns = [source.column(name).tolist() for name in ("ok", *names)]
    lines = [
        {"file_name": picture_name(values[3], values[2]), "feature": feature} | dict(zip(names, values, strict=True))
        for ok, *values in zip(*columns, strict=True)
        if ok
    ]
    content = "".join(f"{json.dumps(_without_nan(line), ensure_ascii=False)}\n" for line in lines)
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "metadata.jsonl", content.encode())


def _without_nan(line: dict[str, Any]) -> dict[str, Any]:
    # The pool's pictures have no lambda, and JSON has no NaN.
    return {name: None if isinstance(value, float) and value != value else value for name, value in line.items()}
