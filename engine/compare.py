"""compare(): every method at one mean activation: what it costs, how natural and how diverse its pictures are, how far it is
from the tilt.

Samplers (lift x solver x steps, and whole presets) are each calibrated on their own draws, so that all reach the same mean;
beside them the rivals: top-K, hard truncation, activation maximisation, and the same with the phase alone free (MaCo). Each
sampler is also drawn at other lambdas: the curve of activation against naturalness, and by thermodynamic integration its own KL.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tiltscope.engine.bundle import Bundle
from tiltscope.engine.calibration import calibrate_on_sampler
from tiltscope.engine.config import CompareConfig, ExplainConfig
from tiltscope.engine.errors import CalibrationError, NonFiniteError
from tiltscope.engine.explain import Inquiry, actmax_answer, inquire, pool_answer
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prior.likelihood import bits_per_dim
from tiltscope.engine.report.manifest import complete
from tiltscope.engine.report.metrics import embed, measure, pictures_of, vendi_score
from tiltscope.engine.report.robustness import robustness
from tiltscope.engine.run import Run, check_any_finite
from tiltscope.engine.samples import Samples, join
from tiltscope.engine.tilt.activation_law import excess_kl_lower_bound
from tiltscope.engine.tilt.ascent import Round, integrate
from tiltscope.engine.tilt.pool_rivals import hard_truncation, top_k

# A mean counts as the target's within this share of it, or two of its standard errors.
MATCHED = 0.05
RIVALS = ("topk", "hard", "actmax", "maco")
Kind = Literal["sampler", "rival"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One lambda of one sampler: mean activation and mean naturalness with their standard errors, over num pictures."""

    method: str
    lam: float
    activation: float
    activation_se: float
    naturalness: float | None
    naturalness_se: float | None
    num: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table. metrics: those of report/metrics.py and vendi, bits_per_dim, robustness_*; None: no such number.

    kl_source: pool (exact on it), integration (thermodynamic, the sampler's own) or None. excess_kl_kind: exact (of a pool
    rival), lower bound (from the law of the activation) or None. lam None: not a tilt. note: why something is missing.
    """

    name: str
    kind: Kind
    lam: float | None
    matched: bool
    metrics: dict[str, float | None]
    kl_source: str | None
    excess_kl_kind: str | None
    samples: Samples | None
    note: str | None = None

    def facts(self) -> dict[str, Any]:
        """All but the numbers and the pictures."""
        names = ("name", "kind", "lam", "matched", "kl_source", "excess_kl_kind", "note")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods at one target, the curves of the samplers over lambda, and the manifest."""

    feature: str
    feature_name: str | None
    target: float
    target_quantile: float
    methods: tuple[Method, ...]
    curves: tuple[Point, ...]
    manifest: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write page, plot, tables and manifest. Raises ConfigError where `folder` cannot hold them."""
        from tiltscope.engine.report.comparison import save_comparison

        return save_comparison(self, Path(folder))


def method_name(config: ExplainConfig) -> str:
    """ "dps, ddpm, 50 steps", or the preset's name where it is not the default one."""
    if config.preset != "calibrated":
        return config.preset
    filled = config.resolved()
    return f"{filled.lift}, {filled.solver}, {filled.steps} steps"


