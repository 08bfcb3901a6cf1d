"""A user's own functions in the form that exporters trace: a denoiser as a network, an activation as a trunk of one token.

    D = 0 x + 1 network(x, t)            t = (sigma rounded to float32, the rest): together sigma, to float64's 48th bit
    activation = drive = the one token of the one place of one picture

So a step of functions has the graphs, inputs and gate of every other. What is traced is what the function did on tensors: a
Python branch on values, or numpy inside, cannot be traced, and the gate would find what was baked in. Knows tensors; must not
know traces or files.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.feature.hooked import CPU, Trunk
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.prior.network import NetworkDenoiser, Terms
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.trial import trial_values
from tiltscope.kernels.implementation import Implementation

# Noise levels at which a denoiser is known by its answers.
_LEVELS = (0.05, 0.4, 0.8, 0.99)


class _TwoWords(nn.Module):
    """sigma [batch] -> [batch, 2]: its float32, and what that leaves over; the sum of both in float64 is sigma again."""

    def forward(self, sigma: Float64[Tensor, "batch"]) -> Float64[Tensor, "batch 2"]:
        first = sigma.to(torch.float32).to(torch.float64)
        return torch.stack([first, sigma - first], dim=1)


class _FunctionNetwork(nn.Module):
    """network(x, t) = denoise(x, sigma). A function that is a module itself is a part of this one, so its weights are seen."""

    def __init__(self, denoise: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.time_proj: nn.Module = _TwoWords()
        self.denoise = denoise

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        del return_dict
        sigma = self.time_proj(t).to(torch.float64).sum(dim=1)
        return (self.denoise(x, sigma).to(x.dtype),)


class _Plain:
    """A function has no weights that would say in what, and where, it computes."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return CPU


class FunctionDenoiser(_Plain, NetworkDenoiser):
    """What an exporter asks of a denoiser, for a prior that is a function: float32."""

    def __init__(self, prior: Prior, denoise: Callable[[Tensor, Tensor], Tensor]) -> None:
        # Not the parent's: a function has no levels and no prediction type.
        self.network = _FunctionNetwork(denoise)
        self.pixel_unshuffle = 1
        self.learned_range = False
        self.shape = prior.shape

    def coefficients(self, sigma: Float64[Tensor, "batch"]) -> Terms:
        """D is the function's own answer."""
        zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
        return Terms(sigma, zero, one, one)


class FunctionTrunk(_Plain, Trunk):
    """x0 -> one token [batch, 1, 1]: the activation. A function that is a module itself is a part of this one."""

    def __init__(self, feature: Feature, activation: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__(
            feature.identity,
            width=1,
            grid=(1, 1),
            num_prefix_tokens=0,
            image_size=(1, 1),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
        self.activation, self.shape = activation, shape

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.shape

    def forward(
        self, x0: Float[Tensor, "batch ..."], *, kernels: Implementation = "reference"
    ) -> Float[Tensor, "batch 1 1"]:
        return self.activation(x0).to(x0.dtype)[:, None, None]


def function_readout() -> Readout:
    """Of a FunctionTrunk's one token: itself."""
    one = torch.ones(1, 1)
    return Readout(
        direction=one[..., None],
        bias=torch.zeros(1, 1),
        threshold=torch.full((1, 1), float("-inf")),
        weight=one,
        pooling=torch.tensor([[[0.0, 1.0, 0.0]]]),
        mask=torch.ones(1, 1, 1, dtype=torch.bool),
    )


def denoiser_of(prior: Prior, runner: str) -> NetworkDenoiser:
    """The prior's network, or its function as one. Raises RunnerError for samples that are not [channel, height, width]."""
    if prior.network is not None:
        return prior.network
    if len(prior.shape) != 3:
        raise RunnerError(
            f"runner {runner}: prior {prior.name} has samples of shape {list(prior.shape)}; a function of one's own is exported "
            "for samples [channel, height, width]; use --runner torch"
        )
    return FunctionDenoiser(prior, prior._denoise)  # pyright: ignore[reportPrivateUsage]


def trunk_of(prior: Prior, feature: Feature) -> tuple[Trunk, Readout]:
    """The feature's trunk and readout, or its function as both."""
    if feature.trunk is not None and feature.readout is not None:
        return feature.trunk, feature.readout
    activation: Any = feature._activation  # pyright: ignore[reportPrivateUsage]
    return FunctionTrunk(feature, activation, prior.shape).eval(), function_readout()


def answers_of_prior(prior: Prior, device: torch.device = CPU) -> str:
    """sha256 of what a denoiser answers at some levels: another function under the same name is another one."""
    sigma = torch.tensor(_LEVELS, dtype=torch.float64, device=device)
    with torch.no_grad():
        return _digest(prior.denoise(trial_values((len(_LEVELS), *prior.shape), torch.float32).to(device), sigma))


def answers_of_feature(feature: Feature, shape: tuple[int, ...], device: torch.device = CPU) -> str:
    """Likewise, of an activation on some pictures of `shape`."""
    with torch.no_grad():
        return _digest(feature.activation(trial_values((4, *shape), torch.float32).to(device)))


def _digest(answer: Tensor) -> str:
    return hashlib.sha256(answer.double().cpu().contiguous().numpy().tobytes()).hexdigest()
