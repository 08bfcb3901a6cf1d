"""Which runner executes a step, by name. A runner that is not asked for is never imported, and none is substituted.

"torch" is built in. Others register a builder under the entry-point group below; the first use of a runner calls the one
hook, `build_step`, which loads that builder and holds its step to the reference before it is trusted (gate.py). This module
imports no torch: the command line's --help reads the names.
"""

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from tiltscope.engine.errors import RunnerError

if TYPE_CHECKING:
    import torch

    from tiltscope.engine.feature.feature import Feature
    from tiltscope.engine.prior.prior import Prior
    from tiltscope.engine.runtime.step import Step

GROUP = "tiltscope.runners"
REFERENCE = "torch"


def runner_names() -> tuple[str, ...]:
    """The runners that can be asked for here."""
    return (REFERENCE, *sorted(entry.name for entry in entry_points(group=GROUP)))


def step_for(runner: str, prior: "Prior", feature: "Feature", dtype: "torch.dtype") -> "Step":
    """The runner's step for this prior and feature. Raises RunnerError for a name nobody registered."""
    from tiltscope.engine.runtime.step import TorchStep

    if runner == REFERENCE:
        return TorchStep(prior, feature)
    return build_step(runner, prior, feature, dtype)


def build_step(runner: str, prior: "Prior", feature: "Feature", dtype: "torch.dtype") -> "Step":
    """The hook that an exporter fills: load the runner's builder, build, and gate the result against the reference.

    Raises RunnerError for an unknown runner, ParityError where the built step differs from the reference.
    """
    import torch

    from tiltscope.engine.runtime.gate import check_step, record_self_test
    from tiltscope.engine.runtime.step import TorchStep

    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if runner not in found:
        raise RunnerError(f"runner: got {runner!r}, available here: {', '.join(runner_names())}")
    step: Step = found[runner].load()(prior, feature, dtype)
    reference = TorchStep(prior.to(torch.float64), feature.to(torch.float64))
    check_step(step, record_self_test(reference, prior.shape, feature.readout), dtype)
    return step
