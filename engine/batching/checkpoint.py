"""A batcher's unanswered requests in one .safetensors file: the slots as tensors, the rest as JSON in its metadata."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tiltscope.engine.batching.request import Request, Sample
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prepare import prepare
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.report.atomic import write_bytes
from tiltscope.engine.run import Run
from tiltscope.engine.sampler.state import SLOT_TENSORS, HostRows, SlotState
from tiltscope.engine.tilt.ascent import Ascent

FORMAT = "tiltscope batch 2"


def write_checkpoint(path: Path, requests: Sequence[Request]) -> None:
    """Raises ConfigError for a request whose feature is a function: nothing in a file could bring it back."""
    facts, tensors = list[dict[str, Any]](), dict[str, Tensor]()
    for at, request in enumerate(requests):
        facts.append(_facts(request))
        for index, sample in (request.live | request.finished).items():
            tensors |= {f"{at}.{index}.{name}": getattr(sample.state, name).clone() for name in SLOT_TENSORS}
    write_bytes(path, save(tensors, {"format": FORMAT, "requests": json.dumps(facts)}))


def read_checkpoint(
    path: Path, prior: Prior, feature_of: Callable[[str], Feature], own: Mapping[str, Any]
) -> list[Request]:
    """The requests of a checkpoint, with the samples that were being drawn where they were.

    own: the engine's batch_size, runner and dtype. Raises BundleError for a file that is damaged or of another prior or
    feature, ConfigError where `own` is not what it was written with.
    """
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
        if metadata.get("format") != FORMAT:
            raise BundleError(f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}")
        facts: list[dict[str, Any]] = json.loads(metadata["requests"])
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise BundleError(f"{path}: no readable checkpoint ({error})") from error
    return [_request(path, at, each, tensors, prior, feature_of, own) for at, each in enumerate(facts)]


def _facts(request: Request) -> dict[str, Any]:
    run = request.run
    if not run.feature.terms:
        raise ConfigError(
            f"{request.name}: its feature {run.feature.name!r} is a function, which no checkpoint can hold"
        )
    return {
        "name": request.name,
        "terms": [[weight, str(address)] for weight, address in run.feature.terms],
        "feature": run.feature.identity,
        "prior": run.prior.identity,
        "config": run.config.to_json(),
        "lam": list(run.lam.items()) if isinstance(run.lam, dict) else run.lam,
        "ascent": None if run.ascent is None else run.ascent.to_json(),
        "waiting": list(request.waiting),
        # Those that are done are among them: they are measured again, with the same result.
        "started": {index: sample.row for index, sample in (request.live | request.finished).items()},
    }


def _request(
    path: Path,
    at: int,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    prior: Prior,
    feature_of: Callable[[str], Feature],
    own: Mapping[str, Any],
) -> Request:
    config = SampleConfig.from_json(facts["config"])
    if was := {name: getattr(config, name) for name, value in own.items() if getattr(config, name) != value}:
        given = {name: own[name] for name in was}
        raise ConfigError(f"{path}: written with {was}, got {given}; resume with what it was written with")
    terms = [weight * feature_of(address) for weight, address in facts["terms"]]
    feature = terms[0] if facts["terms"][0][0] != 1.0 else feature_of(facts["terms"][0][1])
    for term in terms[1:]:
        feature = feature + term
    if (prior.identity, feature.identity) != (facts["prior"], facts["feature"]):
        raise BundleError(f"{path}: written with another bundle: its {facts['feature']} is not this one's")
    lam = {int(index): value for index, value in facts["lam"]} if isinstance(facts["lam"], list) else facts["lam"]
    ascent = None if facts["ascent"] is None else Ascent.from_json(facts["ascent"], "cache")
    run = replace(prepare(prior, feature, config), lam=lam, ascent=ascent)
    request = Request(run, name=facts["name"])
    request.waiting.clear()
    request.waiting.extend(facts["waiting"])
    for index, row in facts["started"].items():
        request.live[int(index)] = Sample(request, int(index), _slots(run, tensors, f"{at}.{index}", row), row)
    return request


def _slots(run: Run, tensors: Mapping[str, Tensor], prefix: str, row: int) -> SlotState:
    values = {name: tensors[f"{prefix}.{name}"] for name in SLOT_TENSORS}
    num = len(values["row"])
    readout = run.feature.readout
    tilted = tuple((values["lam"] != 0).tolist())
    host = HostRows(plan=(0,) * num, row=(row,) * num, tilted=tilted)
    return SlotState(**values, readout=None if readout is None else readout.expand(num), host=host)
