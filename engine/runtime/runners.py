"""Which runner executes a step, by name. A runner that is not asked for is never imported, and none is substituted."""

from collections.abc import Callable

from tiltscope.engine.errors import RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.step import Step, TorchStep

RUNNERS: dict[str, Callable[[Prior, Feature], Step]] = {"torch": TorchStep}


def step_for(runner: str, prior: Prior, feature: Feature) -> Step:
    """The runner's step for this prior and feature. Raises RunnerError for a name that is not in RUNNERS."""
    if runner not in RUNNERS:
        raise RunnerError(f"runner: got {runner!r}, available here: {', '.join(RUNNERS)}")
    return RUNNERS[runner](prior, feature)
