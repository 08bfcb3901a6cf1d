"""Presets as data: what each fills in where a request is silent, beside what it reached when last measured.

Imports nothing of the engine; config.py reads the settings, tests/test_presets.py holds the numbers to the last measurement.
"""

from dataclasses import dataclass
from typing import Any

# Where the numbers below are from: python benchmarks/ablation.py --num 16, on this feature of emoji64 at one mean activation.
MEASURED_ON = "blocks.5:sae:1169"
MEASURED_AT = 7.61


@dataclass(frozen=True)
class Reached:
    """Mean naturalness of the pictures (sd; 0: as a real picture) with its standard error, and how many times faster a picture is
    than with paper_exact."""

    naturalness: float
    naturalness_se: float
    times_faster: float


@dataclass(frozen=True)
class Preset:
    """settings: by name, those of SampleConfig. row: what the ablation calls it."""

    settings: dict[str, Any]
    reached: Reached
    row: str


PRESETS: dict[str, Preset] = {
    # The KL-minimal tilt at a calibrated lambda. Ancestral sampling, because plug-in guidance has no consistent marginals
    # and a stochastic sampler forgets its errors (docs/decisions.md, "Default solver").
    "calibrated": Preset(
        {"log_tilt": "linear", "lift": "dps", "solver": "ddpm", "steps": 100, "guidance": "tilt"},
        Reached(naturalness=-0.73, naturalness_se=0.08, times_faster=10.9),
        row="tilt",
    ),
    # Six rows, half of them at high noise, the other three guided, calibrated as the default is: on four features the most
    # natural of fifteen ways tried that reach the activation of each (docs/decisions.md, "The preset fast").
    "fast": Preset(
        {
            "log_tilt": "linear",
            "lift": "dps",
            "solver": "ddpm",
            "steps": 6,
            "grid": "linear_beta(low=0.1, high=16.0)",
            "guidance": "tilt",
            "guidance_interval": (0.0, 0.98),
        },
        Reached(naturalness=-0.42, naturalness_se=0.20, times_faster=238.8),
        row="6 rows, less noise",
    ),
    # The published configuration: a constant scale of 1, which is no constant lambda, over all of the network's levels, and a
    # cap of 20. Its hazards are the lift's options (dps(clip=true, batch_mean=true)); pooling is the feature's. The number is
    # that of the scale which reaches the activation; the published scale of 1 is far too much on this feature.
    "paper_exact": Preset(
        {
            "lam": 1.0,
            "log_tilt": "capped(cap=20.0)",
            "lift": "dps(clip=True, batch_mean=True)",
            "solver": "ddpm",
            "steps": 1000,
            "grid": "native",
            "guidance": "constant",
        },
        Reached(naturalness=-0.33, naturalness_se=0.24, times_faster=1.0),
        row="published",
    ),
}
