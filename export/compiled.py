"""The runner `compile`: the step's traced graphs, each compiled whole by torch's Inductor, ahead of time, for any batch.

    FOLDER/<graph>.pt2       machine code for this processor and the weights; engine/runtime/compiled_step.py runs it

torch.compile itself compiles at the first call of every process, and again for shapes it has not met (a batch of one is always
another program). Here the graph, gradient included, is traced once, the batch is a symbol from 1 to MAX_BATCH, and the result is
kept: no call ever compiles. Knows Inductor; knows no networks.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltscope.engine.errors import ExportError, RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.compiled_step import SUFFIX, CompiledGraphs
from tiltscope.engine.runtime.cpu import cpu_features
from tiltscope.engine.runtime.exported import MAX_BATCH, ExportedStep, network_parts
from tiltscope.engine.runtime.step import Step
from tiltscope.export.graphs import traced_graphs
from tiltscope.export.locate import Run, locate
from tiltscope.export.onnx import hushed
from tiltscope.export.trace import StepGraph

_SETTINGS: dict[str, Any] = {
    # As many threads as torch has when it runs, not when it was compiled.
    "cpp.dynamic_threads": True,
    # The code between the kernels runs once a call: a minute of optimising it is for nothing.
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


def compile_graph(graph: nn.Module, example: list[Tensor], path: Path) -> None:
    """One program for every batch from 1 to MAX_BATCH, at `path`. example: its inputs at a batch of 2.

    Raises RunnerError without a C++ compiler, ExportError where Inductor refuses the graph.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError

    check_compiler()
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    varargs = isinstance(graph, StepGraph)
    shapes: Any = tuple({0: batch} for _ in example)
    try:
        with hushed():
            program = torch.export.export(graph, tuple(example), dynamic_shapes=(shapes,) if varargs else shapes)
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=_SETTINGS)
    except InductorError as error:
        raise ExportError(f"{path.stem}: Inductor cannot compile this graph ({error})") from error


def check_compiler() -> None:
    """Raises RunnerError without a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RunnerError("runner compile needs a C++ compiler, and none was found: install g++, or set CXX") from error


class Compiled:
    """The exporter of the runner `compile`."""

    artefact = "compile"
    dtypes = ("float32", "float64")
    refused = dict.fromkeys(("float16", "bfloat16"), "on a CPU they are emulated, slower than float32 and less exact")
    max_batch = MAX_BATCH

    def facts(self) -> dict[str, Any]:
        """The processor that the code is for."""
        return {"cpu": cpu_features()}

    def build(self, prior: Prior, feature: Feature, dtype: torch.dtype, folder: Path) -> None:
        """Every graph of the step into `folder`: minutes each."""
        check_compiler()  # before the minutes of tracing
        for name, graph, example in traced_graphs(prior, feature, "compile"):
            compile_graph(graph, example, folder / f"{name}{SUFFIX}")

    def load(self, folder: Path, prior: Prior, feature: Feature, dtype: torch.dtype) -> Step:
        """The step from `folder`'s files."""
        denoiser, _, _ = network_parts(prior, feature, "compile")
        return ExportedStep("compile", denoiser, CompiledGraphs(folder), dtype, self.max_batch)

    def cannot_run(self) -> str | None:
        return None

    def locate(self, prior: Prior, feature: Feature, dtype: torch.dtype) -> str:
        """Where the traced graph deviates. What the compiler makes of it is not tried again: that takes minutes."""

        def run_traced(graph: StepGraph, example: list[Tensor], outputs: list[str]) -> Run:
            del example, outputs
            return lambda given: graph(*given)

        return f"traced anew and run without the compiler: {locate(prior, feature, dtype, run_traced)}"


exporter = Compiled()
