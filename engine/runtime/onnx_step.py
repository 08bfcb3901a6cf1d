"""ONNX Runtime behind the step's protocol. Opens the files that export/onnx.py wrote; needs the extra `onnx`."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.runtime.exported import Engine, needed
from tiltscope.engine.runtime.opened import opened_before
from tiltscope.engine.runtime.threads import num_threads

PROVIDER = "CPUExecutionProvider"
# The graph as ONNX Runtime rewrote it for this processor, and its weights, which may be more than one file of its kind can hold.
_OPTIMISED, _WEIGHTS = "optimised.onnx", "optimised.weights"


def open_graph(path: Path) -> Engine:
    """A session on the CPU. Raises RunnerError without onnxruntime, or where another provider was given."""
    return _run(_session(path, _options()))


def open_again(path: Path) -> Engine:
    """Likewise for a file of an artefact: rewritten for this processor once, opened as it then is every other time."""
    needed("onnxruntime", "onnx")
    folder = opened_before(path, "onnxruntime", {}, lambda place: _optimise(path, place))
    options = _options()
    options.graph_optimization_level = needed("onnxruntime", "onnx").GraphOptimizationLevel.ORT_DISABLE_ALL
    return _run(_session(folder / _OPTIMISED, options))


def _optimise(path: Path, place: Path) -> None:
    options = _options()
    options.optimized_model_filepath = str(place / _OPTIMISED)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    _session(path, options)


def _options() -> Any:
    options: Any = needed("onnxruntime", "onnx").SessionOptions()
    options.intra_op_num_threads = num_threads()
    options.inter_op_num_threads = 1
    # Each graph has threads of its own: those that are done would spin on the processors that the next graph's need.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return options


def _session(path: Path, options: Any) -> Any:
    ort = needed("onnxruntime", "onnx")
    # A provider that cannot be had is replaced with no more than a warning: a GPU number would be a CPU number.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session: Any = ort.InferenceSession(str(path), options, providers=[PROVIDER])
    if session.get_providers() != [PROVIDER]:
        raise RunnerError(f"runner onnx: asked for {PROVIDER}, got {', '.join(session.get_providers())}")
    return session


def _run(session: Any) -> Engine:
    return partial(session.run, None)
