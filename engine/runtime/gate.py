"""The gate: a step is trusted only after it reproduced stored outputs, here, on this machine, at this load.

A SelfTest is inputs at several noise levels with the reference's outputs in float64. An artefact folder keeps it beside the
model file; a bundle keeps one for the eager runner, so a library that changed its numerics is noticed too.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltscope.engine.errors import ParityError
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.runtime.step import Step, StepOutput
from tiltscope.engine.sampler.noise import normal

# Largest error relative to the output's own largest value. float32: rounding through about 60 layers and back, measured
# 1e-6 to 1e-5 between kernels and batch shapes; a wrong graph is off by 1e-2 and more. float64: the same, in double.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
LEVELS = (0.05, 0.4, 0.8, 0.99, 0.99999)


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """Inputs of the step graph and what the float64 reference makes of them."""

    x: Float64[Tensor, "batch ..."]
    sigma: Float64[Tensor, "batch"]
    readout: Readout | None
    expected: StepOutput

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        tensors = {"x": self.x, "sigma": self.sigma} | {f"expected.{k}": v for k, v in self.expected._asdict().items()}
        if self.readout is not None:
            tensors |= {f"readout.{each.name}": getattr(self.readout, each.name) for each in fields(self.readout)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

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
        )


def record_self_test(step64: Step, shape: tuple[int, ...], readout: Readout | None) -> SelfTest:
    """Run a float64 reference step at every level of LEVELS on the generator's own noise."""
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    x = torch.stack([torch.from_numpy(normal(0, at, 0, 0, shape=shape)) for at in range(len(LEVELS))])
    many = None if readout is None else readout.expand(len(LEVELS)).to(torch.float64)
    return SelfTest(x=x, sigma=sigma, readout=many, expected=step64.guided(x, sigma, _alpha(sigma), many))


def relative_errors(step: Step, test: SelfTest, dtype: torch.dtype) -> dict[str, float]:
    """Largest error of each output, relative to the largest expected value of that output in the same sample's batch."""
    readout = None if test.readout is None else test.readout.to(dtype)
    got = step.guided(test.x.to(dtype), test.sigma, _alpha(test.sigma), readout)
    return {name: relative_error(getattr(got, name), getattr(test.expected, name)) for name in StepOutput._fields}


def check_step(step: Step, test: SelfTest, dtype: torch.dtype) -> dict[str, float]:
    """The errors, all within TOLERANCE. Raises ParityError naming the outputs that are not."""
    errors = relative_errors(step, test, dtype)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if wrong:
        listed = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        raise ParityError(
            f"runner {step.name}: relative error of {listed}, allowed {TOLERANCE[dtype]:.0e}; its step does not reproduce the "
            "reference on this machine: rebuild it, or use --runner torch"
        )
    return errors


def _alpha(sigma: Float64[Tensor, "batch"]) -> Float64[Tensor, "batch"]:
    return torch.sqrt((1 - sigma) * (1 + sigma))


def relative_error(got: Float[Tensor, "..."], expected: Float64[Tensor, "..."]) -> float:
    # Where the feature is silent everywhere the expected value is 0: the error is then absolute.
    scale = expected.abs().max().clamp(min=1e-12) if bool(expected.any()) else torch.ones(())
    return float((got.double() - expected).abs().max() / scale)
