"""The step graph: the pure tensor function that every row runs, and its reference in eager torch.

    step_graph(x, sigma, alpha, readout) -> D, activation, drive, grad_a
      D                 = prior.denoise(x, sigma)                     E[x0 | x]
      activation, drive = readout(trunk(preprocess(D)))               or a custom feature's own function of D
      grad_a            = d/dx sum_batch drive                        per sample, never averaged over the batch

The strength w = lambda phi'(drive) stays outside: no lambda, cap or log-tilt is ever part of a graph. It knows nothing of
rows, plans or seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.feature.readout import Readout, read
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.threads import one_thread
from tiltscope.kernels.implementation import Implementation

Pullback = Callable[[Tensor], Tensor]


class StepOutput(NamedTuple):
    """The step graph's outputs; activation defines q*, drive is what guidance differentiates."""

    x0_hat: Float[Tensor, "batch ..."]
    activation: Float[Tensor, "batch"]
    drive: Float[Tensor, "batch"]
    grad_a: Float[Tensor, "batch ..."]


@runtime_checkable
class Step(Protocol):
    """What a runner provides: the two graphs of a row, and the feature's reading of a finished picture.

    `readout` is a batch of readouts, one a slot, or None where the feature is a function of its own. `linearise` and `gradient`
    are the guided graph in two halves, for the lifts that work in between. has_own_threads: whether its networks compute on
    threads that are not torch's (threads.py).
    """

    @property
    def name(self) -> str: ...

    @property
    def has_own_threads(self) -> bool: ...

    def unguided(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor: ...

    def guided(self, x: Tensor, sigma: Tensor, alpha: Tensor, readout: Readout | None) -> StepOutput: ...

    def measure(self, x0: Tensor, readout: Readout | None) -> tuple[Tensor, Tensor]: ...

    def linearise(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Pullback]: ...

    def gradient(self, x0: Tensor, readout: Readout | None) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class TorchStep:
    """The reference runner: autograd in eager torch. Every other runner is held to its numbers.

    kernels: which implementation of the ops runs before and behind the trunk (preprocess, sae_rows, readout).
    """

    prior: Prior
    feature: Feature
    name: str = "torch"
    kernels: Implementation = "reference"

    @property
    def has_own_threads(self) -> bool:
        return False

    @property
    def guided_tells_unguided(self) -> bool:
        """Whether D of `guided` is D of `unguided` bit for bit: the same eager operators, of a network that this engine loaded.

        Shown on a CPU alone. A function of one's own may go another way where a gradient is wanted; an exported graph is fused
        in another way.
        """
        return self.prior.network is not None and self.prior.network.device.type == "cpu"

    def denoise(self, x: Float[Tensor, "batch ..."], sigma: Float64[Tensor, "batch"]) -> Float[Tensor, "batch ..."]:
        """D, as every method here computes it."""
        return self.prior.denoise(x, sigma)

    def unguided(
        self, x: Float[Tensor, "batch ..."], sigma: Float64[Tensor, "batch"], alpha: Float64[Tensor, "batch"]
    ) -> Float[Tensor, "batch ..."]:
        """D = E[x0 | x], without the trunk and without a gradient."""
        with torch.no_grad():
            return self.denoise(x, sigma)

    def guided(
        self,
        x: Float[Tensor, "batch ..."],
        sigma: Float64[Tensor, "batch"],
        alpha: Float64[Tensor, "batch"],
        readout: Readout | None,
    ) -> StepOutput:
        """D, activation, drive and one vector-Jacobian product with cotangent 1 for each sample."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0_hat = self.denoise(x, sigma)
            activation, drive = self._read(x0_hat, readout)
            (grad_a,) = torch.autograd.grad(drive.sum(), x)
        return StepOutput(x0_hat.detach(), activation.detach(), drive.detach(), grad_a)

    def measure(self, x0: Float[Tensor, "batch ..."], readout: Readout | None) -> tuple[Tensor, Tensor]:
        """(activation, drive) of finished pictures."""
        with torch.no_grad():
            return self._read(x0, readout)

    def linearise(
        self, x: Float[Tensor, "batch ..."], sigma: Float64[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch ..."], Pullback]:
        """D, and v -> (dD/dx)' v: one vector-Jacobian product through the denoiser, once."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0_hat = self.denoise(x, sigma)
        return x0_hat.detach(), lambda v: torch.autograd.grad(x0_hat, x, v)[0]

    def gradient(
        self, x0: Float[Tensor, "batch ..."], readout: Readout | None
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch ..."]]:
        """(activation, drive, d drive / dx0) of pictures: one vector-Jacobian product through the trunk alone."""
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            activation, drive = self._read(x0, readout)
            (grad,) = torch.autograd.grad(drive.sum(), x0)
        return activation.detach(), drive.detach(), grad

    def _read(self, x0: Tensor, readout: Readout | None) -> tuple[Tensor, Tensor]:
        if readout is None or self.feature.trunk is None:
            return self.feature.activation_and_drive(x0, kernels=self.kernels)
        return read(self.feature.trunk(x0, kernels=self.kernels), readout, kernels=self.kernels)


@dataclass(frozen=True)
class ListeningStep(TorchStep):
    """The reference runner that also keeps what the network says of the noise, whichever method called it. For one tick's calls.

    Where a network has learned it, the variance is the other half of the very output that D is made of: nothing runs twice.
    """

    said: list[Tensor] = field(default_factory=list[Tensor])

    @staticmethod
    def to(step: Step) -> "ListeningStep":
        """One that computes as `step` does. Raises ConfigError where that keeps no second output, or its network has none."""
        if not isinstance(step, TorchStep):
            raise ConfigError(
                f"solver: got ddpm_learned_range with {type(step).__name__} of runner {step.name}; exported graphs and chunks of "
                "a gradient do not hold the learned variance: give runner torch without vjp_chunk, or solver ddpm"
            )
        if step.prior.network is None or not step.prior.network.learned_range:
            raise ConfigError(
                f"solver: got ddpm_learned_range, but prior {step.prior.name} has learned no variance; "
                "give ddpm or ddpm_fixed_large"
            )
        return ListeningStep(step.prior, step.feature, step.name, step.kernels)

    def denoise(self, x: Float[Tensor, "batch ..."], sigma: Float64[Tensor, "batch"]) -> Float[Tensor, "batch ..."]:
        network = self.prior.network
        assert network is not None  # `to` has looked
        x0_hat, v = network.with_variance(x, sigma)
        self.said.append(v.detach())
        return x0_hat


def guided_as_in_a_tick(step: Step, x: Tensor, sigma: Tensor, alpha: Tensor, readout: Readout | None) -> StepOutput:
    """`step.guided` on the threads that it has while it draws: what a timing of it must time."""
    with one_thread(when=step.has_own_threads):
        return step.guided(x, sigma, alpha, readout)


def heard(step: Step, otherwise: Float[Tensor, "batch ..."] | None) -> Float[Tensor, "batch ..."] | None:
    """What a listening step's network said last; `otherwise` where nobody listens."""
    return step.said[-1] if isinstance(step, ListeningStep) else otherwise
