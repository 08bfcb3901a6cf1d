"""explain(): what a feature means, in four answers side by side, with the numbers that say how far to trust each.

    tilt     draws from  p(x) exp(lam phi(a(x))) / Z         KL-minimal among all distributions with its mean activation
    topk     the pool's strongest pictures                    a hard constraint on a finite set
    hard     pool pictures above a threshold                   the threshold whose mean above it is the tilt's
    actmax   activation maximisation                           one mode, under a regulariser that is not p

The three rivals are held to the activation that the tilt reached, so what is compared is what else they are.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tiltscope.engine.bundle import Bundle
from tiltscope.engine.calibration import calibrate_on_sampler
from tiltscope.engine.choice import parse_choice
from tiltscope.engine.config import ExplainConfig, SampleConfig
from tiltscope.engine.errors import CalibrationError, ConfigError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prepare import prepare
from tiltscope.engine.prior.prior import to_pixels
from tiltscope.engine.report.manifest import complete
from tiltscope.engine.report.metrics import measure, prior_warning, standard_error
from tiltscope.engine.run import OnStep, Run, check_any_finite, failures
from tiltscope.engine.samples import Explanation, Samples, join
from tiltscope.engine.tilt.actmax import activation_maximisation, natural_magnitude
from tiltscope.engine.tilt.calibrate import (
    Calibration,
    calibrate,
    default_target,
    estimates,
    largest_reachable,
    quantile_of,
    target_at_quantile,
    tilted_mean,
)
from tiltscope.engine.tilt.log_tilt import LOG_TILTS, LogTilt
from tiltscope.engine.tilt.pool_rivals import hard_truncation, top_k
from tiltscope.engine.unguided import CALIBRATION_BATCH, unguided_activations

SAMPLE_SETTINGS = tuple(each.name for each in fields(SampleConfig))
# Unguided draws that say whether the sampler's prior is the p that the pool calibrates.
PRIOR_CHECK_NUM = 32
# Pool pictures whose mean spectrum MaCo holds.
MAGNITUDE_NUM = 1024
# What answer() does in turn, and how it is called where a person watches.
PARTS = {
    "calibration": "calibrating lambda on the sampler",
    "tilt": "drawing the tilt",
    "prior_check": "checking the prior against the pool",
    "pool_rivals": "picking from the pool",
    "actmax": "maximising the activation",
    "metrics": "measuring the four answers",
}
OnPart = Callable[[str], None]


@dataclass
class _Stopwatch:
    """Wall seconds by component, each announced as it begins."""

    announce: OnPart | None
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def __call__(self, component: str) -> Generator[None]:
        if self.announce is not None:
            self.announce(PARTS[component])
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[component] = self.seconds.get(component, 0.0) + time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """A checked request: the feature, its natural activations, and a Run whose lambda reaches the target on the pool.

    Where the target lies beyond the pool, calibration is that of the furthest mean which the pool carries, and not feasible.
    """

    bundle: Bundle
    feature: Feature
    config: ExplainConfig
    natural: NDArray[np.float64]
    target: float
    target_quantile: float
    calibration: Calibration
    run: Run

    @property
    def identity(self) -> str:
        """Same identity, same pictures: over bundle, feature and every setting but num and batch_size."""
        return self.config.identity("explain", self.bundle.identity, self.feature.identity)


def explain(
    bundle: Bundle,
    feature: Feature | str,
    *,
    target_quantile: float | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Explanation:
    """The main job: four answers to what `feature` means, and their numbers.

    settings: every keyword of sample(). At most one of lam, target_activation, target_quantile, target_z (natural standard
    deviations above the natural mean) and target_max_multiple (of the largest natural activation); without any, the largest
    target that at least 10 effective natural pictures carry. Unless lam is given it is calibrated on the sampler itself
    (calibration="pool": on natural pictures alone), and remembered. Raises as sample() does; TypeError for an unknown keyword.
    """
    for name in ("lam", "indices", "guidance_interval"):
        if isinstance(settings.get(name), Sequence) and not isinstance(settings[name], str):
            settings[name] = tuple(settings[name])
    config = ExplainConfig(target_quantile=target_quantile, **settings)
    return answer(inquire(bundle, feature, config), on_step=on_step)


def inquire(bundle: Bundle, feature: Feature | str, config: ExplainConfig) -> Inquiry:
    """Check the request and find lambda; nothing is drawn. Raises ConfigError or CalibrationError."""
    config = config.resolved()
    if config.guidance == "constant" and config.lam is not None:
        raise ConfigError(
            "lam: with guidance constant it is a scale, which has no target; give a target, or use sample"
        )
    feature = bundle.feature(feature) if isinstance(feature, str) else feature
    if bundle.decoder is not None and feature.trunk is None:
        raise ConfigError(
            f"feature {feature.name} is a function of the prior's latents, and the rivals are pictures; give a feature of the "
            "bundle, or use sample"
        )
    log_tilt: LogTilt = parse_choice(config.log_tilt, LOG_TILTS, "log_tilt")
    natural = bundle.pool.activations(feature)
    target, calibration = _target(config, natural, log_tilt)
    lam = config.lam if isinstance(config.lam, tuple) else calibration.lam
    settings = {name: value for name, value in config.to_json().items() if name in SAMPLE_SETTINGS}
    asked = SampleConfig.from_json(settings | {"lam": lam, "target_activation": None})
    run = prepare(bundle.prior, feature, asked)
    if run.natural is None:  # a prior or a feature of one's own: the bundle's pictures are natural all the same
        known = None if isinstance(lam, tuple) or config.guidance == "constant" else calibration
        run = replace(run, natural=natural, source="pool", estimate=known)
    # What was left open is filled now: runner auto, and the noise levels that the prior asks to be guided at.
    config = replace(config, runner=run.config.runner, guidance_interval=run.config.guidance_interval)
    if config.lam is None and not calibration.feasible:
        run = replace(run, estimate=None)
    return Inquiry(
        bundle=bundle,
        feature=feature,
        config=config,
        natural=natural,
        target=target,
        target_quantile=quantile_of(natural, target, log_tilt=log_tilt),
        calibration=calibration,
        run=run,
    )


def _target(config: ExplainConfig, natural: NDArray[np.float64], log_tilt: LogTilt) -> tuple[float, Calibration]:
    """The wanted mean of phi(a), and the tilt that reaches it."""
    if config.lam is not None:
        lam = config.lam if isinstance(config.lam, float) else float(np.mean(config.lam))
        return tilted_mean(natural, lam, log_tilt=log_tilt), estimates(natural, lam, log_tilt=log_tilt)
    if config.target_activation is not None:
        target = config.target_activation
    elif config.target_quantile is not None:
        target = target_at_quantile(natural, config.target_quantile, log_tilt=log_tilt)
    elif config.target_z is not None:
        phi = log_tilt.phi(natural)
        target = float(phi.mean() + config.target_z * phi.std())
    elif config.target_max_multiple is not None:
        target = config.target_max_multiple * float(log_tilt.phi(natural).max())
    else:
        chosen = default_target(natural, log_tilt=log_tilt)
        return chosen.target, estimates(natural, chosen.lam, log_tilt=log_tilt)
    found = calibrate(natural, target, log_tilt=log_tilt)
    if found.feasible:
        return target, found
    if not config.beyond_pool or target < float(log_tilt.phi(natural).mean()):
        raise CalibrationError(found.reason)
    furthest = calibrate(natural, largest_reachable(natural, log_tilt=log_tilt), log_tilt=log_tilt)
    return target, replace(
        furthest, feasible=False, reason=f"beyond the pool: {found.reason}; KL, log Z and ESS are not known"
    )


def answer(inquiry: Inquiry, *, on_step: OnStep | None = None, on_part: OnPart | None = None) -> Explanation:
    """Calibrate, draw the tilt, hold the three rivals to the activation it reached, and measure all four.

    Where lambda is negative the rivals look for the weakest pictures instead: top-K, truncation and maximisation of -a.
    on_step: told of every row of the tilt. on_part: told of each part in words as it begins.
    """
    watch = _Stopwatch(on_part)
    run, bundle, feature, natural = inquiry.run, inquiry.bundle, inquiry.feature, inquiry.natural
    notes: dict[str, str] = {}
    if inquiry.config.calibration == "sampler" and inquiry.config.lam is None and run.lam != 0:
        with watch("calibration"):
            run = calibrate_on_sampler(run, inquiry.target)
        inquiry = replace(inquiry, run=run)
    with watch("tilt"):
        tilt, evidence = run.with_evidence(join(run.draw(on_step=on_step)))
        check_any_finite(tilt, run.plan)
    sign = -1.0 if inquiry.calibration.lam < 0 else 1.0
    reached = float(tilt.activation[tilt.ok].mean()) if tilt.ok.any() else inquiry.target
    with watch("prior_check"):
        prior_activation = unguided_activations(
            run.programme, run.feature, seed=run.config.seed, num=PRIOR_CHECK_NUM, bucket=PRIOR_CHECK_NUM
        )
    with watch("pool_rivals"):
        topk = pool_answer(inquiry, top_k(sign * natural, run.config.num))
        hard = hard_truncation(sign * natural, sign * reached, run.config.num, seed=run.config.seed)
        hard_samples = pool_answer(inquiry, hard.chosen)
        if len(hard.chosen) < run.config.num:
            side = "above" if sign > 0 else "below"
            notes["hard"] = (
                f"only {len(hard.members)} pool pictures lie {side} the threshold {sign * hard.threshold:.4g}"
            )
    with watch("actmax"):
        actmax, missed = actmax_answer(inquiry, reached, sign)
        if missed:
            notes["actmax"] = missed
    answers = {"tilt": tilt, "topk": topk, "hard": hard_samples, "actmax": actmax}
    # The rivals are pictures whatever the prior's samples are.
    reads = {name: feature if name == "tilt" else feature.on_pictures() for name in answers}
    answers = {name: replace(each, heat=_heat(reads[name], each)) for name, each in answers.items()}
    seconds = {"tilt": watch.seconds["tilt"], "topk": None, "hard": None, "actmax": watch.seconds["actmax"]}
    with watch("metrics"):
        metrics = {
            name: measure(
                each,
                answer=name,
                bundle=bundle,
                feature=feature,
                natural=natural,
                log_tilt=run.programme.log_tilts[0],
                tilt=inquiry.calibration if run.estimate or isinstance(run.lam, dict) else None,
                seconds=seconds[name],
                members=hard.members if name == "hard" else None,
            )
            for name, each in answers.items()
        }
    prior_se = standard_error(prior_activation, natural)
    warnings = [
        prior_warning(float(natural.mean()), float(prior_activation.mean()), prior_se),
        inquiry.calibration.reason or None,
        "guidance is constant: what is called lambda here is the published scale, which has no KL"
        if inquiry.config.guidance == "constant"
        else None,
        f"{int((~tilt.ok).sum())} of {len(tilt)} samples became non-finite or were stopped"
        if not tilt.ok.all()
        else None,
    ]
    explanation = Explanation(
        feature=feature.name,
        name=bundle.label(feature),
        answers=answers,
        metrics=metrics,
        target=inquiry.target,
        target_quantile=inquiry.target_quantile,
        lam=inquiry.calibration.lam if isinstance(run.lam, dict) else run.lam,
        calibration=inquiry.calibration,
        natural=natural,
        natural_mean=float(natural.mean()),
        prior_mean=float(prior_activation.mean()),
        prior_mean_se=prior_se,
        warnings=tuple(filter(None, warnings)),
        notes=notes,
        manifest={},
    )
    return replace(explanation, manifest=_manifest(inquiry, explanation, evidence, watch.seconds))


def pool_answer(inquiry: Inquiry, chosen: NDArray[np.int64]) -> Samples:
    """Pool pictures as an answer: no network ran for them."""
    pool, num = inquiry.bundle.pool, len(chosen)
    x0 = pool.x0(chosen)
    activation = torch.from_numpy(inquiry.natural[chosen]).to(torch.float32)
    _, drive = inquiry.feature.on_pictures().activation_and_drive(x0)
    none = torch.zeros(num, dtype=torch.int64)
    return Samples(
        feature=inquiry.feature.name,
        x0=x0,
        images=pool.images(chosen),
        activation=activation,
        drive=drive.detach(),
        lam=torch.full((num,), torch.nan),
        seed=inquiry.run.config.seed,
        index=torch.from_numpy(np.asarray(chosen)),
        target="exact",
        nfe=none,
        n_vjp=none,
        ok=torch.ones(num, dtype=torch.bool),
        sources=tuple(pool.names[at] for at in chosen),
    )


def actmax_answer(
    inquiry: Inquiry, reached: float, sign: float = 1.0, *, phase_only: bool = False
) -> tuple[Samples, str | None]:
    """Pictures of the activation that the tilt reached, and what to say where they are not. Addressed by (seed, place).

    phase_only: under the mean magnitude spectrum of the pool (MaCo).
    """
    run, pool, feature = inquiry.run, inquiry.bundle.pool, inquiry.feature.on_pictures()
    magnitude = natural_magnitude(pool.x0(range(min(pool.num, MAGNITUDE_NUM)))) if phase_only else None
    found = activation_maximisation(
        sign * feature,
        shape=inquiry.bundle.picture_shape,
        num=run.config.num,
        target_mean=sign * reached,
        seed=run.config.seed,
        magnitude=magnitude,
    )
    num = run.config.num
    activation, drive = (each.detach() for each in feature.activation_and_drive(found.x0))
    samples = Samples(
        feature=inquiry.feature.name,
        x0=found.x0,
        images=to_pixels(found.x0),
        activation=activation,
        drive=drive,
        lam=torch.full((num,), torch.nan),
        seed=run.config.seed,
        index=torch.arange(num),
        target="none",
        nfe=torch.zeros(num, dtype=torch.int64),
        n_vjp=torch.full((num,), found.n_vjp),
        ok=torch.isfinite(activation),
    )
    note = None if found.reached else f"stopped after {found.steps} steps without reaching the tilt's mean activation"
    return samples, note


def _heat(feature: Feature, samples: Samples) -> torch.Tensor | None:
    with torch.no_grad():
        parts = [feature.heat_map(x0) for x0 in samples.x0.split(CALIBRATION_BATCH)]
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


def _manifest(
    inquiry: Inquiry, explanation: Explanation, evidence: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    run, calibration = inquiry.run, inquiry.calibration
    tilt, info = explanation.answers["tilt"], inquiry.bundle.info(inquiry.feature)
    facts = (
        run.describe()
        | evidence
        | {
            "command": "explain",
            "identity": inquiry.identity,
            "bundle": inquiry.bundle.describe(),
            "feature_name": explanation.name,
            "feature_name_source": info.name_source if info else None,
            "config": inquiry.config.to_json(),
            "target": explanation.target,
            "target_quantile": explanation.target_quantile,
            "calibration": asdict(calibration) | {"source": "pool"},
            "metrics": explanation.metrics,
            "prior_check": {
                "natural_mean": explanation.natural_mean,
                "prior_mean": explanation.prior_mean,
                "prior_mean_se": explanation.prior_mean_se,
                "num": PRIOR_CHECK_NUM,
            },
            "warnings": list(explanation.warnings),
            "notes": explanation.notes,
            "failures": failures(tilt, run.plan),
            "seconds": run.seconds | seconds,
        }
    )
    return complete(facts)
