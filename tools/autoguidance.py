"""A prior guided by an earlier version of itself, as the target of one more training: one network in the end, one call a row.

    D_w(x; t) = D(x; t) + w(t) (D(x; t) - D_early(x; t)),   w(t) = w s((t - low)/(high - low)),   s(u) = u^2 (3 - 2u) on [0, 1]

D - D_early points from what a network with too little training still confuses to what it should be: adding more of it draws the
samples together where both are sure and away from the shapeless ones between the kinds of things (arXiv:2406.02507). Only the
noisy levels are guided: there it decides what is drawn, below it would only harden edges and colours (arXiv:2404.07724).
The price is the distribution's: density moves from the rare to the typical, so recall is to be watched beside precision. And the
farther it goes, the less is its derivative the posterior's covariance, which a tilt needs (posterior_mean.py): between.py stops
half way.
"""

import torch
from prior_network import denoise
from torch import Tensor, nn


def share(t: Tensor, low: float, high: float) -> Tensor:
    """s of the formula: 0 up to level `low`, 1 from `high` on, smooth between."""
    u = ((t - low) / (high - low)).clamp(0, 1)
    return u * u * (3 - 2 * u)


class Autoguided:
    """(x [n, 3, 64, 64], t [n]) -> D_w of the same shape, without a gradient. `early` is called on the guided levels alone."""

    def __init__(self, network: nn.Module, early: nn.Module, *, weight: float, levels: tuple[float, float]) -> None:
        self.network, self.early = network, early
        self.weight, self.levels = weight, levels

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        # Whatever precision the pupil learns in: here rounding would be multiplied by the weight.
        with torch.autocast(x.device.type, enabled=False):
            x0_hat = denoise(self.network, x, t)
            w = self.weight * share(t, *self.levels)[:, None, None, None]
            guided = (t > self.levels[0]).nonzero()[:, 0]
            if len(guided):
                x0_hat[guided] += w[guided] * (x0_hat[guided] - denoise(self.early, x[guided], t[guided]))
            return x0_hat
