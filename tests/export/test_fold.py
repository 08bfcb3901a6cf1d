"""Folding an ONNX graph: the same numbers, with constants where constants were computed, and no sequence left."""

import numpy as np
import pytest

from tiltscope.export.fold import fold, remove_remarks

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
helper, numbers = onnx.helper, onnx.numpy_helper


def constant(name, value):
    return helper.make_node("Constant", [], [name], value=numbers.from_array(np.asarray(value)))


def model_of(*nodes, outputs=("y",), weights=()):
    given = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 6])]
    given_back = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", None]) for name in outputs]
    graph = helper.make_graph(list(nodes), "g", given, given_back, [numbers.from_array(v, n) for n, v in weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model, x):
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})


def both(model):
    """(op types after folding, the largest difference between what the two models give)."""
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    before = run(model, x)
    fold(model)
    after = run(model, x)
    return [node.op_type for node in model.graph.node], max(
        np.abs(a - b).max() for a, b in zip(before, after, strict=True)
    )


def test_axes_that_are_computed_from_constants_become_constants():
    """As torch's `any` leaves them; TensorRT refuses axes that are a node's output."""
    model = model_of(
        constant("axis", np.int64(-1)),
        constant("shape", np.array([-1], np.int64)),
        helper.make_node("Reshape", ["axis", "shape"], ["axes"]),
        helper.make_node("ReduceMax", ["x", "axes"], ["y"], keepdims=1),
    )
    ops, away = both(model)
    assert ops == ["Constant", "ReduceMax"]
    assert away == 0


def test_a_sequence_whose_parts_are_taken_at_constant_places_becomes_a_split():
    model = model_of(
        constant("sizes", np.array([2, 4], np.int64)),
        constant("first", np.int64(0)),
        constant("last", np.int64(-1)),
        helper.make_node("SplitToSequence", ["x", "sizes"], ["parts"], axis=1),
        helper.make_node("SequenceAt", ["parts", "first"], ["a"]),
        helper.make_node("SequenceAt", ["parts", "last"], ["b"]),
        helper.make_node("Neg", ["a"], ["y"]),
        helper.make_node("Neg", ["b"], ["z"]),
        outputs=("y", "z"),
    )
    ops, away = both(model)
    assert "Split" in ops
    assert not [op for op in ops if "Sequence" in op]
    assert away == 0


def test_what_depends_on_the_batch_and_what_is_a_weight_stay():
    weight = np.random.default_rng(1).standard_normal((6, 1000)).astype(np.float32)
    model = model_of(
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Identity", ["w"], ["same"]),
        helper.make_node("MatMul", ["x", "same"], ["product"]),
        helper.make_node("Cast", ["shape"], ["sizes"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["sizes"], ["total"]),
        helper.make_node("Add", ["product", "total"], ["y"]),
        weights=(("w", weight), ("unused", weight)),
    )
    ops, away = both(model)
    assert ops == ["Shape", "MatMul", "Cast", "ReduceSum", "Add"]
    assert [each.name for each in model.graph.initializer] == ["w"]
    assert away == 0


def test_no_remark_names_the_machine_it_was_made_on():
    node = helper.make_node("Neg", ["x"], ["y"], doc_string="somebody's folder")
    entry = node.metadata_props.add()
    entry.key, entry.value = "trace", "somebody's folder"
    model = model_of(node)
    remove_remarks(model)
    assert b"somebody" not in model.SerializeToString()
