"""ONNX Runtime behind the step's protocol. Opens the files that export/onnx.py wrote; needs the extra `onnx`."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.runtime.exported import Engine, needed, threads

PROVIDER = "CPUExecutionProvider"


def open_graph(path: Path) -> Engine:
    """A session on the CPU. Raises RunnerError without onnxruntime, or where another provider was given."""
    ort = needed("onnxruntime", "onnx")
    options: Any = ort.SessionOptions()
    options.intra_op_num_threads = threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A provider that cannot be had is replaced with no more than a warning: a GPU number would be a CPU number.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session: Any = ort.InferenceSession(str(path), options, providers=[PROVIDER])
    if session.get_providers() != [PROVIDER]:
        raise RunnerError(f"runner onnx: asked for {PROVIDER}, got {', '.join(session.get_providers())}")
    return partial(session.run, None)