def compare(
    bundle: Bundle, feature: Feature | str, config: CompareConfig, *, on_part: Callable[[str], None] | None = None
) -> Comparison:
    """Calibrate, draw and measure every method of `config`. A sampler that cannot reach the target keeps its row, with a note.

    Raises ConfigError or CalibrationError, before anything is drawn, for what is wrong for all of them.
    """
    inquiries = [inquire(bundle, feature, each) for each in config.methods()]
    tell = on_part or _quiet
    methods: list[Method] = []
    curves: list[Point] = []
    for inquiry in inquiries:
        tell(f"drawing {method_name(inquiry.config)}")
        method, points = _sampler(inquiry, config)
        methods.append(method)
        curves += points
    first = inquiries[0]
    for rival in RIVALS:
        tell(f"making {rival}")
        methods.append(_rival(first, rival, config))
    facts: dict[str, Any] = {
        "command": "compare",
        "identity": config.identity("compare", bundle.identity, first.feature.identity),
        "bundle": bundle.describe(),
        "feature": first.feature.name,
        "feature_name": bundle.label(first.feature),
        "feature_identity": first.feature.identity,
        "prior": bundle.prior.identity,
        "config": config.to_json(),
        "target": first.target,
        "target_quantile": first.target_quantile,
        "methods": [each.facts() | {"metrics": each.metrics} for each in methods],
    }
    return Comparison(
        feature=first.feature.name,
        feature_name=facts["feature_name"],
        target=first.target,
        target_quantile=first.target_quantile,
        methods=tuple(methods),
        curves=tuple(curves),
        manifest=complete(facts),
    )


def _sampler(inquiry: Inquiry, config: CompareConfig) -> tuple[Method, list[Point]]:
    name, run = method_name(inquiry.config), inquiry.run
    try:
        run = calibrate_on_sampler(run, inquiry.target)
    except CalibrationError as error:
        return _without(name, str(error)), []
    lam = run.lam if isinstance(run.lam, float) else math.nan
    points: list[Point] = []
    rounds: list[Round] = [] if run.ascent is None else list(run.ascent.rounds)
    for factor in sorted({0.0, *config.lam_factors} - {1.0}):
        try:
            drawn = _drawn(replace(run, lam=lam * factor))
        except NonFiniteError as error:
            return _without(name, str(error)), points
        points.append(_point(name, lam * factor, drawn, _measure(drawn, inquiry, "tilt")))
        rounds.append(_round_of(drawn, run, lam * factor))
    started = time.perf_counter()
    samples = _drawn(run)
    seconds = (time.perf_counter() - started) / len(samples)
    rounds.append(_round_of(samples, run, lam))
    metrics = _measured(samples, inquiry, "tilt", config)
    points.append(_point(name, lam, samples, metrics))
    constant = inquiry.config.guidance == "constant"
    metrics["seconds"] = seconds
    metrics |= {"kl": None if constant else integrate(_between(rounds, lam), lam).kl, "log_z": None, "ess": None}
    bound = None
    if inquiry.calibration.feasible:
        activation = samples.activation[samples.ok].double().numpy()
        log_tilt = run.programme.log_tilts[0]
        bound = excess_kl_lower_bound(activation, inquiry.natural, inquiry.calibration.lam, log_tilt=log_tilt)
        metrics["excess_kl"] = bound
    return Method(
        name=name,
        kind="sampler",
        lam=lam,
        matched=_matched(metrics, inquiry.target),
        metrics=metrics,
        kl_source=None if constant else "integration",
        excess_kl_kind=None if bound is None else "lower bound",
        samples=samples,
    ), sorted(points, key=lambda each: each.lam)


def _drawn(run: Run) -> Samples:
    samples = join(run.draw())
    check_any_finite(samples, run.plan)
    return samples


def _point(name: str, lam: float, samples: Samples, metrics: dict[str, float | None]) -> Point:
    return Point(
        method=name,
        lam=lam,
        activation=metrics["activation_mean"] or 0.0,
        activation_se=metrics["activation_se"] or 0.0,
        naturalness=metrics["naturalness"],
        naturalness_se=metrics["naturalness_se"],
        num=int(samples.ok.sum()),
    )


