"""How much memory a guided row takes, known before it runs; and a step that takes its gradient a part of a bucket at a time.

    peak = what the process holds already + the most that is alive at once inside the row

The second term is found by running the row on the meta device, where tensors have sizes and no values: every storage counts from
the operator that makes it until nothing refers to it, what autograd keeps for the backward pass included. Not counted: an
operator's own scratch (unfolded columns of a convolution, reordered weights), which WORKSPACE allows for. Knows steps; knows no
requests.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.feature.readout import Readout
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.report.atomic import write_bytes
from tiltscope.engine.runtime.artefact import here
from tiltscope.engine.runtime.cache import kept_file
from tiltscope.engine.runtime.step import Pullback, Step, StepOutput, TorchStep

META = torch.device("meta")
MIB = 2**20
# Of what is kept on disk: another number for every change of what counts as alive.
_FORM = 1
# Of what is alive: operators' scratch and the allocator's slack. Taken over alive on emoji64: 1.42 at a bucket of 8, 1.7 at 1,
# where it is 14 MiB (benchmarks/memory.py).
WORKSPACE = 1.4
# Of what the system has to give: the rest is for other processes, and for what was not foreseen.
SHARE = 0.9


# What rows of these networks (trunk, then prior) were found to take, by type, batch and the readout's shapes: a service asks
# with every request.
_seen: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], float]]] = WeakKeyDictionary()


class LiveBytes(TorchDispatchMode):
    """peak: the most bytes of tensors made inside the block that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = func(*args, **(kwargs or {}))
        for key in [key for key, (reference, _) in self._alive.items() if reference.expired()]:
            self.now -= self._alive.pop(key)[1]
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and (key := _storage(each)) not in self._alive and key not in given:
                storage = each.untyped_storage()
                self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return made


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def row_mib(prior: Prior, feature: Feature, dtype: torch.dtype, *, batch: int) -> float:
    """MiB that a guided row of `batch` samples takes in eager torch beside the networks. Raises RunnerError for Python functions.

    Seen by benchmarks/memory.py: on emoji64 a process then peaks within 1 % of held + row, at buckets of 1 and 8.
    """
    if prior.network is None or feature.trunk is None or feature.readout is None:
        raise RunnerError(f"{prior.name}, {feature.name}: memory of a Python function cannot be foreseen; run it")
    seen = _seen.setdefault(feature.trunk, WeakKeyDictionary()).setdefault(prior.network.network, {})
    readout = tuple(tuple(getattr(feature.readout, each.name).shape[1:]) for each in fields(feature.readout))
    asked = (dtype, batch, readout)
    if asked not in seen:
        seen[asked] = _kept_mib(prior, feature, dtype, batch, readout)
    return WORKSPACE * seen[asked]


def _kept_mib(
    prior: Prior, feature: Feature, dtype: torch.dtype, batch: int, readout: tuple[tuple[int, ...], ...]
) -> float:
    """`_alive_mib`, kept in TILTSCOPE_HOME/memory for the next process: it takes a fifth of what a start of `explain` does."""
    assert prior.network is not None  # `row_mib` has looked
    assert feature.trunk is not None
    key = {
        "form": _FORM,
        "prior": prior.identity,
        "hook": feature.trunk.hook,
        "shape": list(prior.shape),
        "networks": [_sizes(network) for network in (prior.network.network, feature.trunk)],
        "readout": readout,
        "batch": batch,
        "dtype": str(dtype),
        **here(),
    }
    path = kept_file("memory", key)
    if not path.is_file():
        write_bytes(path, json.dumps(_alive_mib(prior, feature, dtype, batch=batch)).encode())
    return float(json.loads(path.read_bytes()))


def _sizes(network: nn.Module) -> dict[str, Any]:
    """What every module says of itself in words and numbers (heads, widths), and the shape of every tensor."""
    plain = (bool, int, float, str, tuple)
    said = {
        name: {k: repr(v) for k, v in vars(each).items() if isinstance(v, plain)}
        for name, each in network.named_modules()
    }
    return {"modules": said, "tensors": {name: list(each.shape) for name, each in network.state_dict().items()}}


