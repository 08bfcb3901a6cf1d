"""What a computation must move and compute is counted operator by operator, and is what a system's file tells of it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tiltscope.engine.bench.traffic import Traffic

ROOT = Path(__file__).parents[2]


def test_a_product_is_counted_and_a_view_is_not():
    a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    with Traffic() as traffic:
        (a @ b).view(7, 3).t()
    assert [each.name for each in traffic.operations] == ["aten.mm"]
    assert traffic.flops == 2 * 3 * 5 * 7
    assert traffic.bytes == 4 * (15 + 35 + 21)


def test_a_broadcast_operand_is_read_once():
    a, b = torch.empty(8, 4, device="meta"), torch.empty(4, device="meta").expand(8, 4)
    with Traffic() as traffic:
        a + b
    assert traffic.bytes == 4 * (32 + 4 + 32)


def test_each_operator_takes_the_longer_of_arithmetic_and_traffic():
    a = torch.empty(64, 64, device="meta")
    with Traffic() as traffic:
        (a @ a).add_(1)
    product, add = traffic.operations
    assert (product.flops, add.flops) == (2 * 64**3, 0)
    # At these rates the product waits for its arithmetic, the sum for its memory.
    assert traffic.seconds(flops_a_second=1e6, bytes_a_second=1e6) == pytest.approx(
        product.flops / 1e6 + add.bytes / 1e6
    )
    assert traffic.seconds(flops_a_second=1e30, bytes_a_second=1e5) == pytest.approx(traffic.bytes / 1e5)


@pytest.mark.slow
def test_the_predicted_step_of_a_system_is_the_one_its_file_tells(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import roofline

    told = json.loads((ROOT / "examples" / "systems" / "energydps.json").read_text())
    found = roofline.predicted(roofline.adm_convnext(), 1)
    assert found["gflop"] == pytest.approx(2 * told["row_gmac"], rel=0.01)
    assert found["arithmetic_ms"] < found["roofline_ms"]
    del sys.modules["roofline"]
