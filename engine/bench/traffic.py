"""What a computation must at least move and compute, operator by operator: the bound that a time is held to.

On the meta device nothing is computed, so networks of any size are counted in seconds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Operation:
    """One operator that touches memory: bytes of its operands and results, each once; its floating-point operations."""

    name: str
    bytes: int
    flops: int


class Traffic(TorchDispatchMode):
    """Counts operators that touch memory; a view does not. One is one launch where nothing fuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            return made
        count = flop_registry.get(func._overloadpacket)
        self.operations.append(
            Operation(
                name=str(func._overloadpacket),
                bytes=sum(map(_bytes, tree_leaves((args, kwargs, made)))),
                flops=0 if count is None else int(count(*args, **kwargs, out_val=made)),
            )
        )
        return made

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.operations)

    @property
    def flops(self) -> int:
        return sum(each.flops for each in self.operations)

    def seconds(self, *, flops_a_second: float, bytes_a_second: float) -> float:
        """Roofline: each operator takes the longer of its arithmetic and its traffic, one after the other.

        Source: Williams, Waterman, Patterson 2009.
        """
        return sum(max(each.flops / flops_a_second, each.bytes / bytes_a_second) for each in self.operations)


def _bytes(value: object) -> int:
    """A broadcast operand is read from what it really is."""
    if not isinstance(value, Tensor):
        return 0
    dense = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride != 0]
    return torch.Size(dense).numel() * value.element_size()
