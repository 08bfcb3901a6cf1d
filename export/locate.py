"""Where an error enters: the step's guided graph with every module's output, and its gradient there, as outputs of their own.

    forward   first module, in the order they run, whose output is not float64 eager's
    backward  first module, in the reverse order, at whose output d drive / d output is not

The graph is traced, exported and run by the same engine as the one that failed. Knows modules and steps; knows no file format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.feature.readout import Readout, read
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.conditioning import CONDITIONING, conditioning
from tiltscope.engine.runtime.exported import cast, network_parts, readout_inputs
from tiltscope.engine.runtime.gate import LEVELS, LIMITS, relative_error, smoothed
from tiltscope.engine.sampler.noise import normal
from tiltscope.export.graphs import examples
from tiltscope.export.trace import StepGraph, StepNetworks, trace

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
# Writes and opens one graph: the program, its example inputs, names of its outputs.
Open = Callable[[StepGraph, list[Tensor], list[str]], Run]


class TappedNetworks(StepNetworks):
    """A step's networks; `tapped` is `guided` with what every module with parameters of its own gives, and the gradient there.

    names: of the modules, in the order in which they ran, filled by a run.
    """

    names: list[str]

    def tapped(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """(output of each module ..., d drive / d output of each ..., d drive / d x)."""
        seen: list[tuple[str, Tensor]] = []

        def watch(name: str) -> Callable[[nn.Module, object, object], None]:
            return lambda _module, _given, output: seen.append((name, output)) if isinstance(output, Tensor) else None

        owners = [
            (name, module)
            for name, module in self.named_modules()
            if name and any(True for _ in module.parameters(recurse=False))
        ]
        hooks = [module.register_forward_hook(watch(name)) for name, module in owners]
        try:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                x0_hat = self.denoise(x, *rest[: len(CONDITIONING)])
                _, drive = read(self.trunk(x0_hat), Readout(*rest[len(CONDITIONING) :]))
                kept = [(name, output) for name, output in seen if output.requires_grad]
                # allow_unused leaves None where nothing flows, which torch's own types do not say.
                grads: Any = torch.autograd.grad(drive.sum(), [*(output for _, output in kept), x], allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        self.names = [name for name, _ in kept]
        outputs = [output.detach() for _, output in kept]
        return (
            *outputs,
            *(torch.zeros_like(at) if g is None else g for g, at in zip(grads, [*outputs, x], strict=True)),
        )


@dataclass(frozen=True, kw_only=True)
class Tapped:
    """The tapped graph of a step, the inputs to try it on, and what float64 eager makes of them. names: of its outputs."""

    graph: StepGraph
    example: list[Tensor]
    given: list[Tensor]
    expected: tuple[Tensor, ...]
    modules: list[str]

    @property
    def names(self) -> list[str]:
        at = range(len(self.modules))
        return [*(f"output_{each}" for each in at), *(f"grad_{each}" for each in at), "grad_x"]


def tap(prior: Prior, feature: Feature, dtype: torch.dtype, files: torch.dtype) -> Tapped:
    """The step's networks cast to `files` and traced with all their taps; the reference keeps the weights that were loaded.

    dtype: what the engine computes in, which decides how the gate reads.
    """
    denoiser, _, readout = network_parts(prior, feature, "the gate")
    num = len(LEVELS)
    x = torch.stack([torch.from_numpy(normal(0, at, 0, 0, shape=prior.shape)) for at in range(num)])
    level = conditioning(denoiser, torch.tensor(LEVELS, dtype=torch.float64), torch.float64)
    given = [x, *level, *readout_inputs(smoothed(readout, dtype) or readout, num)]

    exact, exact_trunk, _ = network_parts(prior.to(torch.float64), feature.to(torch.float64), "the gate")
    reference = TappedNetworks(exact, exact_trunk)
    expected = reference.tapped(*(cast(each, torch.float64) for each in given))

    cast_prior, cast_feature = prior.to(files), feature.to(files)
    denoiser, trunk, _ = network_parts(cast_prior, cast_feature, "the gate")
    example = examples(cast_prior, cast_feature)["guided"]
    graph = trace(TappedNetworks(denoiser, trunk), "tapped", example)
    return Tapped(
        graph=graph,
        example=example,
        given=[cast(each, files) for each in given],
        expected=expected,
        modules=reference.names,
    )


def locate(
    prior: Prior, feature: Feature, dtype: torch.dtype, open_graph: Open, *, files: torch.dtype | None = None
) -> str:
    """One sentence: the first module that deviates from float64 eager when `open_graph`'s engine runs the step built anew.

    files: what the graph is traced in, where that is not dtype.
    """
    tapped = tap(prior, feature, dtype, files or dtype)
    run = open_graph(tapped.graph, tapped.example, tapped.names)
    return verdict(tapped.modules, run(tapped.given), tapped.expected, LIMITS[dtype].error)


def verdict(modules: Sequence[str], got: Sequence[Tensor], expected: Sequence[Tensor], allowed: float) -> str:
    """The sentence, from what `tapped` gave twice: by the engine, and by float64 eager."""
    errors = [relative_error(one, other) for one, other in zip(got, expected, strict=True)]
    num = len(modules)
    for at in range(num):
        if not errors[at] <= allowed:
            return f"the error enters in the forward pass of {modules[at]} (module {at + 1} of {num}), {errors[at]:.1e} there"
    # backward[k] is the gradient at module k's output; the last is that at x, before the first module.
    backward = [*range(2 * num - 1, num - 1, -1), 2 * num]
    places = [*reversed(modules), "x"]
    for at, (index, place) in enumerate(zip(backward, places, strict=True)):
        if not errors[index] <= allowed:
            after = places[at - 1] if at else "the readout"
            return f"the error enters in the backward pass between {after} and {place}, {errors[index]:.1e} there"
    return (
        f"built anew, the same engine is right at all {num} modules (at most {max(errors):.1e}): the stored files are not "
        "of these networks, or not what was built"
    )
