"""`--runner auto`: a short trial of the runners that this machine has, and of those that pass the gate the fastest.

    candidates   torch; every registered runner whose files are built; and those that run the ONNX files, which are built here
                 where they are missing (a minute or two). `compile` takes many minutes to build, so it is tried only where
                 `tiltscope export --runner compile` has been
    trial        a guided row of the run's bucket, all candidates in turn, after the gate that every load goes through; each as it
                 runs while it draws: right after a row of its own, torch on one thread where its engine has threads of its own
    kept         in TILTSCOPE_HOME/choices, under the hash of networks, hook, dtype, bucket, versions, processor, threads and
                 candidates: another of these is another trial

A chosen runner stays chosen as long as the file is there, so that the same command continues the same run.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from tiltscope.engine.bench.timing import interleave
from tiltscope.engine.errors import ParityError, RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.report.atomic import write_bytes
from tiltscope.engine.runtime.artefact import artefact_key, cached
from tiltscope.engine.runtime.cache import kept_file
from tiltscope.engine.runtime.cpu import cpu_features
from tiltscope.engine.runtime.runners import REFERENCE, Exporter, Gated, exporter, key_facts, registered, step_for
from tiltscope.engine.runtime.step import guided_as_in_a_tick
from tiltscope.engine.sampler.noise import STREAM_START, normal
from tiltscope.kernels.implementation import Implementation

SECONDS = 2.0
# Built where missing: as cheap as a build gets, and two runners read them.
CHEAP_TO_BUILD = ("onnx",)
_SIGMA = 0.8
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The runner taken, and why. ms: p50 of a guided row of `bucket`, by runner; refused: why another one was not timed."""

    runner: str
    bucket: int
    ms: dict[str, float] = field(default_factory=dict[str, float])
    refused: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def why(self) -> str:
        """A sentence."""
        others = sorted((ms, name) for name, ms in self.ms.items() if name != self.runner)
        if not others:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
            return f"runner {self.runner}: the only one there is here ({why or 'no other is installed'})"
        told = ", ".join(f"{name} {ms:.1f}" for ms, name in others)
        return f"runner {self.runner}: {self.ms[self.runner]:.1f} ms a guided row of {self.bucket}, {told}"

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self) | {"why": self.why}


def choose(
    prior: Prior, feature: Feature, dtype: torch.dtype, *, bucket: int, kernels: Implementation = "reference"
) -> tuple[Choice, Gated]:
    """The choice for these networks in batches of `bucket`, made now or kept from before, and the gated step of it."""
    if prior.network is None or feature.trunk is None:
        why = "a prior or a feature that is a Python function runs in torch alone"
        return _taken(Choice(runner=REFERENCE, bucket=bucket, refused={"others": why})), step_for(
            REFERENCE, prior, feature, dtype, kernels=kernels
        )
    candidates, refused = _candidates(prior, feature, dtype)
    facts = {
        "cpu": cpu_features(),
        "threads": torch.get_num_threads(),
        "bucket": bucket,
        "candidates": candidates,
        "kernels": kernels,
    }
    key = artefact_key("auto", prior, feature, dtype, facts)
    path = kept_file("choices", key)
    if path.is_file():
        choice = Choice(**json.loads(path.read_text()))
        return _taken(choice), step_for(choice.runner, prior, feature, dtype, kernels=kernels)
    steps: dict[str, Gated] = {}
    for name in candidates:
        try:
            steps[name] = step_for(name, prior, feature, dtype, kernels=kernels)
        except (ParityError, RunnerError) as error:
            refused[name] = str(error)
    ways = {name: _row(gated, prior, feature, dtype, bucket) for name, gated in steps.items()}
    timings = interleave(ways, seconds=SECONDS, settle=True)
    ms = {name: timing.p50 for name, timing in timings.items()}
    choice = Choice(runner=min(ms, key=lambda name: ms[name]), bucket=bucket, ms=ms, refused=refused)
    write_bytes(path, json.dumps(asdict(choice)).encode())
    return _taken(choice), steps[choice.runner]


def _candidates(prior: Prior, feature: Feature, dtype: torch.dtype) -> tuple[list[str], dict[str, str]]:
    """Runners to try, torch first, and why others are not."""
    built = [key for _, key in cached()]
    candidates, refused = [REFERENCE], dict[str, str]()
    for name in sorted(registered()):
        chosen = exporter(name)
        if (why := _hindrance(chosen, prior, feature, dtype, built)) is None:
            candidates.append(name)
        else:
            refused[name] = why
    return candidates, refused


def _hindrance(
    chosen: Exporter, prior: Prior, feature: Feature, dtype: torch.dtype, built: list[dict[str, Any] | None]
) -> str | None:
    try:
        missing = chosen.cannot_run()
    except RunnerError as error:  # its library is not installed
        missing = str(error)
    if missing is not None:
        return missing
    if str(dtype).removeprefix("torch.") not in chosen.dtypes:
        return f"has no {str(dtype).removeprefix('torch.')}"
    key = artefact_key(chosen.artefact, prior.to(dtype), feature.to(dtype), dtype, key_facts(chosen))
    if chosen.artefact not in CHEAP_TO_BUILD and key not in built:
        return "not built; tiltscope export builds it"
    return None


def _row(gated: Gated, prior: Prior, feature: Feature, dtype: torch.dtype, bucket: int) -> Callable[[], object]:
    x = torch.stack([torch.from_numpy(normal(0, at, 0, STREAM_START, shape=prior.shape)) for at in range(bucket)])
    sigma = torch.full((bucket,), _SIGMA, dtype=torch.float64)
    readout = None if feature.readout is None else feature.readout.expand(bucket)
    return partial(
        guided_as_in_a_tick,
        gated.step,
        x.to(torch.promote_types(dtype, torch.float32)),
        sigma,
        (1 - sigma * sigma).sqrt(),
        readout,
    )


def _taken(choice: Choice) -> Choice:
    logger.info("%s", choice.why)
    return choice
