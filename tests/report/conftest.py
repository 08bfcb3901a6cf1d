"""A small explanation made by hand, for the page and the writer: every number in it is chosen, nothing is sampled."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tiltscope.engine.report import shards, writer
from tiltscope.engine.report.metrics import METRICS
from tiltscope.engine.samples import Explanation, Samples
from tiltscope.engine.tilt.calibrate import estimates


def make_samples(name: str, num: int, *, side: int = 64, level: float = 3.0, heat: bool = True) -> Samples:
    """Discs of one colour on grey, each a little larger than the last."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    radius = torch.linspace(0.4, 0.9, num).reshape(num, 1, 1)
    disc = ((x**2 + y**2).sqrt() < radius).float()
    colour = torch.tensor(
        {"tilt": [1, 0.6, 0], "topk": [0, 0.7, 0.3], "hard": [0, 0.4, 0.9], "actmax": [0.6, 0, 0.6]}[name]
    )
    x0 = 2 * (0.85 * (1 - disc[:, None]) + colour.reshape(1, 3, 1, 1) * disc[:, None]) - 1
    activation = level + torch.linspace(-0.4, 0.4, num)
    pool = name in ("topk", "hard")
    whole = torch.zeros(num, dtype=torch.int64)
    return Samples(
        feature="blocks.5:sae:137",
        x0=x0,
        images=((x0 + 1) * 127.5).round().to(torch.uint8),
        activation=activation,
        drive=activation + 0.1,
        lam=torch.full((num,), torch.nan if name != "tilt" else 2.0),
        seed=0,
        index=torch.arange(num) * (7 if pool else 1),
        target="exact" if pool else "none" if name == "actmax" else "approximate",
        nfe=whole + (100 if name == "tilt" else 0),
        n_vjp=whole + (0 if pool else 99),
        ok=torch.ones(num, dtype=torch.bool),
        heat=torch.rand(num, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 if heat else None,
        sources=tuple(f"picture {at}" for at in range(num)) if pool else None,
    )


def make_explanation(num: int = 8, **changes: Any) -> Explanation:
    """natural: mostly silent, as features are. Every metric of the pool's answers that cannot exist is None."""
    rng = np.random.default_rng(0)
    natural = np.where(rng.random(600) < 0.1, rng.gamma(4.0, 0.8, 600), 0.0)
    calibration = estimates(natural, 0.9)
    answers = {name: make_samples(name, num) for name in ("tilt", "topk", "hard", "actmax")}
    metrics: dict[str, dict[str, float | None]] = {name: dict.fromkeys(METRICS, 1.25) for name in answers}
    for name, missing in {
        "tilt": ["excess_kl"],
        "topk": ["log_z", "seconds"],
        "hard": ["log_z", "seconds"],
        "actmax": ["kl", "log_z", "ess", "excess_kl"],
    }.items():
        metrics[name] |= dict.fromkeys(missing)
    explanation = Explanation(
        feature="blocks.5:sae:137",
        name="clock",
        answers=answers,
        metrics=metrics,
        target=3.0,
        target_quantile=0.97,
        lam=0.9,
        calibration=calibration,
        natural=natural,
        natural_mean=float(natural.mean()),
        prior_mean=float(natural.mean()) + 0.01,
        prior_mean_se=0.05,
        warnings=(),
        notes={"hard": "only 5 pool pictures lie above the threshold 2.9"},
        manifest={
            "command": "explain",
            "identity": "3d" * 32,
            "feature": "blocks.5:sae:137",
            "bundle": {
                "name": "emoji64",
                "identity": "sha256:" + "4c" * 32,
                "licence": "MIT",
                "attribution": [
                    {"what": "pictures", "source": "Fluent Emoji", "licence": "MIT", "url": "https://example.org"}
                ],
            },
            "config": {
                "num": num,
                "seed": 0,
                "log_tilt": "linear",
                "solver": "ddpm",
                "steps": 100,
                "preset": "calibrated",
            },
            "kl": {"value": calibration.kl, "source": "pool"},
            "log_z": {"value": calibration.log_z, "source": "pool"},
            "prior_check": {"num": 32},
            "seconds": {"tilt": 12.5},
            "runner": "torch",
        },
    )
    return replace(explanation, **changes)


@pytest.fixture
def explain_by_hand() -> Callable[..., Explanation]:
    """make_explanation(num=8, **changed fields)"""
    return make_explanation


@pytest.fixture
def samples_by_hand() -> Callable[..., Samples]:
    """make_samples(answer, num, side=64, level=3.0, heat=True)"""
    return make_samples


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    """Shards of 4 samples instead of 4,096: the same code, in a test's time."""
    for module in (shards, writer):
        monkeypatch.setattr(module, "SHARD", 4)
    monkeypatch.setattr(writer, "LISTED_IN_MANIFEST", 4)
    return 4
