"""A step's graphs, one after the other, with the inputs they were traced on: what every exporter begins with.

Knows traces; knows no file format.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tiltscope.engine.errors import ExportError, RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.conditioning import conditioning
from tiltscope.engine.runtime.exported import cast, network_parts, readout_inputs
from tiltscope.export.trace import StepGraph, StepNetworks, trace

_EXAMPLE_BATCH = 2


class Traced(NamedTuple):
    """A graph of the step: its name (INPUTS, OUTPUTS of engine/runtime/exported.py), the program, inputs at a batch of 2."""

    name: str
    graph: StepGraph
    example: list[Tensor]


def examples(prior: Prior, feature: Feature) -> dict[str, list[Tensor]]:
    """Inputs of every graph at a batch of 2, in the network's dtype: what a trace sees of shapes."""
    denoiser, _, one = network_parts(prior, feature, "onnx")
    dtype = denoiser.dtype
    x = torch.linspace(-1, 1, _EXAMPLE_BATCH * int(torch.Size(prior.shape).numel()), dtype=torch.float32).to(dtype)
    x = x.reshape(_EXAMPLE_BATCH, *prior.shape)
    level = conditioning(denoiser, torch.tensor([0.4, 0.8], dtype=torch.float64), dtype)
    readout = [cast(each, dtype) for each in readout_inputs(one, _EXAMPLE_BATCH)]
    return {
        "unguided": [x, *level],
        "guided": [x, *level, *readout],
        "measure": [x, *readout],
        "gradient": [x, *readout],
        "pullback": [x, *level, x.flip(0)],
    }


def traced_graphs(prior: Prior, feature: Feature, runner: str, *, coarse: bool = False) -> Iterator[Traced]:
    """Every graph of the step, as trace() makes it.

    Raises RunnerError for a Python function, ExportError as trace() does, or for a leaking cache.
    """
    denoiser, trunk, _ = network_parts(prior, feature, runner)
    if denoiser.dtype != trunk.dtype:
        raise RunnerError(
            f"runner {runner}: a function of one's own is exported in float32, and the other part is {denoiser.dtype} or "
            f"{trunk.dtype}; give dtype float32"
        )
    networks = StepNetworks(denoiser, trunk)
    for name, example in examples(prior, feature).items():
        yield Traced(name, trace(networks, name, example, coarse=coarse), example)
        check_no_leak(networks, name, example)


def check_no_leak(networks: StepNetworks, graph: str, example: list[Tensor]) -> None:
    """Raises ExportError where the eager networks give no plain tensors after a trace: something kept one of the trace's.

    transformers' lru_cache of DINOv3's patch coordinates does; the reference would compute on fake numbers from then on.
    """
    try:
        outputs = getattr(networks, graph)(*example)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ExportError(f"graph {graph}: after its trace the networks no longer run ({error}); {_LEAK}") from error
    strange = sorted({type(each).__name__ for each in outputs if type(each) is not Tensor})
    if strange:
        raise ExportError(f"graph {graph}: after its trace the networks give {', '.join(strange)}; {_LEAK}")


_LEAK = "a cache inside them kept a tensor of the trace; call what it wraps (functools: __wrapped__) instead"
