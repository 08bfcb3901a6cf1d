"""A step whose every graph is held to the artefact's self-test before its first use.

A run needs one or two of a step's graphs, and opening one takes an engine a second or so. `guided`, which holds both networks
and the gradient, is proved when the step is loaded; each other graph when a method first needs it, before anything of it is used:

    unguided   D                                         of the stored x at every level
    measure    activation, drive                         of the reference's D
    gradient   activation, drive, d drive / d D          likewise
    pullback   (dD/dx)' (d drive / d D), that is grad_a  of the stored x at every level

Knows steps and self-tests; knows no engine.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.runtime.gate import SelfTest, graph_errors
from tiltscope.engine.runtime.step import Pullback, Step, StepOutput

AT_LOAD = "guided"
GRAPHS = ("guided", "unguided", "measure", "gradient", "pullback")


class HeldStep:
    """`step`, with `judge(graph, errors)` asked about each graph before its first use; what judge raises, the call raises."""

    def __init__(
        self, step: Step, test: SelfTest, dtype: torch.dtype, judge: Callable[[str, dict[str, float]], None]
    ) -> None:
        self._step, self._test, self._dtype, self._judge = step, test, dtype, judge
        self._held: set[str] = set()

    @property
    def name(self) -> str:
        return self._step.name

    @property
    def has_own_threads(self) -> bool:
        return self._step.has_own_threads

    def hold(self, *graphs: str) -> None:
        """Each of these graphs compared with the stored outputs, those excepted that were. A refused one is compared again."""
        for graph in graphs:
            if graph not in self._held:
                self._judge(graph, graph_errors(self._step, graph, self._test, self._dtype))
                self._held.add(graph)

    def unguided(
        self, x: Float[Tensor, "batch ..."], sigma: Float64[Tensor, "batch"], alpha: Float64[Tensor, "batch"]
    ) -> Float[Tensor, "batch ..."]:
        self.hold("unguided")
        return self._step.unguided(x, sigma, alpha)

    def guided(
        self,
        x: Float[Tensor, "batch ..."],
        sigma: Float64[Tensor, "batch"],
        alpha: Float64[Tensor, "batch"],
        readout: Readout | None,
    ) -> StepOutput:
        self.hold("guided")
        return self._step.guided(x, sigma, alpha, readout)

    def measure(self, x0: Float[Tensor, "batch ..."], readout: Readout | None) -> tuple[Tensor, Tensor]:
        self.hold("measure")
        return self._step.measure(x0, readout)

    def linearise(
        self, x: Float[Tensor, "batch ..."], sigma: Float64[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch ..."], Pullback]:
        self.hold("unguided", "pullback")
        return self._step.linearise(x, sigma)

    def gradient(
        self, x0: Float[Tensor, "batch ..."], readout: Readout | None
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch ..."]]:
        self.hold("gradient")
        return self._step.gradient(x0, readout)
