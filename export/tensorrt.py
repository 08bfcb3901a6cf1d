"""TensorRT and TensorRT-RTX engines of a step's graphs, built from the ONNX files of export/onnx.py: one builder for both.

    FOLDER/<graph>.engine    strongly typed: every product in the dtype of the graph; one profile a bucket
    FOLDER/build.json        per graph: layers, bytes, seconds, everything that the builder warned of

TensorRT-RTX needs no GPU to build, and compiles the rest on the user's machine: one file is for all TARGETS. TensorRT builds for
the GPU at hand. Knows the builder; runs nothing.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tiltscope.engine.errors import ExportError, RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.report.atomic import write_bytes
from tiltscope.engine.runtime.cache import cache_folder
from tiltscope.engine.runtime.exported import ExportedStep, needed, network_parts
from tiltscope.engine.runtime.step import Step
from tiltscope.engine.runtime.tensorrt_step import BUCKETS, SUFFIX, EngineFiles, cannot_run
from tiltscope.export.graphs import traced_graphs
from tiltscope.export.onnx import write_onnx

# A100, RTX 30, RTX 40, RTX 50. TensorRT-RTX knows no H100 and no B200.
TARGETS = ("SM80", "SM86", "SM89", "SM120")
BUILD = "build.json"


class Tensorrt:
    """The exporter of the runners `tensorrt` and `tensorrt_rtx`: the module is called as the runner is."""

    dtypes = ("float32", "float16", "bfloat16")
    refused = MappingProxyType({"float64": "no TensorRT convolves in float64"})
    max_batch = BUCKETS[-1]

    def __init__(self, runner: str) -> None:
        self.runner = self.artefact = runner

    def facts(self) -> dict[str, Any]:
        """Version, targets and profiles. Raises RunnerError naming the extra where the module is missing."""
        trt = needed(self.runner, self.runner)
        return {"tensorrt": trt.__version__, "targets": list(self._targets()), "buckets": list(BUCKETS)}

    def cannot_run(self) -> str | None:
        """A missing module is named first: it can be installed; a missing GPU cannot."""
        needed(self.runner, self.runner)
        return cannot_run(self.runner)

    def build(self, prior: Prior, feature: Feature, dtype: torch.dtype, folder: Path) -> None:
        """Every graph's engine into `folder`. Raises ExportError with the builder's words where it refuses or warns."""
        network_parts(prior, feature, self.runner)
        told: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as place:
            for name, graph, example in traced_graphs(prior, feature, self.runner):
                path = Path(place) / f"{name}.onnx"
                write_onnx(graph, name, example, path, {}, folded=True)
                started = time.perf_counter()
                engine, told[name] = build_engine(self.runner, path, targets=self._targets())
                (folder / f"{name}{SUFFIX}").write_bytes(engine)
                told[name]["seconds"] = time.perf_counter() - started
        (folder / BUILD).write_text(json.dumps(told, indent=2))

    def load(self, folder: Path, prior: Prior, feature: Feature, dtype: torch.dtype) -> Step:
        """The step from `folder`'s engines."""
        denoiser, _, _ = network_parts(prior, feature, self.runner)
        return ExportedStep(self.runner, denoiser, EngineFiles(folder, self.runner), dtype, self.max_batch)

    def locate(self, prior: Prior, feature: Feature, dtype: torch.dtype) -> str:
        """The ONNX file in ONNX Runtime tells a wrong graph from a wrong engine; module by module it is that runner's affair."""
        return "tiltscope export --runner onnx says whether the graph is right; if it is, the engine is not"

    def _targets(self) -> Sequence[str]:
        return TARGETS if self.runner == "tensorrt_rtx" else ()


def build_engine(
    runner: str, path: Path, *, targets: Sequence[str], buckets: Sequence[int] = BUCKETS
) -> tuple[bytes, dict[str, Any]]:
    """(the engine of an ONNX file, {"layers", "bytes", "warnings"}) for every batch up to buckets[-1].

    targets: GPU architectures, none: the GPU at hand. Raises RunnerError without the module, ExportError where a layer is not
    supported, falls back, or the build fails: with the builder's own words.
    """
    trt = needed(runner, runner)
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        said = "; ".join(str(parser.get_error(at)) for at in range(parser.num_errors))
        raise ExportError(f"{runner} cannot read {path.name}: {said}")
    config = builder.create_builder_config()
    if targets:
        config.num_compute_capabilities = len(targets)
        for at, name in enumerate(targets):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), at):
                raise RunnerError(f"{runner} {trt.__version__} does not know the target {name}")
    for least, most in zip((1, *(each + 1 for each in buckets)), buckets, strict=False):
        profile = builder.create_optimization_profile()
        for at in range(network.num_inputs):
            given = network.get_input(at)
            rest = tuple(given.shape)[1:]
            profile.set_shape(given.name, (least, *rest), (most, *rest), (most, *rest))
        config.add_optimization_profile(profile)
    timings = _use_timing_cache(config, runner)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"{runner} built no engine of {path.name}: {'; '.join(log.errors) or 'it does not say why'}")
    _keep_timing_cache(config, timings)
    if telling := [each for each in log.warnings if _tells_of_fallback(each)]:
        raise ExportError(f"{runner}, {path.name}: {'; '.join(telling)}")
    data = bytes(engine)
    return data, {"layers": network.num_layers, "bytes": len(data), "warnings": log.warnings}


def _log(trt: Any) -> Any:
    """A logger that keeps what the builder says: a warning is not to scroll by."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(msg)

    return Log()


def _tells_of_fallback(warning: str) -> bool:
    """Whether a layer will run in another type, on another engine, or not at all."""
    return any(
        word in warning.lower() for word in ("fallback", "fall back", "falling back", "unsupported", "not supported")
    )


def _use_timing_cache(config: Any, runner: str) -> Path | None:
    """What the builder has measured before on this GPU, so that the next build is shorter.

    TensorRT-RTX measures nothing when it builds: there the calls exist, deprecated and without effect.
    """
    if runner == "tensorrt_rtx":
        return None
    path = cache_folder("timings") / f"{runner}.bin"
    config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)
    return path


def _keep_timing_cache(config: Any, path: Path | None) -> None:
    if path is not None:
        write_bytes(path, bytes(config.get_timing_cache().serialize()))


tensorrt_exporter = Tensorrt("tensorrt")
tensorrt_rtx_exporter = Tensorrt("tensorrt_rtx")
