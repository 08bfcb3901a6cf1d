"""A denoiser and a vision model of one's own, given as two functions: sampled, compared, exported.

    python examples/own_models.py OUT [--num 4] [--steps 25]

Prior: a mixture of Gaussians around the embedded bundle's pictures, whose E[x0 | x] is a formula. Feature: a channel of a small
network in plain torch; any differentiable function of pictures [batch, 3, height, width] in [-1, 1] to [batch] takes its place.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import tiltscope
from tiltscope.engine.compare import compare
from tiltscope.engine.config import CompareConfig

WIDTH = 0.15  # of each Gaussian
NUM_CENTRES = 256


def make_prior(pictures: Tensor) -> tiltscope.Prior:
    """p(x0) = mean_i N(x0; p_i, h^2):  D = sum_i w_i (p_i + alpha h^2/v (x - alpha p_i)),  v = sigma^2 + alpha^2 h^2."""
    centres = pictures.flatten(1)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        alpha2 = (1 - sigma) * (1 + sigma)
        v = (sigma**2 + WIDTH**2 * alpha2).to(x.dtype)[:, None]
        alpha = torch.sqrt(alpha2).to(x.dtype)[:, None]
        p, flat = centres.to(x.dtype), x.flatten(1)
        # |x - alpha p|^2 without what is the same for every picture, which the softmax does not see.
        score = (alpha * (flat @ p.T) - alpha**2 * (p * p).sum(1) / 2) / v
        mean = torch.softmax(score, dim=1) @ p
        return (mean + alpha * WIDTH**2 / v * (flat - alpha * mean)).view_as(x)

    return tiltscope.Prior(denoise, shape=tuple(pictures.shape[1:]), name="mixture of emoji")


def make_feature() -> tiltscope.Feature:
    """A channel of a network of one's own, over the middle of the picture. These weights are drawn; load yours."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.GELU(), nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.GELU()
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (2 / p[0].numel()) ** 0.5)
    network.requires_grad_(False)

    def activation(x0: Tensor) -> Tensor:
        return network(x0.float())[:, 3, 4:12, 4:12].mean(dim=(1, 2))

    return tiltscope.Feature(activation, name="channel 3 of mine")


def main() -> None:
    """Draw, compare, export; print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--num", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    asked = parser.parse_args()

    bundle = tiltscope.load("emoji64")
    prior = make_prior(bundle.pool.x0(range(NUM_CENTRES)))
    feature = make_feature()
    drawn = {"num": asked.num, "steps": asked.steps, "seed": 0}

    # sample: calibrated on the prior's own unguided draws, where nobody has a pool
    plain = tiltscope.sample(prior, feature, lam=0.0, **drawn)
    spread = float(bundle.pool.activations(feature).std())
    pushed = tiltscope.sample(prior, feature, lam=1.0 / spread, **drawn)
    pushed.save(asked.out / "samples")

    # compare: the bundle's pictures and evaluator, one's own prior in its prior's place
    mine = bundle.with_prior(prior)
    config = CompareConfig(
        num=asked.num,
        lifts=("dps",),
        solvers=("ddpm",),
        steps=(asked.steps,),
        target_activation=float(pushed.activation.mean()),
        beyond_pool=True,
        calibration_num=64,
        likelihood=False,
    )
    comparison = compare(mine, feature, config)
    comparison.save(asked.out / "compare")

    # export: the first use builds ONNX files, every use holds them to this very function in float64
    by_onnx = tiltscope.sample(prior, feature, lam=1.0 / spread, runner="onnx", **drawn)
    by_onnx.save(asked.out / "by_onnx")
    found = {
        "unguided": float(plain.activation.mean()),
        "guided": float(pushed.activation.mean()),
        "methods": {each.name: each.metrics.get("activation_mean") for each in comparison.methods},
        "parity": by_onnx.manifest["parity"],
        "apart": float((by_onnx.x0 - pushed.x0).square().mean().sqrt()),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
