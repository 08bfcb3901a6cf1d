"""`tiltscope calibrate FEATURE --target-activation C`: the lambda that reaches C, from the pool alone; nothing is drawn."""

from dataclasses import asdict, dataclass
from math import isfinite

from tiltscope.engine.cli.common import Common, FeatureWord
from tiltscope.engine.cli.screen import put_json, say, stage
from tiltscope.engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The tilt that reaches a mean activation: lambda, KL, log Z, and how many natural pictures carry it."""

    feature: FeatureWord
    """HOOK:KIND:INDEX[@POOLING], for example blocks.5:sae:1169"""
    target_activation: float
    """the wanted mean of phi(activation)"""
    log_tilt: str = "linear"
    """linear | capped(cap=C)"""
    bundle: str = "emoji64"
    """an embedded bundle's name, or a bundle's folder"""
    common: Common


def run(arguments: Arguments) -> int:
    """Exit code 2 where no tilt reaches the target: the reason on stderr, the numbers (feasible: false) on stdout."""
    if not isfinite(arguments.target_activation):
        raise ConfigError(f"target_activation: got {arguments.target_activation}, allowed are finite numbers")
    with stage("loading torch and the models", quiet=arguments.common.quiet):
        from tiltscope.engine.bundle import load
        from tiltscope.engine.choice import parse_choice
        from tiltscope.engine.tilt.calibrate import calibrate
        from tiltscope.engine.tilt.log_tilt import LOG_TILTS

        log_tilt = parse_choice(arguments.log_tilt, LOG_TILTS, "log_tilt")
        bundle = load(arguments.bundle)
        natural = bundle.pool.activations(bundle.feature(arguments.feature))
        found = calibrate(natural, arguments.target_activation, log_tilt=log_tilt)
    numbers = {name: finite_or_none(value) for name, value in asdict(found).items()}
    about = {"feature": arguments.feature, "target": arguments.target_activation, "natural_mean": float(natural.mean())}
    if arguments.common.json:
        put_json(about | numbers)
    else:
        for name, value in (about | numbers).items():
            if value is not None and value != "":
                print(f"{name:<12} {value:.6g}" if isinstance(value, float) else f"{name:<12} {value}")
    if not found.feasible:
        say(f"tiltscope calibrate: {found.reason}")
        return 2
    return 0


def finite_or_none(value: object) -> object:
    """JSON has no NaN and no infinity: null stands for a number that does not exist."""
    return None if isinstance(value, float) and not isfinite(value) else value
