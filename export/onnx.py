"""ONNX files of a step's graphs: what ONNX Runtime, OpenVINO and TensorRT read.

    FOLDER/<graph>.onnx       opset OPSET, batch symbolic, weights inside; metadata: hook, dtype, rows, versions
    FOLDER/schedule.json      what noise levels decide, for an embedding without torch (engine/runtime/schedule.py)

Checked by onnx.checker before they are kept. Knows traced graphs and files; runs nothing.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import ExportError, RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime import onnx_step, openvino_step
from tiltscope.engine.runtime.conditioning import conditioning
from tiltscope.engine.runtime.exported import (
    INPUTS,
    OUTPUTS,
    Engine,
    ExportedStep,
    GraphFiles,
    needed,
    network_parts,
    padded_rows,
    readout_inputs,
)
from tiltscope.engine.runtime.schedule import Schedule
from tiltscope.engine.runtime.step import Step
from tiltscope.export.trace import StepGraph, StepNetworks, trace

# 20 is the exporter's own; bfloat16 convolutions need 22.
OPSET = {torch.float32: 20, torch.float16: 20, torch.bfloat16: 22}
MAX_BATCH = 4096
_EXAMPLE_BATCH = 2


def examples(prior: Prior, feature: Feature) -> dict[str, list[Tensor]]:
    """Inputs of every graph at a batch of 2, in the feature's dtype: what a trace sees of shapes."""
    denoiser, _, one = network_parts(prior, feature, "onnx")
    dtype = denoiser.dtype
    x = torch.linspace(-1, 1, _EXAMPLE_BATCH * int(torch.Size(prior.shape).numel()), dtype=dtype)
    x = x.reshape(_EXAMPLE_BATCH, *prior.shape)
    level = conditioning(denoiser, torch.tensor([0.4, 0.8], dtype=torch.float64), dtype)
    readout = readout_inputs(one, _EXAMPLE_BATCH)
    return {
        "unguided": [x, *level],
        "guided": [x, *level, *readout],
        "measure": [x, *readout],
        "gradient": [x, *readout],
        "pullback": [x, *level, x.flip(0)],
    }


def write_onnx(graph: StepGraph, name: str, example: list[Tensor], path: Path, metadata: dict[str, str]) -> None:
    """One graph as a checked ONNX file. Raises RunnerError without onnx and onnxscript, ExportError where it is not valid."""
    onnx = needed("onnx", "onnx")
    needed("onnxscript", "onnx")
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with _hushed():
        program: Any = torch.onnx.export(
            graph,
            tuple(example),
            dynamo=True,
            verbose=False,
            input_names=list(INPUTS[name]),
            output_names=list(OUTPUTS[name]),
            dynamic_shapes=(tuple({0: batch} for _ in example),),
            opset_version=OPSET[example[0].dtype],
            # Engines fold constants and fuse at load anyway; here it would take longer than all the rest.
            optimize=False,
        )
    model = program.model_proto
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise ExportError(f"graph {name}: not valid ONNX ({error})") from error
    path.write_bytes(model.SerializeToString())


class OnnxExporter:
    """The runner `onnx` (and, reading the same files, `openvino`)."""

    artefact = "onnx"

    def __init__(self, runner: str, open_graph: Callable[[Path], Engine]) -> None:
        self.runner, self._open_graph = runner, open_graph

    def build(self, prior: Prior, feature: Feature, dtype: torch.dtype, folder: Path) -> None:
        """Every graph of the step into `folder`."""
        denoiser, trunk, readout = network_parts(prior, feature, self.runner)
        if dtype != torch.float32:
            raise RunnerError(
                f"runner {self.runner}: got dtype {str(dtype)[6:]}, allowed is float32; or use --runner torch"
            )
        for module in ("onnx", "onnxscript", {"onnx": "onnxruntime"}.get(self.runner, self.runner)):
            needed(module, self.runner)
        rows = padded_rows(readout.num_rows)
        metadata = {
            "tiltscope.hook": trunk.hook,
            "tiltscope.prior": prior.identity,
            "tiltscope.rows": str(rows),
            "tiltscope.torch": torch.__version__,
        }
        embedding: Any = denoiser.network
        Schedule(
            shape=tuple(prior.shape),
            rows=rows,
            levels=tuple(denoiser.levels.tolist()),
            prediction=denoiser.prediction,
            channels=embedding.time_proj.num_channels,
            flip_sin_to_cos=embedding.time_proj.flip_sin_to_cos,
            downscale_freq_shift=embedding.time_proj.downscale_freq_shift,
            time_scale=denoiser.facts.time_scale,
            sigma_data=denoiser.facts.sigma_data,
        ).write(folder)
        networks = StepNetworks(denoiser, trunk)
        for name, example in examples(prior, feature).items():
            write_onnx(trace(networks, name, example), name, example, folder / f"{name}.onnx", metadata)

    def load(self, folder: Path, prior: Prior, feature: Feature, dtype: torch.dtype) -> Step:
        """The step from `folder`'s files."""
        denoiser, _, _ = network_parts(prior, feature, self.runner)
        return ExportedStep(self.runner, denoiser, GraphFiles(folder, self._open_graph))


onnx_exporter = OnnxExporter("onnx", onnx_step.open_graph)
openvino_exporter = OnnxExporter("openvino", openvino_step.open_graph)


@contextlib.contextmanager
def _hushed() -> Any:
    """The exporter's advice (an absent torchvision, renamed axes) is not the user's to act on."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
