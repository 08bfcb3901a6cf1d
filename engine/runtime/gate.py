"""The gate: a step is trusted only after it reproduced stored outputs, here, on this machine, at this load.

A SelfTest is inputs at several noise levels with the reference's outputs in float64. An artefact folder keeps it beside the
model file; a bundle keeps one for the eager runner, so a library that changed its numerics is noticed too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltscope.engine.errors import ParityError
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.runtime.step import Step, StepOutput
from tiltscope.engine.sampler.noise import normal


class Limits(NamedTuple):
    """What a step in a dtype may be off by: the largest error of an output relative to that output's own largest value over the
    batch, and the least cosine between its gradient and the float64 reference's, sample by sample.

    smooth: read with the maximum's share of a pooling given to the mean. Where two places of a picture tie, rounding decides
    which of them the maximum takes, and the gradient is that place's: seen in bfloat16, .4 off at one level, the graph right.
    """

    error: float
    cosine: float
    smooth: bool


# Measured (eager torch, all LEVELS, smooth where it says so) with room for another kernel's summation order. A wrong graph (a
# lost layer, a swapped axis, another network's weights) is off by 1e-2 and more, its cosine .99 and less.
LIMITS: dict[torch.dtype, Limits] = {
    torch.float64: Limits(1e-11, 1 - 1e-12, False),  # 1e-12: rounding through about 60 layers and back
    torch.float32: Limits(1e-4, 1 - 1e-6, False),  # 1e-6 to 1e-5: the same; ten times that
    # emoji64: 2e-2 and 4.9e-5, twice and four times that. Its range, not its grain, is the danger: a NaN passes no limit.
    torch.float16: Limits(4e-2, 1 - 2e-4, True),
    # emoji64: 1e-1 and 3.3e-3, twice that; of float16's five and 8^2 times, as 2^-8 to 2^-11. It cannot tell smaller faults from
    # its own rounding: prove the graph in float32 first, it is the same.
    torch.bfloat16: Limits(2e-1, 1 - 7e-3, True),
}
LEVELS = (0.05, 0.4, 0.8, 0.99, 0.99999)


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """Inputs of the step graph and what the float64 reference makes of them."""

    x: Float64[Tensor, "batch ..."]
    sigma: Float64[Tensor, "batch"]
    readout: Readout | None
    expected: StepOutput
    # d drive / d D at the reference's D: what the graphs `gradient` and `pullback` are held to, each alone.
    grad_x0: Float64[Tensor, "batch ..."]

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {"x": self.x, "sigma": self.sigma, "grad_x0": self.grad_x0}
        tensors |= {f"expected.{k}": v for k, v in self.expected._asdict().items()}
        if self.readout is not None:
            tensors |= {f"readout.{each.name}": getattr(self.readout, each.name) for each in fields(self.readout)}
        # Cloned: of a function the drive is the activation itself, and the format holds no memory twice.
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> "SelfTest":
        """Read what `save` wrote."""
        tensors = load_file(path)
        parts = {name[len("readout.") :]: value for name, value in tensors.items() if name.startswith("readout.")}
        return cls(
            x=tensors["x"],
            sigma=tensors["sigma"],
            readout=Readout(**parts) if parts else None,
            expected=StepOutput(**{name: tensors[f"expected.{name}"] for name in StepOutput._fields}),
            grad_x0=tensors["grad_x0"],
        )


def record_self_test(step64: Step, shape: tuple[int, ...], readout: Readout | None) -> SelfTest:
    """Run a float64 reference step at every level of LEVELS on the generator's own noise; a silent readout is woken first."""
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    x = torch.stack([torch.from_numpy(normal(0, at, 0, 0, shape=shape)) for at in range(len(LEVELS))])
    many = None if readout is None else readout.expand(len(LEVELS)).to(torch.float64)
    expected = step64.guided(x, sigma, _alpha(sigma), many)
    if many is not None and not bool(expected.activation.any()):
        many = woken(many, expected.drive)
        expected = step64.guided(x, sigma, _alpha(sigma), many)
    grad_x0 = step64.gradient(expected.x0_hat, many)[2]
    return SelfTest(x=x, sigma=sigma, readout=many, expected=expected, grad_x0=grad_x0)


def woken(readout: Readout, drive: Float64[Tensor, "batch"]) -> Readout:
    """The readout with its biases raised by the largest |drive| and thresholds of 0: about as many tokens above as below.

    On noise most features are silent; a step that gives 0 for every activation would pass. At 0 a latent has no jump, so that
    rounding cannot decide whether a token counts.
    """
    raised = drive.abs().max() / readout.weight.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return replace(readout, bias=readout.bias + raised, threshold=torch.zeros_like(readout.threshold))