def _alive_mib(prior: Prior, feature: Feature, dtype: torch.dtype, *, batch: int) -> float:
    """The most MiB alive at once in a guided row, by running it on the meta device: about a second."""
    on_meta = feature.to(dtype, META)
    step = TorchStep(prior.to(dtype, META), on_meta)
    assert on_meta.readout is not None  # a readout's feature keeps one
    state = torch.promote_types(dtype, torch.float32)  # narrow networks alone are narrow
    x = torch.empty(batch, *prior.shape, dtype=state, device=META)
    sigma = torch.empty(batch, dtype=torch.float64, device=META)
    with LiveBytes() as live:
        step.guided(x, sigma, sigma, on_meta.readout.expand(batch))
    return live.peak / MIB


def available_mib() -> float | None:
    """What the system could give this process now: of the machine, of its control group. None where it does not say."""
    found: list[float] = []
    facts = _words(Path("/proc/meminfo"))
    if "MemAvailable:" in facts:
        found.append(int(facts[facts.index("MemAvailable:") + 1]) / 1024)
    limit, used = (_words(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdecimal():
        found.append((int(limit[0]) - int(used[0])) / MIB)
    return min(found, default=None)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """chunk: samples of the bucket that a gradient is taken of at once; row_mib: what that takes; available_mib: of what."""

    bucket: int
    chunk: int
    row_mib: float
    available_mib: float | None


def plan_memory(
    prior: Prior, feature: Feature, dtype: torch.dtype, *, bucket: int, chunk: int | None, available: float | None
) -> MemoryPlan:
    """The plan for a bucket. Raises RunnerError, with the numbers and what would fit, where it would not.

    chunk None: the whole bucket at once. Never chosen by the machine's memory: other chunks are other last bits, and the same
    request must give the same picture.
    """
    asked = min(chunk or bucket, bucket)
    needed = row_mib(prior, feature, dtype, batch=asked)
    if available is not None and needed > SHARE * available:
        fitting = [size for size in _halves(asked) if row_mib(prior, feature, dtype, batch=size) <= SHARE * available]
        advice = f"give vjp_chunk {fitting[0]}, or batch_size {fitting[0]}" if fitting else "not even one sample fits"
        raise RunnerError(
            f"a guided row of {asked} samples takes about {needed:.0f} MiB, and {available:.0f} MiB are free here, of which "
            f"{SHARE:.0%} may be used; {advice}"
        )
    return MemoryPlan(bucket=bucket, chunk=asked, row_mib=needed, available_mib=available)


def _halves(size: int) -> list[int]:
    """size/2, size/4, ..., 1, whole ones."""
    found: list[int] = []
    while size > 1:
        size //= 2
        found.append(size)
    return found


@dataclass(frozen=True)
class ChunkedStep:
    """`step`, its gradients taken of `chunk` samples at a time: a bucket's row in the memory of a smaller one's.

    Samples do not look at each other, so the numbers are the unchunked ones' to rounding: the shapes, and with them the kernels,
    are others (tests/runtime/test_memory.py: 1e-6). What needs no gradient runs whole.
    """

    step: Step
    chunk: int

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def has_own_threads(self) -> bool:
        return self.step.has_own_threads

    def unguided(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        return self.step.unguided(x, sigma, alpha)

    def guided(self, x: Tensor, sigma: Tensor, alpha: Tensor, readout: Readout | None) -> StepOutput:
        parts = [
            self.step.guided(x[at], sigma[at], alpha[at], None if readout is None else readout.expand(len(x))[at])
            for at in self._chunks(len(x))
        ]
        return StepOutput(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def measure(self, x0: Tensor, readout: Readout | None) -> tuple[Tensor, Tensor]:
        return self.step.measure(x0, readout)

    def linearise(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Pullback]:
        """A product holds the denoiser's graph of its own chunk alone: the forward pass is done again for it."""
        x0_hat = torch.cat([self.step.linearise(x[at], sigma[at])[0] for at in self._chunks(len(x))])

        def pullback(v: Tensor) -> Tensor:
            return torch.cat([self.step.linearise(x[at], sigma[at])[1](v[at]) for at in self._chunks(len(x))])

        return x0_hat, pullback

    def gradient(self, x0: Tensor, readout: Readout | None) -> tuple[Tensor, Tensor, Tensor]:
        parts = [
            self.step.gradient(x0[at], None if readout is None else readout.expand(len(x0))[at])
            for at in self._chunks(len(x0))
        ]
        activation, drive, grad = (torch.cat(each) for each in zip(*parts, strict=True))
        return activation, drive, grad

    def _chunks(self, num: int) -> list[slice]:
        return [slice(at, at + self.chunk) for at in range(0, num, self.chunk)]
