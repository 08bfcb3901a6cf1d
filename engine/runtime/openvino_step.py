"""OpenVINO behind the step's protocol, on the CPU. Reads the ONNX files of export/onnx.py; needs the extra `openvino`."""

from pathlib import Path
from typing import Any

from tiltscope.engine.runtime.exported import Engine, needed, threads


def open_graph(path: Path) -> Engine:
    """The model for the CPU, every product in float32. Raises RunnerError without OpenVINO.

    OpenVINO's own choice of precision is bfloat16 where the CPU has it: the gradient is then off by percents.
    """
    core = needed("openvino", "openvino").Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model: Any = core.compile_model(core.read_model(path), "CPU", settings)
    # Copies: the arrays it gives are its own, and the next call writes into them.
    return lambda given: [each.copy() for each in model(given).to_tuple()]
