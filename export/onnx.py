"""ONNX files of a step's graphs: what ONNX Runtime, OpenVINO and TensorRT read.

    FOLDER/<graph>.onnx       opset OPSET, batch symbolic, weights inside; metadata: hook, dtype, rows, versions
    FOLDER/<graph>.weights    its weights, where they are more than one ONNX file can hold (2 GB)
    FOLDER/schedule.json      what noise levels decide, for an embedding without torch (engine/runtime/schedule.py)

Checked by onnx.checker before they are kept. Knows traced graphs and files; runs nothing.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import ExportError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime import onnx_step, openvino_step
from tiltscope.engine.runtime.exported import (
    INPUTS,
    MAX_BATCH,
    OUTPUTS,
    Engine,
    ExportedStep,
    GraphFiles,
    needed,
    network_parts,
    padded_rows,
)
from tiltscope.engine.runtime.schedule import Schedule
from tiltscope.engine.runtime.step import Step
from tiltscope.export.fold import fold, remove_remarks
from tiltscope.export.graphs import traced_graphs
from tiltscope.export.locate import Run, locate
from tiltscope.export.trace import StepGraph

WEIGHTS_SUFFIX = ".weights"
# Bytes of weights. A protocol buffer ends at 2^31 bytes, of which the graph itself takes a few million.
INSIDE_AT_MOST = 2**31 - 2**27
# 20 is the exporter's own; bfloat16 convolutions need 22.
OPSET = {torch.float32: 20, torch.float16: 20, torch.bfloat16: 22}


def write_onnx(
    graph: StepGraph,
    name: str,
    example: list[Tensor],
    path: Path,
    metadata: dict[str, str],
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    folded: bool = False,
) -> None:
    """One graph as a checked ONNX file; inputs and outputs are called as the graph of that `name` calls them, or as given.

    folded: what is computed from constants is written as a constant (export/fold.py). Raises RunnerError without onnx and
    onnxscript, ExportError where the file is not valid.
    """
    onnx = needed("onnx", "onnx")
    needed("onnxscript", "onnx")
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with hushed():
        program: Any = torch.onnx.export(
            graph,
            tuple(example),
            dynamo=True,
            verbose=False,
            input_names=list(inputs or INPUTS[name]),
            output_names=list(outputs or OUTPUTS[name]),
            dynamic_shapes=(tuple({0: batch} for _ in example),),
            opset_version=OPSET[example[0].dtype],
            # Engines fold constants and fuse at load anyway; here it would take longer than all the rest.
            optimize=False,
        )
    model = program.model_proto
    remove_remarks(model)
    if folded:
        fold(model)
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    large = sum(len(each.raw_data) for each in model.graph.initializer) > INSIDE_AT_MOST
    if large:
        # Changes the model: its weights are in the other file from here on.
        weights = path.with_suffix(WEIGHTS_SUFFIX)
        weights.unlink(missing_ok=True)  # or they would be appended to what is there
        onnx.save_model(model, path, save_as_external_data=True, location=weights.name, size_threshold=1024)
    try:
        onnx.checker.check_model(str(path) if large else model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"graph {name}: not valid ONNX ({error})") from error
    if not large:
        path.write_bytes(model.SerializeToString())


class OnnxExporter:
    """The runner `onnx` (and, reading the same files, `openvino`)."""

    artefact = "onnx"
    max_batch = MAX_BATCH

    def __init__(
        self,
        runner: str,
        open_graph: Callable[[Path], Engine],
        open_again: Callable[[Path], Engine],
        *,
        dtypes: tuple[str, ...],
        refused: Mapping[str, str],
    ) -> None:
        self.runner, self.dtypes, self.refused = runner, dtypes, refused
        self._open_graph, self._open_again = open_graph, open_again

    def facts(self) -> dict[str, Any]:
        """The opset is the exporter's affair, the engine's version that of the gate: files are the same for both."""
        return {}

    def build(self, prior: Prior, feature: Feature, dtype: torch.dtype, folder: Path) -> None:
        """Every graph of the step into `folder`."""
        wide = self.file_dtype(dtype)
        prior, feature = prior.to(wide), feature.to(wide)
        network_parts(prior, feature, self.runner)
        for module in ("onnx", "onnxscript", {"onnx": "onnxruntime"}.get(self.runner, self.runner)):
            needed(module, self.runner)
        write_graphs(prior, feature, self.runner, folder)

    def load(self, folder: Path, prior: Prior, feature: Feature, dtype: torch.dtype) -> Step:
        """The step from `folder`'s files."""
        denoiser, _, _ = network_parts(prior, feature, self.runner)
        files = GraphFiles(folder, self.opener(dtype, again=True))
        return ExportedStep(self.runner, denoiser, files, self.file_dtype(dtype), self.max_batch)

    def file_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What files hold, take and give whose networks compute in `dtype`."""
        return dtype

    def opener(self, dtype: torch.dtype, *, again: bool = False) -> Callable[[Path], Engine]:
        """What opens a file to compute in `dtype`. again: one of an artefact, as it was opened before."""
        return self._open_again if again else self._open_graph

    def cannot_run(self) -> str | None:
        return None

    def locate(self, prior: Prior, feature: Feature, dtype: torch.dtype) -> str:
        """Where a step built anew deviates, module by module, in this engine."""
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "tapped.onnx"

            def open_anew(graph: StepGraph, example: list[Tensor], outputs: list[str]) -> Run:
                write_onnx(graph, "guided", example, path, {}, outputs=outputs)
                engine = self.opener(dtype)(path)
                return lambda given: [
                    torch.from_numpy(each)
                    for each in engine({name: t.numpy() for name, t in zip(INPUTS["guided"], given, strict=True)})
                ]

            return locate(prior, feature, dtype, open_anew, files=self.file_dtype(dtype))


class OpenvinoExporter(OnnxExporter):
    """On a CPU a setting decides what OpenVINO computes in, not the file: that is float32 for bfloat16, too."""

    def file_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def opener(self, dtype: torch.dtype, *, again: bool = False) -> Callable[[Path], Engine]:
        told: Any = super().opener(dtype, again=again)
        return partial(told, precision="bf16" if dtype == torch.bfloat16 else "f32")


def write_graphs(prior: Prior, feature: Feature, runner: str, folder: Path) -> None:
    """FOLDER/<graph>.onnx for every graph, and schedule.json where the denoiser's conditioning can be told without torch."""
    denoiser, trunk, readout = network_parts(prior, feature, runner)
    rows = padded_rows(readout.num_rows)
    metadata = {
        "tiltscope.hook": trunk.hook,
        "tiltscope.prior": prior.identity,
        "tiltscope.rows": str(rows),
        "tiltscope.torch": torch.__version__,
    }
    if prior.network is not None:  # a function of one's own has no schedule to tell
        network: Any = denoiser.network
        Schedule(
            shape=tuple(prior.shape),
            rows=rows,
            levels=tuple(denoiser.levels.tolist()),
            prediction=denoiser.prediction,
            **network.time_proj.waves()._asdict(),
            time_scale=denoiser.facts.time_scale,
            sigma_data=denoiser.facts.sigma_data,
        ).write(folder)
    for name, graph, example in traced_graphs(prior, feature, runner, coarse=True):
        write_onnx(graph, name, example, folder / f"{name}.onnx", metadata)


_NO_FLOAT64 = "no file is written in float64, which is the reference's"
onnx_exporter = OnnxExporter(
    "onnx",
    onnx_step.open_graph,
    onnx_step.open_again,
    dtypes=("float32", "float16"),
    refused={"bfloat16": "ONNX Runtime has no bfloat16 convolution for a CPU", "float64": _NO_FLOAT64},
)
openvino_exporter = OpenvinoExporter(
    "openvino",
    openvino_step.open_graph,
    openvino_step.open_again,
    dtypes=("float32", "bfloat16"),
    refused={"float64": _NO_FLOAT64, "float16": "on a CPU it computes in float32 or bfloat16"},
)


@contextlib.contextmanager
def hushed() -> Generator[None]:
    """The exporter's advice (an absent torchvision, renamed axes) is not the user's to act on."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
