"""Weights beyond what one ONNX file can hold lie beside it, and every reader finds them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tiltscope.engine.runtime import onnx_step, openvino_step
from tiltscope.export import onnx as module
from tiltscope.export.onnx import write_onnx

NAMES = {"inputs": ("x",), "outputs": ("y",)}


class Table(nn.Module):
    """y = x w, w [rows, columns]: as much weight as is asked for."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.w = nn.Buffer(torch.zeros(rows, columns))
        self.w[:, 0] = torch.arange(rows) % 7
        self.w[-1, -1] = 3.0

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        return (given[0] @ self.w,)


def held_by(path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path, load_external_data=False)
    return {each.name: each.data_location == onnx.TensorProto.EXTERNAL for each in model.graph.initializer}


@pytest.mark.parametrize("engine", [onnx_step, openvino_step])
def test_weights_beyond_the_bound_lie_beside_the_graph_and_are_found(engine, tmp_path, monkeypatch):
    table, x = Table(300, 5), torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    write_onnx(table, "g", [x[:2]], tmp_path / "inside.onnx", {"k": "v"}, **NAMES)
    monkeypatch.setattr(module, "INSIDE_AT_MOST", 1000)
    write_onnx(table, "g", [x[:2]], tmp_path / "beside.onnx", {"k": "v"}, **NAMES)
    assert not any(held_by(tmp_path / "inside.onnx").values())
    assert not (tmp_path / "inside.weights").exists()
    assert any(held_by(tmp_path / "beside.onnx").values())
    assert (tmp_path / "beside.weights").stat().st_size >= 300 * 5 * 4
    for _ in range(2):  # written again it is no longer: nothing is appended to what was there
        size = (tmp_path / "beside.weights").stat().st_size
        write_onnx(table, "g", [x[:2]], tmp_path / "beside.onnx", {"k": "v"}, **NAMES)
        assert (tmp_path / "beside.weights").stat().st_size == size
    found, inside = (engine.open_graph(tmp_path / f"{name}.onnx")({"x": x.numpy()})[0] for name in ("beside", "inside"))
    np.testing.assert_array_equal(found, inside)
    np.testing.assert_allclose(found, (x @ table.w).numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_weights_above_two_gigabytes_are_written_checked_and_run(tmp_path):
    """2^29 + 2^20 float32: beyond the 2^31 bytes at which a protocol buffer ends. Needs 9 GB of memory for a minute."""
    rows = 2**19 + 2**10
    table, x = Table(rows, 1024), torch.zeros(1, rows)
    x[0, -1], x[0, 5] = 2.0, 1.0
    write_onnx(table, "g", [torch.zeros(2, rows)], tmp_path / "large.onnx", {}, **NAMES)
    assert (tmp_path / "large.onnx").stat().st_size < 2**20
    assert (tmp_path / "large.weights").stat().st_size > 2**31
    expected = x @ table.w
    del table
    (found,) = onnx_step.open_graph(tmp_path / "large.onnx")({"x": x.numpy()})
    np.testing.assert_array_equal(found, expected.numpy())
    assert float(found[0, -1]) == 6.0