def _rival(inquiry: Inquiry, rival: str, config: CompareConfig) -> Method:
    natural, num, target = inquiry.natural, inquiry.config.num, inquiry.target
    note, members = None, None
    if rival == "topk":
        samples = pool_answer(inquiry, top_k(natural, num))
    elif rival == "hard":
        hard = hard_truncation(natural, target, num, seed=inquiry.config.seed)
        samples, members = pool_answer(inquiry, hard.chosen), hard.members
    else:
        samples, note = actmax_answer(inquiry, target, phase_only=rival == "maco")
    metrics = _measured(samples, inquiry, rival if rival in ("topk", "hard") else "actmax", config, members)
    exact = metrics["excess_kl"] is not None
    return Method(
        name=rival,
        kind="rival",
        lam=None,
        matched=_matched(metrics, target),
        metrics=metrics,
        kl_source="pool" if metrics["kl"] is not None else None,
        excess_kl_kind="exact" if exact else None,
        samples=samples,
        note=note,
    )


def _measure(
    samples: Samples, inquiry: Inquiry, answer: str, members: NDArray[np.int64] | None = None
) -> dict[str, float | None]:
    return measure(
        samples,
        answer=answer,
        bundle=inquiry.bundle,
        feature=inquiry.feature,
        natural=inquiry.natural,
        log_tilt=inquiry.run.programme.log_tilts[0],
        tilt=inquiry.calibration if inquiry.calibration.feasible else None,
        seconds=None,
        members=members,
    )


def _measured(
    samples: Samples, inquiry: Inquiry, answer: str, config: CompareConfig, members: NDArray[np.int64] | None = None
) -> dict[str, float | None]:
    bundle, pictures = inquiry.bundle, pictures_of(samples, answer, inquiry.bundle)
    metrics = _measure(samples, inquiry, answer, members)
    left = robustness(inquiry.feature.on_pictures(), pictures, natural_mean=float(inquiry.natural.mean()))
    metrics |= {f"robustness_{name}": value for name, value in left.items()}
    metrics["vendi"] = None if bundle.meta.get("evaluator") is None else vendi_score(embed(bundle, pictures))
    # The density of latents is none of pictures, and a rival's pictures have no latents.
    asked = config.likelihood and bundle.decoder is None
    bits = bits_per_dim(bundle.prior, pictures, seed=config.seed) if asked else None
    metrics["bits_per_dim"] = None if bits is None else float(torch.mean(bits))
    return metrics


def _without(name: str, note: str) -> Method:
    """A sampler that did not come to the target: its row says why."""
    return Method(
        name=name,
        kind="sampler",
        lam=None,
        matched=False,
        metrics={},
        kl_source=None,
        excess_kl_kind=None,
        samples=None,
        note=note,
    )


def _matched(metrics: dict[str, float | None], target: float) -> bool:
    mean, se = metrics.get("activation_mean"), metrics.get("activation_se") or 0.0
    return mean is not None and abs(mean - target) <= max(MATCHED * abs(target), 2 * se)


def _round_of(samples: Samples, run: Run, lam: float) -> Round:
    phi = np.asarray(run.programme.log_tilts[0].phi(samples.activation[samples.ok].double().numpy()), np.float64)
    return Round(lam=lam, mean=float(phi.mean()), sd=float(phi.std(ddof=1)) if len(phi) > 1 else 0.0, num=len(phi))


def _between(rounds: Sequence[Round], lam: float) -> list[Round]:
    """What lies between 0 and `lam`; rounds closer together than a tenth of it are one, weighted by their numbers."""
    inside = sorted((each for each in rounds if 0 <= each.lam / lam <= 1), key=lambda each: abs(each.lam))
    merged: list[Round] = []
    for each in inside:
        last = merged[-1] if merged else None
        ends = each.lam in (0.0, lam) or (last is not None and last.lam == 0.0)
        if last is None or (ends and each.lam != last.lam) or abs(each.lam - last.lam) > 0.1 * abs(lam):
            merged.append(each)
            continue
        num = last.num + each.num
        merged[-1] = Round(
            lam=each.lam if each.lam == lam else (last.lam * last.num + each.lam * each.num) / num,
            mean=(last.mean * last.num + each.mean * each.num) / num,
            sd=math.sqrt((last.sd**2 * last.num + each.sd**2 * each.num) / num),
            num=num,
        )
    return merged


def _quiet(part: str) -> None:
    pass
