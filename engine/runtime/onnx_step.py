"""ONNX Runtime behind the step's protocol. Loads the files that export/onnx.py wrote; needs the extra `onnx`."""

import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.runtime.exported import INPUTS, checked_outputs, threads

PROVIDER = "CPUExecutionProvider"


class OnnxRun:
    """Sessions by graph, each opened at its first call. Raises RunnerError where the provider obtained is another one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sessions: dict[str, Any] = {}

    def __call__(self, graph: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        if graph not in self._sessions:
            self._sessions[graph] = open_session(self._folder / f"{graph}.onnx")
        given = {name: tensor.detach().contiguous().numpy() for name, tensor in zip(INPUTS[graph], inputs, strict=True)}
        return checked_outputs(graph, [torch.from_numpy(each) for each in self._sessions[graph].run(None, given)])


def open_session(path: Path) -> Any:
    """A session on the CPU. Raises RunnerError without onnxruntime, or where another provider was given."""
    try:
        ort: Any = import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise RunnerError(
            "runner onnx needs onnxruntime, which is not installed: pip install 'tiltscope[onnx]'"
        ) from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A provider that cannot be had is replaced with no more than a warning: a GPU number would be a CPU number.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = ort.InferenceSession(str(path), options, providers=[PROVIDER])
    if session.get_providers() != [PROVIDER]:
        raise RunnerError(f"runner onnx: asked for {PROVIDER}, got {', '.join(session.get_providers())}")
    return session
