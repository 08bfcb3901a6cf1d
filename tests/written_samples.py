"""What the tests of the writer write: samples made by hand, and a command that writes them."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from tiltscope.engine.report.writer import SampleWriter
from tiltscope.engine.samples import Samples

RUN = "1f" * 32
OTHER = "2e" * 32
FACTS: dict[str, Any] = {"command": "sample", "feature": "blocks.5:sae:137"}


def draw(indices: list[int], *, seed: int = 0, side: int = 4, pictures: bool = True, ok: bool = True) -> Samples:
    """What a sampler would give: everything about a sample follows from its seed and index."""
    num = len(indices)
    x0 = torch.stack([torch.randn(3, side, side, generator=torch.Generator().manual_seed(i)) for i in indices])
    whole = torch.zeros(num, dtype=torch.int64)
    return Samples(
        feature="blocks.5:sae:137",
        x0=x0,
        images=((x0 + 1) * 127.5).clamp(0, 255).round().to(torch.uint8) if pictures else None,
        activation=x0.mean((1, 2, 3)),
        drive=x0.amax((1, 2, 3)),
        lam=torch.full((num,), 2.0),
        seed=seed,
        index=torch.tensor(indices),
        target="approximate",
        nfe=whole + 100,
        n_vjp=whole + 99,
        ok=torch.full((num,), ok),
    )


def write_all(folder: Path, num: int, chunk: int = 3) -> None:
    """The same command, whatever is there already."""
    run = SampleWriter(folder, RUN)
    wanted = [index for index in range(num) if index not in run.finished()]
    for at in range(0, len(wanted), chunk):
        run.add(draw(wanted[at : at + chunk]))
    run.close(FACTS)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(each for each in folder.rglob("*") if each.is_file())
    return {str(each.relative_to(folder)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}
