"""A step from exported graphs: the same protocol as the reference, each method one call of a graph by name.

Knows what a graph takes and returns, in which order; whether onnxruntime, OpenVINO or another engine runs it is `run`'s affair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.prior.network import NetworkDenoiser
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.conditioning import CONDITIONING, conditioning
from tiltscope.engine.runtime.function_parts import denoiser_of, function_readout, trunk_of
from tiltscope.engine.runtime.step import Pullback, StepOutput

READOUT = tuple(f"readout_{each.name}" for each in fields(Readout))
# What each graph takes and gives, in this order; the first of each is the batch of pictures.
INPUTS: dict[str, tuple[str, ...]] = {
    "unguided": ("x", *CONDITIONING),
    "guided": ("x", *CONDITIONING, *READOUT),
    "measure": ("x", *READOUT),
    "gradient": ("x", *READOUT),
    "pullback": ("x", *CONDITIONING, "v"),
}
OUTPUTS: dict[str, tuple[str, ...]] = {
    "unguided": ("x0_hat",),
    "guided": ("x0_hat", "activation", "drive", "grad_a"),
    "measure": ("activation", "drive"),
    "gradient": ("activation", "drive", "grad_a"),
    "pullback": ("pulled",),
}
# The largest batch that files with a symbolic batch are asked for; engines with profiles say their own.
MAX_BATCH = 1024
# Sums of up to so many features share a file; the rest of the rows has weight 0.
LEAST_ROWS = 4

RunGraph = Callable[[str, Sequence[Tensor]], list[Tensor]]
Engine = Callable[[dict[str, NDArray[Any]]], Sequence[NDArray[Any]]]


def padded_rows(num_rows: int) -> int:
    """Rows that a graph is built for: LEAST_ROWS, or the next power of two."""
    return max(LEAST_ROWS, 1 << (num_rows - 1).bit_length())


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in dtype, where it holds numbers; a mask stays one."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def readout_inputs(readout: Readout, num: int) -> list[Tensor]:
    """The six tensors of a readout for `num` samples, padded to the rows its graph has."""
    padded = readout.expand(num).pad(padded_rows(readout.num_rows))
    return [getattr(padded, each.name).contiguous() for each in fields(Readout)]


def network_parts(prior: Prior, feature: Feature, runner: str) -> tuple[NetworkDenoiser, Trunk, Readout]:
    """What an exporter can trace, a user's own functions included (function_parts.py). Raises RunnerError as that does."""
    return denoiser_of(prior, runner), *trunk_of(prior, feature)


@dataclass(frozen=True)
class ExportedStep:
    """`run(graph, inputs)` behind the step's protocol.

    dtype: of the graphs' inputs and outputs, None where it is the caller's own; the caller's dtype is what comes back.
    max_batch: the largest batch that the graphs were built for. A larger one is a RunnerError.
    """

    name: str
    denoiser: NetworkDenoiser
    call: RunGraph
    dtype: torch.dtype | None = None
    max_batch: int = MAX_BATCH

    @property
    def has_own_threads(self) -> bool:
        """Whether its engine computes on threads that are not torch's."""
        return isinstance(self.call, GraphFiles)

    def run(self, graph: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """One graph, inputs and outputs cast. Raises RunnerError for a batch beyond max_batch."""
        given, dtype = inputs[0].dtype, self.dtype or inputs[0].dtype
        if len(inputs[0]) > self.max_batch:
            raise RunnerError(
                f"runner {self.name}: got a batch of {len(inputs[0])}, its files were built for 1 to {self.max_batch}; "
                f"give --batch-size {self.max_batch} or less"
            )
        outputs = self.call(graph, [cast(each, dtype) for each in inputs])
        return [each.to(given) for each in outputs]

    def unguided(
        self, x: Float[Tensor, "batch ..."], sigma: Float64[Tensor, "batch"], alpha: Float64[Tensor, "batch"]
    ) -> Float[Tensor, "batch ..."]:
        return self.run("unguided", [x, *conditioning(self.denoiser, sigma, x.dtype)])[0]

    def guided(
        self,
        x: Float[Tensor, "batch ..."],
        sigma: Float64[Tensor, "batch"],
        alpha: Float64[Tensor, "batch"],
        readout: Readout | None,
    ) -> StepOutput:
        level = conditioning(self.denoiser, sigma, x.dtype)
        return StepOutput(*self.run("guided", [x, *level, *self._readout(readout, x)]))

    def measure(self, x0: Float[Tensor, "batch ..."], readout: Readout | None) -> tuple[Tensor, Tensor]:
        activation, drive = self.run("measure", [x0, *self._readout(readout, x0)])
        return activation, drive

    def linearise(
        self, x: Float[Tensor, "batch ..."], sigma: Float64[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch ..."], Pullback]:
        level = conditioning(self.denoiser, sigma, x.dtype)
        return self.run("unguided", [x, *level])[0], lambda v: self.run("pullback", [x, *level, v])[0]

    def gradient(
        self, x0: Float[Tensor, "batch ..."], readout: Readout | None
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"], Float[Tensor, "batch ..."]]:
        activation, drive, grad = self.run("gradient", [x0, *self._readout(readout, x0)])
        return activation, drive, grad

    def _readout(self, readout: Readout | None, x: Tensor) -> list[Tensor]:
        # A function of one's own has none: its trunk's one token is what is read.
        return readout_inputs(function_readout() if readout is None else readout, len(x))


class GraphFiles:
    """FOLDER/<graph>.onnx as a RunGraph: `open_graph` makes of a file, at its first call, what maps named arrays to arrays."""

    def __init__(self, folder: Path, open_graph: Callable[[Path], Engine]) -> None:
        self._folder, self._open = folder, open_graph
        self._opened: dict[str, Engine] = {}

    def __call__(self, graph: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Raises RunnerError where the engine gives another number of outputs than the graph has."""
        if graph not in self._opened:
            self._opened[graph] = self._open(self._folder / f"{graph}.onnx")
        given = {name: tensor.detach().contiguous().numpy() for name, tensor in zip(INPUTS[graph], inputs, strict=True)}
        outputs = self._opened[graph](given)
        if len(outputs) != len(OUTPUTS[graph]):
            raise RunnerError(f"graph {graph} gave {len(outputs)} outputs, expected {', '.join(OUTPUTS[graph])}")
        return [torch.from_numpy(each) for each in outputs]


def needed(module: str, runner: str) -> Any:
    """A module that an extra brings. Raises RunnerError naming the extra where it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        extra = runner.replace("_", "-")
        raise RunnerError(
            f"runner {runner} needs {module}, which is not installed: pip install 'tiltscope[{extra}]'"
        ) from error
