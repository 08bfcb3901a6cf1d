"""Whether a step may be captured in a CUDA graph, decided without a GPU by watching every operator it dispatches.

A graph replays recorded kernels on recorded addresses with recorded arguments. So a step must not wait for the device, must
dispatch the same operators on the same shapes with the same scalars whatever the values are, must read and write where it did at
capture, must draw nothing from a global generator, and must make no tensor out of host data. Two passes, each blind where the
other sees:

    recorded    three runs on different values in the same buffers; every operator, its shapes and scalars, every address read
    on meta     tensors without data, on which .cpu(), .tolist() and .numpy() raise (of CPU tensors they dispatch no operator, so
                no recorder sees them), and beside which a tensor left on the host stands out

What neither covers: library workspaces, allocator pools, streams, and host code inside a custom operator, which is one opaque
entry (its plain definition goes through the check by itself). Knows tensors and callables; nothing of slots or plans.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiltscope.engine.errors import RunnerError

_aten: Any = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.unique_consecutive,
    _aten._unique2,
    _aten.equal,
    _aten.is_nonzero,
    _aten.bincount,
}
_HOST_DATA = {_aten.lift_fresh, _aten.lift_fresh_copy, _aten.lift}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


class Operator(NamedTuple):
    """One dispatched operator: what a graph would freeze of it."""

    name: str
    tensors: tuple[Any, ...]
    scalars: tuple[str, ...]


class Recorder(TorchDispatchMode):
    """Records every operator inside the block, and what would stall or be baked in."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.problems: list[str] = []
        self.reads: set[int] = set()
        self._born: set[int] = set()
        # Nothing may be freed while the check lasts: a reused address would look like the same buffer.
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        given = [each for each in leaves if isinstance(each, Tensor)]
        self.problems += _problems(func, args, kwargs)
        self.reads |= {_address(each) for each in given} - self._born
        made_by = func(*args, **kwargs)
        made = [each for each in tree_leaves(made_by) if isinstance(each, Tensor)]
        self.kept += given + made
        # Intermediates live in the graph's own pool, so any address will do for them.
        self._born |= {_address(each) for each in made} - {_address(each) for each in given}
        # As text: a NaN equals no other, not even itself.
        scalars = tuple(repr(each) for each in leaves if isinstance(each, bool | int | float | str | torch.dtype))
        shapes = tuple((tuple(each.shape), each.stride(), each.dtype) for each in (*given, *made))
        self.operators.append(Operator(str(func), shapes, scalars))
        return made_by


class _OnMeta(TorchDispatchMode):
    """Sees what the meta device lets pass: a table on the host, read at indices that are on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, Tensor) and each.device.type == "cpu" for each in tree_leaves((args, kwargs or {}))):
            self.problems.append(f"on meta: {func} reads a tensor that was left on the host")
        return func(*args, **(kwargs or {}))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _problems(func: Any, args: Any, kwargs: Any) -> list[str]:
    packet, found = func.overloadpacket, list[str]()
    if packet in _WAITS or func is _aten.repeat_interleave.Tensor:
        found.append(f"{func} waits for the device")
    if packet in _INDEXED and any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]):
        found.append(f"{func} with a mask waits for the device: its size depends on values")
    if packet in _HOST_DATA:
        found.append(f"{func} makes a tensor from host data, which is baked in at capture")
    if (
        torch.Tag.nondeterministic_seeded in func.tags
        and kwargs.get("generator") is None
        and _drops_out(func, args, kwargs)
    ):
        found.append(f"{func} draws from the global generator")
    if packet is _aten._to_copy and kwargs.get("device") not in (None, args[0].device):
        found.append(f"{func} copies between devices")
    if packet is _aten.copy_ and args[0].device != args[1].device:
        found.append(f"{func} copies between devices")
    return found


def _drops_out(func: Any, args: Any, kwargs: Any) -> bool:
    """False for attention without dropout, which draws nothing although it carries the tag."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            value = args[at] if at < len(args) else kwargs.get("dropout_p", argument.default_value)
            return value != 0
    return True


@dataclass(frozen=True)
class Verdict:
    """problems: what stands in the way, none for a step that may be captured. num_operators: of one step."""

    problems: tuple[str, ...]
    num_operators: int

    def require(self, what: str) -> None:
        """Raises RunnerError listing the problems where there are any."""
        if self.problems:
            raise RunnerError(f"{what} cannot be captured in a CUDA graph: {'; '.join(self.problems)}")


def check_capture(
    step: Callable[[], Mapping[str, Tensor]],
    buffers: Mapping[str, Tensor],
    fill: Callable[[int], None],
    *,
    on_meta: Callable[[], object],
) -> Verdict:
    """Run `step` three times and once on meta.

    step() works on `buffers` and returns its outputs by name; every output must be one of the buffers. fill(k) writes the k-th
    set of values into the buffers. on_meta() runs the same step on copies without data. The first run is the warm-up, where lazy
    set-up is allowed.
    """
    static = {name: _address(each) for name, each in buffers.items()}
    recorders: list[Recorder] = []
    written: list[dict[str, int]] = []
    for turn in range(3):
        fill(turn)
        with Recorder() as recorder:
            outputs = step()
        recorder.kept += outputs.values()
        recorders.append(recorder)
        written.append({name: _address(each) for name, each in outputs.items()})
    _, first, second = recorders
    problems = [*first.problems, *second.problems, *_differences(first.operators, second.operators)]
    if first.reads != second.reads:
        problems.append("reads memory at other addresses in every run")
    for name, address in written[1].items():
        if address not in static.values() or address != written[2][name]:
            problems.append(f"output {name} is not a static buffer")
    if static != {name: _address(each) for name, each in buffers.items()}:
        problems.append("an input buffer moved")
    try:
        with _OnMeta() as meta:
            on_meta()
        problems += meta.problems
    except (RuntimeError, NotImplementedError, TypeError) as error:
        problems.append(f"on meta: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    return Verdict(tuple(sorted(set(problems))), len(second.operators))


def _differences(first: list[Operator], second: list[Operator]) -> list[str]:
    if len(first) != len(second):
        return [f"{len(first)} operators in one run, {len(second)} in the next"]
    return [
        f"operator {at} differs between runs: {one.name} {one.scalars}, then {other.name} {other.scalars}"
        for at, (one, other) in enumerate(zip(first, second, strict=True))
        if one != other
    ][:1]
