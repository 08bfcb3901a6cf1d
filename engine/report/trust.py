"""How far to trust an explanation, line by line: what was drawn, what it reached, what carries it. Words, no markup."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from tiltscope.engine.report.metrics import ess_in_words, prior_warning
from tiltscope.engine.report.words import MISSING, number, percent, pictures_for, sentence
from tiltscope.engine.samples import Explanation
from tiltscope.engine.tilt.log_tilt import parse_log_tilt


@dataclass(frozen=True)
class Trust:
    """One line of "How far to trust this"."""

    what: str
    value: str
    sentence: str


def trust_lines(explanation: Explanation, manifest: Mapping[str, Any], spec: str) -> list[Trust]:
    """Every line; spec: the log-tilt's text. Numbers that the manifest has with a source are taken from there."""
    calibration, tilt = explanation.calibration, explanation.answers["tilt"]
    labels = {
        "approximate": "Guidance plugs one estimate of the clean picture into the reweighting: the draws approximate the tilt, "
        "and how closely is not known.",
        "consistent": "The draws converge to the tilt of the discretised prior.",
        "coupled": "The draws of a batch push each other: together they are no independent draws of the tilt.",
        "started": "The draws set out from a given picture: they keep some of it, and are no draws of the tilt.",
    }
    lines = [
        Trust("Draws", tilt.target, labels.get(tilt.target, "")),
        _reached(explanation, spec),
        _support(explanation, manifest),
        Trust("Tilt", f"λ = {number(explanation.lam, 3)}", _weighting(spec) + _calibrated(explanation, manifest)),
    ]
    if (kl := _value(manifest, "kl", calibration.kl)) is not None:
        lines.append(
            Trust(
                "Distance from natural",
                f"KL = {number(kl)} nats",
                f"It takes {pictures_for(kl)} to meet one such as these. Estimated from {_source(manifest, 'kl')}.",
            )
        )
    if (log_z := _value(manifest, "log_z", calibration.log_z)) is not None:
        error = as_mapping(manifest.get("log_z")).get("se")
        value = f"log Z = {number(log_z)}{f' ± {number(error)}' if error is not None else ''} nats"
        lines.append(Trust("Normaliser", value, f"Estimated from {_source(manifest, 'log_z')}."))
    if math.isfinite(explanation.prior_mean):
        away = abs(explanation.prior_mean - explanation.natural_mean)
        errors = (
            f"{number(away / explanation.prior_mean_se, 1)} standard errors apart"
            if explanation.prior_mean_se > 0
            else ""
        )
        num = as_mapping(manifest.get("prior_check")).get("num")
        lines.append(
            Trust(
                "Prior against pool",
                f"{number(explanation.prior_mean)} ± {number(explanation.prior_mean_se)}",
                sentence(
                    f"mean activation of {f'{num} ' if num else ''}unguided draws; natural pictures have "
                    f"{number(explanation.natural_mean)}{f': {errors}' if errors else ''}"
                ),
            )
        )
    return lines


def _support(explanation: Explanation, manifest: Mapping[str, Any]) -> Trust:
    calibration = explanation.calibration
    if _value(manifest, "ess", calibration.ess) is None:
        return Trust("Support", MISSING, "The target lies beyond what the natural pictures of the pool can carry.")
    return Trust(
        "Support",
        f"ESS {number(calibration.ess, 1)}",
        sentence(
            f"{ess_in_words(calibration.ess)}; the heaviest of {len(explanation.natural):,} has "
            f"{percent(calibration.max_weight)} of the weight"
        ),
    )


def _calibrated(explanation: Explanation, manifest: Mapping[str, Any]) -> str:
    ascent = as_mapping(manifest.get("ascent"))
    if not ascent:
        return ""
    num = sum(int(as_mapping(each).get("num", 0)) for each in ascent.get("rounds", ()))
    return (
        f" Calibrated on {num} draws of the sampler, to a mean of {number(ascent.get('target'))} ± {number(ascent.get('se'))}; "
        f"natural pictures alone would say λ = {number(explanation.calibration.lam, 3)}."
    )


def _weighting(spec: str) -> str:
    if spec == "linear":
        return "Per unit of activation: natural pictures are reweighted by exp(λ · activation)."
    return f"Per unit of φ: natural pictures are reweighted by exp(λ · φ(activation)), φ = {spec}."


def _reached(explanation: Explanation, spec: str) -> Trust:
    tilt = explanation.answers["tilt"]
    phi = parse_log_tilt(spec).phi(tilt.activation[tilt.ok].double().numpy())
    target = explanation.target
    if len(phi) == 0:
        return Trust("Reached", MISSING, f"No draw is finite; wanted was {number(target)}.")
    mean = float(phi.mean())
    if len(phi) == 1:
        return Trust("Reached", number(mean), f"Wanted: {number(target)}. One draw has no standard error.")
    error = float(phi.std(ddof=1)) / math.sqrt(len(phi))
    side = "above" if mean > target else "below"
    apart = f", {number(abs(mean - target) / error, 1)} standard errors {side}" if error > 0 else ""
    return Trust(
        "Reached", f"{number(mean)} ± {number(error)}", f"Wanted: {number(target)}. Mean of {len(phi):,} draws{apart}."
    )


def warning_lines(explanation: Explanation) -> list[str]:
    """The explanation's own, and the prior's disagreement with the pool should it not be among them."""
    told = list(explanation.warnings)
    if math.isfinite(explanation.prior_mean) and math.isfinite(explanation.prior_mean_se):
        found = prior_warning(explanation.natural_mean, explanation.prior_mean, explanation.prior_mean_se)
        told += [found] if found and found not in told else []
    return [sentence(each) for each in told]


def _value(manifest: Mapping[str, Any], name: str, otherwise: float) -> float | None:
    return as_mapping(manifest.get(name)).get("value", otherwise)


def _source(manifest: Mapping[str, Any], name: str) -> str:
    source = (
        as_mapping(manifest.get(name)).get("source") or as_mapping(manifest.get("calibration")).get("source") or "pool"
    )
    words = {"pool": "the natural pictures of the pool", "smc": "the weights of the particles"}
    return words.get(str(source), str(source))


def log_tilt_spec(manifest: Mapping[str, Any]) -> str:
    """The log-tilt that a manifest's settings name."""
    return str(as_mapping(manifest.get("config")).get("log_tilt") or "linear")


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A manifest's entry where it is an object, else an empty one: other versions may not have it."""
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}
