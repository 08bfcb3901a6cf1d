"""The pool of emoji64: the pictures of the training data, through the code that `tiltscope bundle` runs for everyone's.

Activations come from the engine's own trunk and readout: the numbers stored are the numbers that sampling uses.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from data import family

from tiltscope.engine.bundling.pool import PoolFacts
from tiltscope.engine.bundling.pool import write_pool as write_shards
from tiltscope.engine.bundling.shards import Shards, read_shards

HOOK = "blocks.5"


class ArrayPictures:
    """The pool's rows of the training data (tools/data.py)."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays
        self._rows = np.flatnonzero(arrays["fluent_pool"])
        self.num = len(self._rows)

    def columns(self, index: int) -> dict[str, Any]:
        at = self._rows[index]
        code_points = str(self._arrays["fluent_code_points"][at])
        return {
            "file": f"{code_points}.png",
            "name": str(self._arrays["fluent_name"][at]),
            "code_points": code_points,
            "category": str(self._arrays["fluent_category"][at]),
            "keywords": [w for w in str(self._arrays["fluent_keywords"][at]).split("\t") if w],
            "group": family(code_points),
            "split": "heldout" if self._arrays["fluent_heldout"][at] else "train",
        }

    def load(self, index: int) -> np.ndarray:
        return self._arrays["fluent_images"][self._rows[index]]

    def identity(self) -> str:
        return hashlib.sha256(self._arrays["fluent_images"][self._rows].tobytes()).hexdigest()

    def write_folder(self, folder: Path) -> None:
        """The same pictures and words as anyone's folder: PNG files and metadata.jsonl."""
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for index in range(self.num):
            columns = self.columns(index)
            Image.fromarray(self.load(index)).save(folder / columns["file"])
            lines.append(json.dumps({"file_name": columns.pop("file")} | columns, ensure_ascii=False))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_pool(folder: Path, arrays: dict[str, np.ndarray], work: Path) -> PoolFacts:
    """pool/ and what its latents are about. Needs trunk/, sae/ and evaluator/ in `folder`; `work` is for what is not finished."""
    from tiltscope.engine.feature.sae import load_sae
    from tiltscope.engine.feature.trunk import load_trunk
    from tiltscope.engine.report.evaluator import load_evaluator

    trunk, sae = load_trunk(folder / "trunk", HOOK), load_sae(folder / "sae/sae.safetensors")
    evaluator = load_evaluator(folder / "evaluator")
    pictures = ArrayPictures(arrays)
    shards = Shards.plan(work, num=pictures.num, num_latents=sae.num_latents)
    read_shards(shards, pictures, lambda x0: (sae.latents(trunk(x0), trunk), evaluator.embed(x0)))
    return write_shards(folder / "pool", shards, hook=HOOK, num_latents=sae.num_latents, compression=15)
