"""TensorRT and TensorRT-RTX engines behind the step's protocol: one runner, two modules with the same Python API.

    FOLDER/<graph>.engine    from export/tensorrt.py; one optimisation profile a bucket

Runs on the caller's CUDA stream: inputs and outputs are torch's own device memory, handed over by address; nothing is copied and
the host does not wait, but for inputs in the host's memory (the self-test's), which go there and come back. Needs a CUDA device
and its driver: what of this ran on a machine without is in docs/runners.md.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.runtime.exported import INPUTS, OUTPUTS, needed

SUFFIX = ".engine"
# One profile each: the batches from the one before it, exclusive, to it. A run has one bucket, so it stays in one profile.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


def cannot_run(runner: str) -> str | None:
    """What this machine lacks to run an engine, in a sentence; None where nothing."""
    if torch.cuda.is_available():
        return None
    return (
        f"this machine can build engines but not run them: it needs an NVIDIA GPU with its driver and a CUDA build of torch "
        f"({torch.__version__} sees no device); use --runner torch here, or tiltscope export --runner {runner} to build ahead"
    )


def profile_of(batch: int) -> int:
    """The index of the profile that serves a batch. Raises RunnerError beyond the last."""
    for at, bucket in enumerate(BUCKETS):
        if batch <= bucket:
            return at
    raise RunnerError(
        f"got a batch of {batch}, the engine's profiles end at {BUCKETS[-1]}; give --batch-size {BUCKETS[-1]}"
    )


def _current_stream(tensor: Tensor) -> Any:
    return torch.cuda.current_stream(tensor.device)


class EngineFiles:
    """FOLDER/<graph>.engine as a RunGraph. Files are opened at their graph's first call; one execution context a profile."""

    def __init__(
        self, folder: Path, runner: str, stream_of: Callable[[Tensor], Any] | None = None, device: str = "cuda"
    ) -> None:
        """stream_of: the CUDA stream that a tensor's device is working on (default torch's current one).

        device: where engines run. What lies elsewhere, as the self-test's stored inputs do, is brought there and back.
        """
        self._folder, self._runner, self._device = folder, runner, device
        self._stream_of = stream_of or _current_stream
        self._trt = needed(runner, runner)
        self._log = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._log)
        self._engines: dict[str, Any] = {}
        self._contexts: dict[tuple[str, int], Any] = {}

    def __call__(self, graph: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Enqueued on torch's current stream. Raises RunnerError where the engine refuses a shape or the call."""
        came_from = inputs[0].device
        given = [self._there(each.detach()).contiguous() for each in inputs]
        device, stream = given[0].device, self._stream_of(given[0])
        context = self._context(graph, profile_of(len(given[0])), stream)
        for name, tensor in zip(INPUTS[graph], given, strict=True):
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise RunnerError(f"runner {self._runner}: graph {graph} refuses {name} of shape {list(tensor.shape)}")
            context.set_tensor_address(name, tensor.data_ptr())
        outputs: list[Tensor] = []
        for name in OUTPUTS[graph]:
            output = torch.empty(tuple(context.get_tensor_shape(name)), dtype=given[0].dtype, device=device)
            context.set_tensor_address(name, output.data_ptr())
            outputs.append(output)
        if not context.execute_async_v3(stream.cuda_stream):
            raise RunnerError(f"runner {self._runner}: graph {graph} could not be enqueued; the log above says why")
        # The caller's own stream: torch hands freed memory out again on it only, hence after this call's work.
        return outputs if device == came_from else [each.to(came_from) for each in outputs]

    def _there(self, tensor: Tensor) -> Tensor:
        """On the engines' kind of device; one that is there already stays on its own."""
        return tensor if tensor.device.type == self._device else tensor.to(self._device)

    def _context(self, graph: str, profile: int, stream: Any) -> Any:
        if (graph, profile) not in self._contexts:
            context = self._engine(graph).create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, stream.cuda_stream):
                raise RunnerError(f"runner {self._runner}: graph {graph} has no profile {profile}; build it again")
            self._contexts[graph, profile] = context
        return self._contexts[graph, profile]

    def _engine(self, graph: str) -> Any:
        if graph not in self._engines:
            path = self._folder / f"{graph}{SUFFIX}"
            engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                raise RunnerError(
                    f"runner {self._runner}: {path} cannot be loaded on this GPU; remove its folder and build again"
                )
            self._engines[graph] = engine
        return self._engines[graph]
