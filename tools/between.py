"""Weights between those that a sitting started from and those that it ended with.

    theta = theta_start + share (theta_end - theta_start)

A short sitting moves the weights so little that what they answer moves along (arXiv:2109.01903): half of the way is a prior
guided by its early self half as much (autoguidance.py). Why not all of it: the farther, the less is dD/dx the posterior's
covariance, which a tilt's push goes through (posterior_mean.py).

    python tools/between.py --start FOLDER/model --end TRAINING --share 0.5 --out TRAINING

`--end` and `--out` are training folders: checkpoint.pt and log.jsonl. tools/make_bundle.py reads the latter as any other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from prior_network import export, load_unet
from torch import Tensor

FACTS = ("step", "seconds")


@dataclass(frozen=True, kw_only=True)
class Config:
    start: Path
    """the exported prior that the sitting was warm-started from"""
    end: Path
    """its training folder"""
    share: float
    """0: the start; 1: the end"""
    out: Path
    """a new training folder"""


def between(start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """theta of the formula, by name."""
    return {name: start[name] + share * (end[name] - start[name]) for name in start}


def main(config: Config) -> None:
    if not 0 <= config.share <= 1:
        raise SystemExit(f"--share: got {config.share}, allowed are numbers from 0 to 1")
    network = load_unet(config.start)
    ended: dict[str, Any] = torch.load(config.end / "checkpoint.pt", weights_only=True)
    network.load_state_dict(between(network.state_dict(), ended["modules"]["average"], config.share))
    config.out.mkdir(parents=True)
    facts = {name: ended["facts"][name] for name in FACTS}
    torch.save({"modules": {"average": network.state_dict()}, "facts": facts}, config.out / "checkpoint.pt")
    (config.out / "log.jsonl").write_text((config.end / "log.jsonl").read_text())
    export(network, config.out / "model")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
