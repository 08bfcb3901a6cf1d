"""Activation maximisation, done as its best tools do it: the rival that needs no prior.

    x0 = tanh(C F^-1[S / f] / 2)      maximise the drive of a randomly shifted, scaled, turned x0 by Adam on S

S is a picture's spectrum, divided by frequency so that a step changes all scales alike; C turns decorrelated channels into
colours. With `magnitude` given, of natural pictures, only the phase is optimised (MaCo):

    x0 = tanh F^-1[magnitude e^(i phase)]

All stop where their mean activation, of the untransformed pictures, reaches the target: methods are compared at
one activation. It draws from no stated distribution. Knows the feature as a function; knows no prior.

Source: Fel et al., "Unlocking feature visualization for deep networks with magnitude constrained optimization", 2023;
Olah, Mordvintsev, Schubert, "Feature visualization", Distill 2017, and its tools lucid and lucent (Fourier basis,
colour decorrelation, Adam 0.05, start of spread 0.01, pad / jitter / scale / rotate), with shifts in proportion to the side.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tiltscope.engine.errors import ConfigError, NonFiniteError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.sampler.noise import STREAM_ACTMAX, normal, philox, seed_key, uniform

START_SPREAD = 0.01
LEARNING_RATE = 0.05
# Of a phase, in radians: a whole turn takes about as many steps as the paper's.
PHASE_LEARNING_RATE = 0.1
CONTRAST = 4.0  # lucid divides the picture by it; more saturates
SHIFT = 0.05  # of the side, either way
SCALE = 0.1
TURN_DEG = 10.0
STEPS_MAX = 256
# Pictures read by the feature at once: bounds memory for a large num.
BATCH = 32
# Pictures are in [-1, 1], ends included, where atanh is infinite.
_INSIDE = 0.98
# Columns: brightness, blue-yellow, red-green; the square root of the covariance of natural colours (ImageNet), as in lucid.
_COLOUR = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])


@dataclass(frozen=True)
class ActivationMaximum:
    """x0 [num, c, h, w] in [-1, 1]; activation [num] of x0; n_vjp: gradients a picture; reached: the mean met the target."""

    x0: Float[Tensor, "num channel height width"]
    activation: Float[Tensor, "num"]
    steps: int
    n_vjp: int
    reached: bool


def activation_maximisation(
    feature: Feature,
    *,
    shape: tuple[int, ...],
    num: int,
    target_mean: float,
    seed: int,
    steps_max: int = STEPS_MAX,
    magnitude: Float[Tensor, "channel height half"] | None = None,
) -> ActivationMaximum:
    """`num` pictures of `shape` (c, h, w) whose mean activation is `target_mean`, from the seed's own starts.

    magnitude: of `natural_magnitude`; then the phase alone is free.

    A picture's path depends on (seed, its place) alone; where all stop depends on their mean. On the last step the point
    between its two ends with the wanted mean is taken, or just past it where a threshold makes the activation jump. Where the
    mean is not reached within `steps_max`, the last pictures come back and `reached` is False.
    Raises ConfigError for a shape without height and width, NonFiniteError where no picture has a finite activation.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"activation maximisation got shape {shape}; allowed: (channels, height, width)")
    paint: _Painter = _Fourier(shape) if magnitude is None else _Phase(shape, magnitude)
    spectrum = torch.stack([paint.start(seed, place) for place in range(num)]).requires_grad_()
    optimiser = torch.optim.Adam([spectrum], lr=paint.learning_rate)
    before, steps = spectrum.detach().clone(), 0
    mean = _mean_activation(feature, paint(before))
    while mean < target_mean and steps < steps_max:
        before = spectrum.detach().clone()
        steps += 1
        spectrum.grad = torch.cat(
            [_descent(feature, paint, spectrum[at : at + BATCH], seed, at, steps) for at in range(0, num, BATCH)]
        )
        optimiser.step()
        mean = _mean_activation(feature, paint(spectrum.detach()))
    after = spectrum.detach()
    reached = mean >= target_mean
    if reached and steps > 0:
        after = _between(feature, paint, before, after, target_mean)
    x0 = paint(after)
    return ActivationMaximum(x0, _activation(feature, x0), steps, steps, reached)


def natural_magnitude(x0: Float[Tensor, "num channel height width"]) -> Float[Tensor, "channel height half"]:
    """Mean magnitude of the spectrum of natural pictures, before the tanh that keeps pictures in range."""
    flat = torch.atanh(x0.clamp(-_INSIDE, _INSIDE))
    return torch.fft.rfft2(flat, norm="ortho").abs().mean(0)


def _descent(feature: Feature, paint: "_Painter", spectrum: Tensor, seed: int, first: int, step: int) -> Tensor:
    """The gradient of -drive, of moved pictures at places first, first + 1, ...; a picture's own alone."""
    spectrum = spectrum.detach().requires_grad_()
    moved = _moved(paint(spectrum), seed, first, step=step)
    _, drive = feature.activation_and_drive(moved)
    return torch.autograd.grad(-drive.sum(), spectrum)[0]


