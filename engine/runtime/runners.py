"""Which runner executes a step, by name. A runner that is not asked for is never imported, and none is substituted.

"torch" is built in. Others register an Exporter under the entry-point group below. The first use of such a runner calls the one
hook, `build_step`, which builds an artefact; every use loads the artefact and holds it to its stored self-test before it is
trusted (gate.py). This module imports no torch: the command line's --help reads the names.
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tiltscope.engine.errors import RunnerError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from tiltscope.engine.feature.feature import Feature
    from tiltscope.engine.prior.prior import Prior
    from tiltscope.engine.runtime.artefact import Artefact
    from tiltscope.engine.runtime.step import Step

GROUP = "tiltscope.runners"
REFERENCE = "torch"


@runtime_checkable
class Exporter(Protocol):
    """What an entry point of GROUP is: it builds an artefact's files, and loads a step from them."""

    artefact: str
    """what its files are called in the cache's key; exporters that read the same files say the same"""

    def build(self, prior: "Prior", feature: "Feature", dtype: "torch.dtype", folder: "Path") -> None: ...

    def load(self, folder: "Path", prior: "Prior", feature: "Feature", dtype: "torch.dtype") -> "Step": ...


@cache
def registered() -> dict[str, Callable[[], Exporter]]:
    """What loads each exporter, by its name. Read once: looking through every distribution takes as long as a row."""
    return {entry.name: entry.load for entry in entry_points(group=GROUP)}


def runner_names() -> tuple[str, ...]:
    """The runners that can be asked for here."""
    return (REFERENCE, *sorted(registered()))


def exporter(runner: str) -> Exporter:
    """The exporter registered under this name. Raises RunnerError where there is none."""
    if runner not in registered():
        raise RunnerError(f"runner: got {runner!r}, available here: {', '.join(runner_names())}")
    return registered()[runner]()


def step_for(runner: str, prior: "Prior", feature: "Feature", dtype: "torch.dtype") -> "Step":
    """The runner's step for this prior and feature, gated. Raises RunnerError, BundleError or ParityError."""
    from tiltscope.engine.runtime.step import TorchStep

    if runner == REFERENCE:
        return TorchStep(prior, feature)
    from tiltscope.engine.runtime.gate import check_step

    artefact = build_step(runner, prior, feature, dtype)
    step = exporter(runner).load(artefact.folder, prior, feature, dtype)
    check_step(step, artefact.self_test, dtype)
    return step


def build_step(runner: str, prior: "Prior", feature: "Feature", dtype: "torch.dtype") -> "Artefact":
    """The hook that exporters fill: the runner's artefact, built now where the cache has none.

    Raises RunnerError for an unknown runner or an unsafe cache, and what the exporter raises.
    """
    import torch

    from tiltscope.engine.runtime.artefact import artefact_key, obtain
    from tiltscope.engine.runtime.gate import SelfTest, record_self_test
    from tiltscope.engine.runtime.step import TorchStep

    chosen = exporter(runner)

    def self_test() -> SelfTest:
        reference = TorchStep(prior.to(torch.float64), feature.to(torch.float64))
        return record_self_test(reference, prior.shape, feature.readout)

    return obtain(
        artefact_key(chosen.artefact, prior, feature, dtype),
        lambda folder: chosen.build(prior, feature, dtype, folder),
        self_test,
    )
