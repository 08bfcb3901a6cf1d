"""OpenVINO behind the step's protocol, on the CPU. Reads the ONNX files of export/onnx.py; needs the extra `openvino`."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.runtime.exported import INPUTS, checked_outputs, threads


class OpenvinoRun:
    """Compiled models by graph, each at its first call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._compiled: dict[str, Any] = {}

    def __call__(self, graph: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        if graph not in self._compiled:
            self._compiled[graph] = compile_model(self._folder / f"{graph}.onnx")
        given = {name: tensor.detach().contiguous().numpy() for name, tensor in zip(INPUTS[graph], inputs, strict=True)}
        found = self._compiled[graph](given)
        return checked_outputs(graph, [torch.from_numpy(each.copy()) for each in found.to_tuple()])


def compile_model(path: Path) -> Any:
    """The model for the CPU, every product in float32. Raises RunnerError without OpenVINO.

    OpenVINO's own choice of precision is bfloat16 where the CPU has it: the gradient is then off by percents.
    """
    try:
        ov: Any = import_module("openvino")
    except ModuleNotFoundError as error:
        raise RunnerError(
            "runner openvino needs OpenVINO, which is not installed: pip install 'tiltscope[openvino]'"
        ) from error
    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return core.compile_model(core.read_model(path), "CPU", settings)
