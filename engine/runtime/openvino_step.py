"""OpenVINO behind the step's protocol, on the CPU. Reads the ONNX files of export/onnx.py; needs the extra `openvino`."""

from pathlib import Path
from typing import Any

import numpy as np

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.runtime.exported import Engine, needed
from tiltscope.engine.runtime.opened import opened_before
from tiltscope.engine.runtime.threads import num_threads

_COMPILED = "compiled.blob"
# A setting's word for a type, and OpenVINO's name of it.
_TYPES = {"f32": "float32", "bf16": "bfloat16"}


def open_graph(path: Path, precision: str = "f32") -> Engine:
    """The model for the CPU, its products in `precision`, f32 or bf16. Raises RunnerError without OpenVINO, or where it does not.

    OpenVINO's own choice is bfloat16 where the CPU has it: the gradient is then off by percents, which is for the user to want.
    """
    return _run(_compiled(path, precision), precision)


def open_again(path: Path, precision: str = "f32") -> Engine:
    """Likewise for a file of an artefact: compiled once, and every other time opened as it then was."""
    core = needed("openvino", "openvino").Core()

    def make(place: Path) -> None:
        found: Any = _compiled(path, precision).export_model()
        (place / _COMPILED).write_bytes(found if isinstance(found, bytes) else found.getvalue())

    folder = opened_before(path, "openvino", _settings(precision), make)
    return _run(core.import_model((folder / _COMPILED).read_bytes(), "CPU", _settings(precision)), precision)


def _settings(precision: str) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }


def _compiled(path: Path, precision: str) -> Any:
    openvino: Any = needed("openvino", "openvino")
    core = openvino.Core()
    model = core.read_model(path)
    _turn_weights(openvino, model)
    return core.compile_model(model, "CPU", _settings(precision))


def _turn_weights(openvino: Any, model: Any) -> None:
    """A weight that is read transposed becomes a constant of its own, so transposed. Changes `model`.

    A gradient reads a weight one way, the forward pass the other. OpenVINO 2026.4 packs a square one once, for whichever product
    comes first, and gives both that (docs/runners.md).
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Transpose":
            continue
        given, order = (node.input_value(at).get_node() for at in (0, 1))
        if given.get_type_name() == order.get_type_name() == "Constant":
            turned = np.ascontiguousarray(given.get_data().transpose(order.get_data()))
            node.output(0).replace(openvino.op.Constant(turned).output(0))


def _run(model: Any, precision: str) -> Engine:
    taken = str(model.get_property("INFERENCE_PRECISION_HINT"))
    if _TYPES[precision] not in taken:
        raise RunnerError(
            f"runner openvino: asked to compute in {_TYPES[precision]}, it would compute in {taken}; give dtype float32"
        )
    # Copies: the arrays it gives are its own, and the next call writes into them.
    return lambda given: [each.copy() for each in model(given).to_tuple()]