def smoothed(readout: Readout | None, dtype: torch.dtype) -> Readout | None:
    """The readout that the gate reads with in dtype (Limits.smooth)."""
    if readout is None or not LIMITS[dtype].smooth:
        return readout
    largest, mean, lse = readout.pooling.unbind(-1)
    return replace(readout, pooling=torch.stack([torch.zeros_like(largest), mean + largest, lse], dim=-1))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a step whose networks compute in `dtype` is given, and gives: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def relative_errors(step: Step, test: SelfTest, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of each output, relative to the largest expected value of that output in the same sample's batch.

    turn: 1 - the least cosine between gradients of one sample: at a noise level where the gradient is small beside that of the
    others, a wrong one shows in its direction only.
    """
    wide = state_dtype(dtype)
    readout = None if test.readout is None else test.readout.to(wide)
    got = step.guided(test.x.to(wide), test.sigma, _alpha(test.sigma), readout)
    errors = {name: relative_error(getattr(got, name), getattr(test.expected, name)) for name in StepOutput._fields}
    return errors | {"turn": 1 - least_cosine(got.grad_a, test.expected.grad_a)}


def graph_errors(step: Step, graph: str, test: SelfTest, dtype: torch.dtype) -> dict[str, float]:
    """`relative_errors` of one of a step's graphs (engine/runtime/exported.py), of the outputs that it has.

    measure and gradient read the reference's D, pullback pulls the reference's d drive / d D back: no error of one is another's.
    """
    if graph == "guided":
        return relative_errors(step, test, dtype)
    wide = state_dtype(dtype)
    expected, x = test.expected, test.x.to(wide)
    readout = None if test.readout is None else test.readout.to(wide)
    if graph == "unguided":
        return {"x0_hat": relative_error(step.unguided(x, test.sigma, _alpha(test.sigma)), expected.x0_hat)}
    if graph == "pullback":
        return _gradient_errors(step.linearise(x, test.sigma)[1](test.grad_x0.to(wide)), expected.grad_a)
    x0 = expected.x0_hat.to(wide)
    gradients: dict[str, float] = {}
    if graph == "gradient":
        activation, drive, grad = step.gradient(x0, readout)
        gradients = _gradient_errors(grad, test.grad_x0)
    else:
        activation, drive = step.measure(x0, readout)
    values = {"activation": activation, "drive": drive}
    return {name: relative_error(got, getattr(expected, name)) for name, got in values.items()} | gradients


def _gradient_errors(got: Float[Tensor, "batch ..."], expected: Float64[Tensor, "batch ..."]) -> dict[str, float]:
    return {"grad_a": relative_error(got, expected), "turn": 1 - least_cosine(got, expected)}


def check_step(step: Step, test: SelfTest, dtype: torch.dtype) -> dict[str, float]:
    """The errors, all within LIMITS. Raises ParityError naming the outputs that are not."""
    errors = relative_errors(step, test, dtype)
    check_errors(errors, dtype, step.name)
    return errors


def check_errors(errors: Mapping[str, float], dtype: torch.dtype, runner: str, graph: str = "guided") -> None:
    """Raises ParityError naming the outputs of a graph that are beyond their limit."""
    limits = LIMITS[dtype]
    allowed = dict.fromkeys(StepOutput._fields, limits.error) | {"turn": 1 - limits.cosine}
    wrong = {name: error for name, error in errors.items() if not error <= allowed[name]}
    if wrong:
        listed = ", ".join(f"{name} {error:.1e} (allowed {allowed[name]:.0e})" for name, error in wrong.items())
        raise ParityError(
            f"runner {runner}: graph {graph}: relative error of {listed}; its step does not reproduce the reference on this "
            "machine: rebuild it, or use --runner torch"
        )


def least_cosine(got: Float[Tensor, "batch ..."], expected: Float[Tensor, "batch ..."]) -> float:
    """The smallest over the batch; 1 where both gradients are zero, 0 where one is."""
    one, other = got.double().flatten(1), expected.double().flatten(1)
    product = one.norm(dim=1) * other.norm(dim=1)
    both_zero = (one == 0).all(1) & (other == 0).all(1)
    cosine = (one * other).sum(1) / torch.where(product > 0, product, 1.0)
    return float(torch.where(both_zero, 1.0, cosine).min())


def _alpha(sigma: Float64[Tensor, "batch"]) -> Float64[Tensor, "batch"]:
    return torch.sqrt((1 - sigma) * (1 + sigma))


def relative_error(got: Float[Tensor, "..."], expected: Float64[Tensor, "..."]) -> float:
    # Where the feature is silent everywhere the expected value is 0: the error is then absolute.
    scale = expected.abs().max().clamp(min=1e-12) if bool(expected.any()) else torch.ones(())
    return float((got.double() - expected).abs().max() / scale)
