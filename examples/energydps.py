"""The published experiment on one page: what one feature means, by its sampler, and by the calibrated one at the same activation.

    python examples/energydps.py BUNDLE FEATURE [--out OUT] [--rows 1000] [--num 1]

docs/systems/energydps.md makes the bundle. The published sampler (preset paper_exact) guides with a constant scale of 1 over
all of the network's 1000 levels, from seed 45, and caps the activation at 20; a constant scale is no constant lambda, so what it
draws from has no formula. The calibrated one draws from p(x) exp(lambda a(x))/Z at the lambda whose mean the first reached.
"""

import argparse
import json
from pathlib import Path

import tiltscope


def main() -> None:
    """Draw both, save both, print what can be compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("feature", help="for example stages.2.20:sae:137")
    parser.add_argument("--out", type=Path, default=Path("energydps-out"))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--num", type=int, default=1)
    asked = parser.parse_args()

    bundle = tiltscope.load(asked.bundle)
    feature = bundle.feature(asked.feature)
    common = {"num": asked.num, "seed": 45, "batch_size": 1}

    published = tiltscope.sample(bundle.prior, feature, preset="paper_exact", steps=asked.rows, **common)
    published.save(asked.out / "published")
    reached = float(published.activation.mean())

    natural = bundle.pool.activations(feature)
    found: dict[str, object] = {"reached": reached, "natural_mean": float(natural.mean()), "lam": None, "kl": None}
    calibration = tiltscope.calibrate(natural, reached)
    if calibration.feasible:
        found |= {"lam": calibration.lam, "kl": calibration.kl, "ess": calibration.ess}
        tilt = tiltscope.sample(bundle.prior, feature, lam=calibration.lam, steps=asked.rows, **common)
        tilt.save(asked.out / "calibrated")
        found["calibrated_reached"] = float(tilt.activation.mean())
    else:
        # No natural picture, or too few, go as far: then there is no tilt of p to compare with.
        found["not_calibrated"] = calibration.reason
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
