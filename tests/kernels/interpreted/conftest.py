"""Tests of kernels under Triton's interpreter, which is chosen when triton is imported: a process of their own, started by
tests/kernels/test_interpreted.py. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted"""

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh tensors hold NaN (integers: their largest): an output that no program wrote shows."""
    torch.use_deterministic_algorithms(True)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.empty_like(torch.zeros(3, dtype=dtype)).isnan().all()
        assert torch.zeros(1).new_empty(3, dtype=dtype).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
