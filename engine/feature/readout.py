"""What is read off a trunk's tokens: a feature as tensors, so that one compiled graph serves every feature of a hook.

    pre_kn     = direction_k . token_n + bias_k
    latent_kn  = pre_kn where pre_kn > threshold_k, else 0           (JumpReLU; threshold -inf: no threshold)
    activation = sum_k weight_k pool_k(latent_k)                     defines q*, reports, calibration
    drive      = sum_k weight_k pool_k(pre_k)                        guidance differentiates it: alive where latents are flat zero
    pool_k(v)  = m_k0 max(v) + m_k1 mean(v) + m_k2 lse(v)            over the tokens of mask_k
    lse(v)     = T log mean exp(v / T), T = 0.2                      between mean and max, and 0 for a silent feature

A convolutional readout's directions are windows [d, h, w] over the patch grid, and tokens beyond its edge are zero:

    pre_kn = sum_yx direction_kyx . token_(n + yx - centre) + bias_k

This module knows tensors; it must not know hooks, files or how a feature is written.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tiltscope.kernels.dispatch_feature import readout as read_tokens
from tiltscope.kernels.dispatch_feature import readout_of_rows as read_rows
from tiltscope.kernels.dispatch_feature import sae_rows
from tiltscope.kernels.implementation import Implementation
from tiltscope.kernels.reference_feature import LSE_TEMPERATURE as LSE_TEMPERATURE
from tiltscope.kernels.reference_feature import pool as pool
from tiltscope.kernels.reference_feature import threshold_latents as threshold_latents

# A batch size: symbolic while a graph is being traced.
Size = int | torch.SymInt
# The published mix (method: 0.7 max + 0.3 mean over the central half); columns max, mean, lse.
MIXTURES: dict[str, tuple[float, float, float]] = {
    "centre": (0.7, 0.3, 0.0),
    "max": (1.0, 0.0, 0.0),
    "mean": (0.0, 1.0, 0.0),
    "lse": (0.0, 0.0, 1.0),
}


@dataclass(frozen=True)
class Readout:
    """A batch of features of one hook, each a signed sum of K rows. Shapes below; b may be 1 for one feature shared by a batch.

    direction [b, K, d]   bias [b, K]   threshold [b, K] (-inf: none)   weight [b, K] (0: a padding row)
    pooling [b, K, 3]     mixture of (max, mean, lse)
    mask [b, K, tokens]   which tokens are pooled; at least one a row

    Convolutional: direction [b, K, d, h, w], h and w odd, and mask [b, K, gh, gw], which says how the tokens lie.
    """

    direction: Float[Tensor, "batch rows width *window"]
    bias: Float[Tensor, "batch rows"]
    threshold: Float[Tensor, "batch rows"]
    weight: Float[Tensor, "batch rows"]
    pooling: Float[Tensor, "batch rows 3"]
    mask: Bool[Tensor, "batch rows *tokens"]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Readout":
        return Readout(*(change(getattr(self, f.name)) for f in fields(self)))

    @property
    def window(self) -> tuple[int, ...]:
        """(h, w) of a convolutional readout's directions, else ()."""
        return tuple(self.direction.shape[3:])

    @property
    def batch(self) -> Size:
        return self.direction.shape[0]

    @property
    def num_rows(self) -> int:
        return self.direction.shape[1]

    def expand(self, n: Size) -> "Readout":
        """The same feature for n samples (a view); itself where the batch is n already. ValueError for any other batch."""
        if self.batch == n:
            return self
        if self.batch != 1:
            raise ValueError(f"a readout of batch {self.batch} cannot serve {n} samples")
        return self._map(lambda t: t.expand(n, *t.shape[1:]))

    def __getitem__(self, part: slice) -> "Readout":
        """Some samples of the batch (views)."""
        return self._map(lambda t: t[part])

    def scale(self, factor: float) -> "Readout":
        """factor * feature."""
        return replace(self, weight=self.weight * factor)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Readout":
        """Every floating tensor in dtype, all of them on device (None: where they are)."""
        return self._map(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))

    def pad(self, num_rows: int) -> "Readout":
        """num_rows rows in all; the added ones have weight 0 and read 0 for every picture."""
        extra = num_rows - self.num_rows
        if extra == 0:
            return self
        b = self.direction.shape[0]
        blank = Readout(
            self.direction.new_zeros(b, extra, *self.direction.shape[2:]),
            self.bias.new_zeros(b, extra),
            self.threshold.new_full((b, extra), -math.inf),
            self.weight.new_zeros(b, extra),
            self.pooling.new_zeros(b, extra, 3),
            self.mask.new_ones(b, extra, *self.mask.shape[2:]),
        )
        return Readout.concat([self, blank])

    def as_window(self, window: tuple[int, ...], grid: tuple[int, ...]) -> "Readout":
        """The same feature as a convolution: its direction in the middle of a window of zeros. Itself where it is one already.

        Raises ValueError where it is a convolution with another window, or reads tokens that are not on the grid.
        """
        if self.window == window:
            return self
        if self.window or self.mask.shape[2] != math.prod(grid):
            raise ValueError(
                f"a readout with window {self.window} of {list(self.mask.shape[2:])} tokens cannot be read with window "
                f"{window} on a grid {grid}"
            )
        rows, columns = window
        around = [columns // 2, columns // 2, rows // 2, rows // 2]
        return replace(
            self, direction=F.pad(self.direction[..., None, None], around), mask=self.mask.unflatten(2, grid)
        )

    @staticmethod
    def concat(readouts: "Sequence[Readout]") -> "Readout":
        """The sum of features: rows side by side. All of one batch, width and token count."""
        return Readout(*(torch.cat([getattr(r, f.name) for r in readouts], dim=1) for f in fields(Readout)))

    @staticmethod
    def stack(readouts: "Sequence[Readout]") -> "Readout":
        """One batch of different features: along the batch, shorter sums padded with rows of weight 0."""
        num_rows = max(r.num_rows for r in readouts)
        padded = [r.pad(num_rows) for r in readouts]
        return Readout(*(torch.cat([getattr(r, f.name) for r in padded], dim=0) for f in fields(Readout)))


def pre_activations(
    tokens: Float[Tensor, "batch tokens width"], readout: Readout, *, kernels: Implementation = "reference"
) -> Float[Tensor, "batch rows tokens"]:
    """direction_k . token_n + bias_k, or the window's: the op sae_rows, by the implementation asked for."""
    readout = readout.expand(tokens.shape[0])
    grid = tuple(readout.mask.shape[2:]) if readout.window else None
    return sae_rows(tokens, readout.direction, readout.bias, grid=grid, implementation=kernels)


def pool_latents(tokens: Float[Tensor, "batch tokens width"], readout: Readout) -> Float[Tensor, "batch rows"]:
    """pool_k(latent_k) of every row, unweighted: what the pool stores and a sparse autoencoder's latents are ranked by."""
    readout = readout.expand(tokens.shape[0])
    latent = threshold_latents(pre_activations(tokens, readout), readout.threshold)
    return pool(latent, readout.pooling, readout.mask.flatten(2))


def read(
    tokens: Float[Tensor, "batch tokens width"], readout: Readout, *, kernels: Implementation = "reference"
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
    """-> (activation [batch], drive [batch]) as in the module's docstring, in the readout's dtype (float32 or float64).

    tokens may be in a lower precision; they are widened first. kernels: which implementation of the ops runs. No host
    synchronisation, no branch on values.
    Proved by tests/feature/test_readout.py: equal to a slow loop, gradient of drive alive where activation is flat zero,
    sums of features, bitwise independence of batch mates.
    """
    readout = readout.expand(tokens.shape[0])
    pooled = (readout.threshold, readout.weight, readout.pooling, readout.mask.flatten(2))
    if readout.window:
        return read_rows(pre_activations(tokens, readout, kernels=kernels), *pooled, implementation=kernels)
    return read_tokens(tokens, readout.direction, readout.bias, *pooled, implementation=kernels)


def token_map(tokens: Float[Tensor, "batch tokens width"], readout: Readout) -> Float[Tensor, "batch tokens"]:
    """sum_k weight_k latent_kn, before pooling and unmasked: where the feature fires."""
    readout = readout.expand(tokens.shape[0])
    latent = threshold_latents(pre_activations(tokens, readout), readout.threshold)
    return (readout.weight[..., None] * latent).sum(dim=1)
