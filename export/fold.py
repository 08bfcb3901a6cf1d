"""What an exported ONNX graph computes from constants alone, computed; sequences replaced by plain splits: for TensorRT.

torch's exporter leaves axes, shapes and split sizes as chains of nodes over constants; TensorRT wants them to be constants, and
has no sequences. The exporter's own optimiser does this and more, in a minute a graph; this in a second. Files for ONNX Runtime
and OpenVINO stay as exported: of a folded one OpenVINO 2026.4 computes a wrong gradient above a batch of one
(docs/runners.md). Knows ONNX; knows no networks.
"""

from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Axes, shapes and indices are small; what is larger is a weight, and stays one.
_LARGEST = 4096
_NEVER = {
    "Constant",
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
}


def remove_remarks(model: Any) -> None:
    """Take out what the exporter notes on every node: stack traces, which name folders of the machine it ran on."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""


def fold(model: Any) -> None:
    """Changes `model`, the caller's own. Its inputs, outputs and what it computes stay the same."""
    import onnx

    graph = model.graph
    known = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer if _size(each.dims) <= _LARGEST}
    renamed: dict[str, str] = {}
    kept_names = {each.name for each in graph.output}
    opsets = {each.domain: each.version for each in model.opset_import}
    nodes: list[Any] = []
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = renamed.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in kept_names:
            renamed[node.output[0]] = node.input[0]
            continue
        nodes.append(node)
        values = _values(onnx, node, known, opsets)
        if values is None:
            continue
        known |= values
        if node.op_type != "Constant":
            nodes.pop()
            nodes.extend(
                onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.asarray(value)))
                for name, value in values.items()
            )
    nodes = _without_sequences(onnx, nodes, known)
    nodes = _needed(nodes, kept_names)
    read = kept_names.union(*(node.input for node in nodes))
    weights = [each for each in graph.initializer if each.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(weights)
    del graph.value_info[:]


def _size(dims: Iterable[int]) -> int:
    return int(np.prod(list(dims), dtype=np.int64))


def _values(
    onnx: Any, node: Any, known: dict[str, NDArray[Any]], opsets: dict[str, int]
) -> dict[str, NDArray[Any]] | None:
    """What a node gives, where that is decided by constants; None where it is not, or is large."""
    if node.op_type == "Constant":
        (attribute,) = node.attribute
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "value":
            array = onnx.numpy_helper.to_array(value) if _size(value.dims) <= _LARGEST else None
        else:
            array = np.asarray(value, np.int64 if attribute.name.startswith("value_int") else np.float32)
        return None if array is None else {node.output[0]: array}
    if node.op_type in _NEVER or "Sequence" in node.op_type or not node.input:
        return None
    if any(name and name not in known for name in node.input) or node.domain not in ("", "ai.onnx"):
        return None
    if any(attribute.HasField("g") for attribute in node.attribute):  # a body may look at anything
        return None
    reference: Any = import_module("onnx.reference")  # a module of its own, which onnx does not import
    evaluator = reference.ReferenceEvaluator(node, opsets=opsets)
    found = evaluator.run(None, {name: known[name] for name in node.input if name})
    if any(np.size(value) > _LARGEST for value in found):
        return None
    return {name: np.asarray(value) for name, value in zip(node.output, found, strict=False) if name}


def _without_sequences(onnx: Any, nodes: list[Any], known: dict[str, NDArray[Any]]) -> list[Any]:
    """SplitToSequence whose parts are all taken at constant places, as Split."""
    takers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    splits: dict[str, list[str]] = {}
    found: list[Any] = []
    for node in nodes:
        if node.op_type == "SequenceAt" and node.input[0] in splits:
            parts = splits[node.input[0]]
            found.append(onnx.helper.make_node("Identity", [parts[int(known[node.input[1]])]], list(node.output)))
            continue
        if node.op_type == "SplitToSequence" and _is_plain_split(node, takers.get(node.output[0], []), known):
            sizes, axis = known[node.input[1]], next((a.i for a in node.attribute if a.name == "axis"), 0)
            parts = [f"{node.output[0]}_part_{at}" for at in range(len(sizes))]
            splits[node.output[0]] = parts
            found.append(onnx.helper.make_node("Split", list(node.input), parts, axis=axis))
            continue
        found.append(node)
    return found


def _is_plain_split(node: Any, takers: list[Any], known: dict[str, NDArray[Any]]) -> bool:
    sizes = known.get(node.input[1]) if len(node.input) > 1 else None
    taken = all(taker.op_type == "SequenceAt" and taker.input[1] in known for taker in takers)
    return sizes is not None and sizes.ndim == 1 and taken


def _needed(nodes: list[Any], outputs: set[str]) -> list[Any]:
    """The nodes that lead to an output, in their order."""
    wanted, kept = Counter(outputs), list[Any]()
    for node in reversed(nodes):
        if any(name in wanted for name in node.output):
            kept.append(node)
            wanted.update(name for name in node.input if name)
    return kept[::-1]
