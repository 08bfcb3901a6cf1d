"""Which runner executes a step, by name. A runner that is not asked for is never imported, and none is substituted.

"torch" is built in. Others register an Exporter under the entry-point group below. The first use of such a runner calls the one
hook, `build_step`, which builds an artefact; every use loads the artefact and holds each of its graphs to the stored self-test
before it is trusted (gate.py, held.py). This module imports no torch: the command line's --help reads the names.
"""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from tiltscope.engine.errors import RunnerError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from tiltscope.engine.feature.feature import Feature
    from tiltscope.engine.prior.prior import Prior
    from tiltscope.engine.runtime.artefact import Artefact
    from tiltscope.engine.runtime.step import Step
    from tiltscope.kernels.implementation import Implementation

GROUP = "tiltscope.runners"
REFERENCE = "torch"
# Asks for the fastest of them (auto.py).
AUTO = "auto"
logger = logging.getLogger(__name__)


@runtime_checkable
class Exporter(Protocol):
    """What an entry point of GROUP is: it builds an artefact's files, and loads a step from them."""

    artefact: str
    """what its files are called in the cache's key; exporters that read the same files say the same"""
    dtypes: tuple[str, ...]
    """what its networks can compute in"""
    refused: Mapping[str, str]
    """what they cannot, where there is a reason to tell: dtype to a clause"""
    max_batch: int
    """the largest batch its files serve"""

    def facts(self) -> dict[str, Any]:
        """What else its files depend on, for the key."""
        ...

    def build(self, prior: "Prior", feature: "Feature", dtype: "torch.dtype", folder: "Path") -> None: ...

    def load(self, folder: "Path", prior: "Prior", feature: "Feature", dtype: "torch.dtype") -> "Step": ...

    def cannot_run(self) -> str | None:
        """What this machine lacks to run the files, which it may build all the same; None where it can."""
        ...

    def locate(self, prior: "Prior", feature: "Feature", dtype: "torch.dtype") -> str:
        """A sentence: in a step built anew, the first module whose output, or gradient, is not the reference's."""
        ...


def cannot_run(runner: str) -> str | None:
    """What this machine lacks to run this runner's files, in a sentence; None where nothing."""
    return exporter(runner).cannot_run()


class Gated(NamedTuple):
    """A step, what its self-test gave, and why it should not have passed: None, unless that was allowed.

    parity: the errors of the graph `guided` by its outputs' names; a graph that is held later (held.py) adds its own, as
    "graph.output".
    """

    step: "Step"
    parity: dict[str, float] | None
    failure: str | None


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


def key_facts(chosen: Exporter) -> dict[str, Any]:
    """What an exporter adds to the key of its files."""
    return chosen.facts() | {"max_batch": chosen.max_batch}


def step_for(
    runner: str,
    prior: "Prior",
    feature: "Feature",
    dtype: "torch.dtype",
    *,
    allow_parity_failure: bool = False,
    kernels: "Implementation" = "reference",
) -> Gated:
    """The runner's step for this prior and feature, held to its artefact's self-test.

    kernels: of the ops around the trunk, with the runner torch; the graphs of others hold the definitions. Raises RunnerError,
    BundleError, or ParityError saying where the error enters; allow_parity_failure logs that instead.
    """
    from tiltscope.engine.errors import ParityError
    from tiltscope.engine.runtime.step import TorchStep

    if runner == REFERENCE:
        return Gated(TorchStep(prior, feature, kernels=kernels), None, None)
    from tiltscope.engine.runtime.gate import check_errors
    from tiltscope.engine.runtime.held import AT_LOAD, GRAPHS, HeldStep

    chosen = exporter(runner)
    if missing := chosen.cannot_run():  # before a build of minutes that would be for nothing
        raise RunnerError(f"runner {runner}: {missing}")
    artefact = build_step(runner, prior, feature, dtype)
    parity: dict[str, float] = {}
    failures: list[str] = []

    def judge(graph: str, errors: dict[str, float]) -> None:
        parity.update(errors if graph == AT_LOAD else {f"{graph}.{name}": error for name, error in errors.items()})
        try:
            check_errors(errors, dtype, runner, graph)
        except ParityError as error:
            message = f"{error}; {chosen.locate(prior, feature, dtype)} (files: {artefact.folder})"
            if not allow_parity_failure:
                raise ParityError(message) from error
            logger.warning("parity failure allowed: %s", message)
            failures.append(message)

    step = HeldStep(chosen.load(artefact.folder, prior, feature, dtype), artefact.self_test, dtype, judge)
    # What is allowed to fail is said at once and as a whole: the run's manifest holds it.
    step.hold(*(GRAPHS if allow_parity_failure else (AT_LOAD,)))
    return Gated(step, parity, " | ".join(failures) or None)


def build_step(runner: str, prior: "Prior", feature: "Feature", dtype: "torch.dtype") -> "Artefact":
    """The hook that exporters fill: the runner's artefact, built now where the cache has none.

    Raises RunnerError for an unknown runner, a dtype it does not have or an unsafe cache, and what the exporter raises.
    """
    import torch

    from tiltscope.engine.runtime.artefact import artefact_key, obtain
    from tiltscope.engine.runtime.gate import SelfTest, record_self_test, smoothed
    from tiltscope.engine.runtime.step import TorchStep

    chosen = exporter(runner)
    if (asked := str(dtype).removeprefix("torch.")) not in chosen.dtypes:
        why = f" ({chosen.refused[asked]})" if asked in chosen.refused else ""
        raise RunnerError(
            f"runner {runner}: got dtype {asked}, allowed here: {', '.join(chosen.dtypes)}{why}; or use --runner torch"
        )

    def self_test() -> SelfTest:
        reference = TorchStep(prior.to(torch.float64), feature.to(torch.float64))
        return record_self_test(reference, prior.shape, smoothed(feature.readout, dtype))

    # Cast here, once: the reference above keeps the weights that were loaded, so what a narrow dtype rounds away counts as error.
    cast_prior, cast_feature = prior.to(dtype), feature.to(dtype)
    return obtain(
        artefact_key(chosen.artefact, cast_prior, cast_feature, dtype, key_facts(chosen)),
        lambda folder: chosen.build(cast_prior, cast_feature, dtype, folder),
        self_test,
    )
