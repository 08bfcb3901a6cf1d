"""Graphs that torch's own compiler (Inductor) built ahead of time, behind the step's protocol. Written by export/compiled.py.

What is loaded is machine code for any batch. No compiler runs here, so nothing is compiled again: tests/export/test_compiled.py
loads and runs it where there is none.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltscope.engine.errors import RunnerError

SUFFIX = ".pt2"
MODEL = "model"  # aoti_compile_and_package's name for the one program in a file


class CompiledGraphs:
    """FOLDER/<graph>.pt2 as a RunGraph; a file is opened at its graph's first call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, graph: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        if graph not in self._opened:
            self._opened[graph] = open_graph(self._folder / f"{graph}{SUFFIX}")
        return list(self._opened[graph](*(each.detach().contiguous() for each in inputs)))


def open_graph(path: Path) -> Callable[..., Sequence[Tensor]]:
    """The program in a .pt2 file. Raises RunnerError where this torch or this processor cannot load it.

    By torch's own loader, as `aoti_load_package` calls it after a look at the processor. That look loads a probe for every vector
    width, in a process each: a second and more, for what the artefact's key has said already.
    """
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), MODEL, False, 1, -1)  # pyright: ignore
    except (RuntimeError, OSError) as error:
        raise RunnerError(
            f"runner compile: {path} cannot be loaded here ({error}); remove its folder and run again"
        ) from error

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        return loader.boxed_run(list(inputs))

    return run