class _Painter(Protocol):
    """From what is optimised, [num, ...], to pictures [num, c, h, w] in (-1, 1)."""

    learning_rate: float

    def start(self, seed: int, place: int) -> Tensor: ...

    def __call__(self, spectrum: Tensor) -> Tensor: ...


class _Fourier:
    """Spectra [num, c, h, w // 2 + 1, 2] over frequency, in decorrelated colours."""

    learning_rate: float = LEARNING_RATE

    def __init__(self, shape: tuple[int, ...]) -> None:
        channels, self.height, self.width = shape
        frequency = np.hypot(np.fft.fftfreq(self.height)[:, None], np.fft.rfftfreq(self.width)[None, :])
        scale = 1 / np.maximum(frequency, 1 / max(self.height, self.width))
        self.scale = torch.from_numpy(scale).to(torch.float32)
        self.shape = (channels, *scale.shape, 2)
        colour = _COLOUR / np.linalg.norm(_COLOUR, axis=0).max() if channels == 3 else np.eye(channels)
        self.colour = torch.from_numpy(colour).to(torch.float32)

    def start(self, seed: int, place: int) -> Tensor:
        noise = normal(seed, place, 0, STREAM_ACTMAX, shape=self.shape)
        return torch.from_numpy(START_SPREAD * noise).to(torch.float32)

    def __call__(self, spectrum: Tensor) -> Tensor:
        coefficients = torch.view_as_complex(spectrum) * self.scale
        flat = torch.fft.irfft2(coefficients, s=(self.height, self.width), norm="ortho") / CONTRAST
        return torch.tanh(torch.einsum("ij,njhw->nihw", self.colour, flat) / 2)  # = 2 sigmoid - 1


class _Phase:
    """Phases [num, c, h, w // 2 + 1] under a fixed magnitude."""

    learning_rate: float = PHASE_LEARNING_RATE

    def __init__(self, shape: tuple[int, ...], magnitude: Float[Tensor, "channel height half"]) -> None:
        channels, height, width = shape
        if tuple(magnitude.shape) != (channels, height, width // 2 + 1):
            raise ConfigError(
                f"magnitude got shape {list(magnitude.shape)}; allowed: {[channels, height, width // 2 + 1]}"
            )
        self.magnitude, self.size = magnitude.to(torch.float32), (height, width)

    def start(self, seed: int, place: int) -> Tensor:
        # A normal, scaled to many turns, is a uniform phase.
        noise = normal(seed, place, 0, STREAM_ACTMAX, shape=tuple(self.magnitude.shape))
        return torch.from_numpy(np.remainder(100 * noise, 2 * np.pi)).to(torch.float32)

    def __call__(self, spectrum: Tensor) -> Tensor:
        return torch.tanh(
            torch.fft.irfft2(torch.polar(self.magnitude.expand_as(spectrum), spectrum), s=self.size, norm="ortho")
        )


def _moved(x0: Tensor, seed: int, first: int, *, step: int) -> Tensor:
    """Each picture shifted, scaled and turned a little by its own random numbers; mid-grey comes in at the edges."""
    index = np.arange(first, first + len(x0), dtype=np.uint64)
    u = 2 * uniform(philox((0, step, STREAM_ACTMAX, index), seed_key(seed))) - 1  # [4, num] in (-1, 1)
    # Grid coordinates run from -1 to 1 over a side, so a share of the side counts double.
    shift_x, shift_y, scale, turn = 2 * SHIFT * u[0], 2 * SHIFT * u[1], 1 + SCALE * u[2], np.deg2rad(TURN_DEG) * u[3]
    rows = [
        [scale * np.cos(turn), -scale * np.sin(turn), shift_x],
        [scale * np.sin(turn), scale * np.cos(turn), shift_y],
    ]
    matrix = torch.from_numpy(np.array(rows)).permute(2, 0, 1).to(x0.dtype)  # [num, 2, 3]
    grid = F.affine_grid(matrix, list(x0.shape), align_corners=False)
    return F.grid_sample(x0, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _activation(feature: Feature, x0: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([feature.activation(part) for part in x0.split(BATCH)])


def _mean_activation(feature: Feature, x0: Tensor) -> float:
    """Mean over the pictures whose activation is finite."""
    activation = _activation(feature, x0)
    finite = torch.isfinite(activation)
    if not finite.any():
        raise NonFiniteError("activation maximisation: no picture has a finite activation; check the feature")
    return float(activation[finite].mean())


def _between(feature: Feature, paint: _Painter, before: Tensor, after: Tensor, target_mean: float) -> Tensor:
    """The point of the last step, to 1/256 of it, whose mean activation reaches the target: a step may overshoot it far."""
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        if _mean_activation(feature, paint(torch.lerp(before, after, middle))) < target_mean:
            low = middle
        else:
            high = middle
    return torch.lerp(before, after, high)
