"""What can be asked for: the settings of sample(), explain() and compare(), validated on construction.

The same frozen dataclasses serve the Python keywords, the command line and the manifest. A field left None is filled by the
preset (`resolved`). Solver, grid, lift and log-tilt are kept as text ("ddim(eta=0.5)"), whatever they were given as, so a
config is JSON and back. This module imports neither numpy nor torch: the command line's --help reads it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, Self

from tiltscope.engine.choice import describe_choice, parse_choice
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.presets import PRESETS

MAX_NUM = 1_000_000
MAX_BATCH = 1024
MAX_PARTICLES = 4096
LARGEST_DEFAULT_BUCKET = 8

CALIBRATIONS = ("pool", "sampler")
GUIDANCES = ("tilt", "constant")
DTYPES = ("float32", "float64", "bfloat16")
KERNELS = ("auto", "reference", "native", "compiled", "triton")
DEVICES = ("cpu", "cuda")
GRAPHS = ("auto", "off")
CPU_RUNNERS = ("onnx", "openvino")
GPU_RUNNERS = ("tensorrt", "tensorrt_rtx")  # wherever the slots are
# What decides neither the pictures nor their number: a run may be continued with other values of these.
# graphs: a replay runs the very kernels of the eager step.
NOT_IN_IDENTITY = ("num", "batch_size", "graphs")
# Settings that a run has had since before they could be chosen: at these values, which draw the same bits, the identity says
# nothing of them.
ALWAYS_SO: dict[str, tuple[Any, ...]] = {
    "kernels": ("auto", "reference", "native"),
    "device": ("cpu",),
    "allow_parity_failure": (False,),
    "vjp_chunk": (None,),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every command's settings can do: become plain JSON, and be read back from it."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; from_json reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises ConfigError for an unknown key."""
        return cls(**_known(values, cls))


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Settings):
    """Settings of one distribution. Raises ConfigError on construction for a value that is not allowed."""

    num: int = 8
    """how many samples, 1 to 1,000,000"""
    lam: float | tuple[float, ...] | None = None
    """the tilt's lambda (0: the unguided prior; negative: suppression); or --target-activation"""
    target_activation: float | None = None
    """the wanted mean of phi(activation); lambda is calibrated to it"""
    log_tilt: str | None = None
    """linear | zscored(mean=,sd=) | capped(cap=) | hinge(c=,kappa=) | target(c=,tau=) | smooth_cap(c=,tau=) | soft_hard(c=)"""
    lift: str | None = None
    """dps | none | normalized | lgd_mc(draws=N) | covariance | tfg(rho=R, mu=M, n_iter=N, gamma=G) | daps(ode_steps=K)"""
    solver: str | None = None
    """ddpm | ddim(eta=E) | euler | heun | dpmpp_2m | dpmpp_2m_sde | edm(churn=C) | flow_euler | renoise (the lift daps's own)"""
    steps: int | None = None
    """intervals of the noise grid"""
    grid: str | None = None
    """native (the network's own levels) | angle | karras | log_snr | flow_shift | linear_beta; default: the solver's own"""
    guidance: str | None = None
    """tilt (lam is the tilt's lambda) | constant (the published update: lam is its scale, the same in every row)"""
    recurrence: int = 1
    """times that every stretch of the grid is done, with the noise put back in between"""
    travel_length: int = 1
    """intervals in such a stretch; more than 1: time travel"""
    preset: str = "calibrated"
    """fills what is not given: calibrated | fast | paper_exact"""
    particles: int = 1
    """particles a sample; more than 1: twisted sequential Monte Carlo, which converges to the tilt"""
    seed: int = 0
    """0 to 2^64 - 1; (seed, index) addresses one picture"""
    indices: tuple[int, ...] | None = None
    """which samples of the seed to draw (default 0 .. num-1)"""
    batch_size: int | None = None
    """slots a step advances together (default: the power of two that holds num, at most 8)"""
    vjp_chunk: int | None = None
    """samples of a batch that a gradient is taken of at once (default: all): fewer take less memory, and more time"""
    start: str | None = None
    """a picture's file: samples start from it, noised to start_sigma, and keep what that noise leaves of it"""
    start_sigma: float = 0.8
    """noise level at which they start, between 0 and 1; with --start only"""
    guidance_interval: tuple[float, float] | None = None
    """(sigma_lo, sigma_hi): rows outside are not guided; None: what the prior asks for (bundle.json), else all are"""
    calibration: str = "pool"
    """what lambda is calibrated on: pool (natural pictures) | sampler (dual ascent on its own draws)"""
    calibration_num: int = 256
    """draws that calibrate lambda: of the sampler, or unguided where prior and feature share no pool"""
    beyond_pool: bool = False
    """allow targets that natural pictures cannot carry; needs --calibration sampler"""
    runner: str = "torch"
    """torch | compile | onnx | openvino | tensorrt | tensorrt_rtx (built on first use) | auto (the fastest of them here)"""
    allow_parity_failure: bool = False
    """run a step that its self-test refused; logged, and stamped in the manifest"""
    kernels: str = "auto"
    """auto (native where it can be, else reference) | reference | native (its bits, by C++) | compiled | triton (on CUDA)"""
    device: str = "cpu"
    """cpu | cuda"""
    graphs: str = "auto"
    """auto (CUDA graphs where they measure faster, on --device cuda) | off"""
    dtype: str = "float32"
    """float32 | float64 | bfloat16 (the networks alone, where the processor has it: faster, less exact)"""

    def __post_init__(self) -> None:
        self._check_choices()
        _whole("num", self.num, 1, MAX_NUM)
        _whole("seed", self.seed, 0, 2**64 - 1)
        _whole("particles", self.particles, 1, MAX_PARTICLES)
        _whole("recurrence", self.recurrence, 1, 100)
        _whole("travel_length", self.travel_length, 1, 100_000)
        _whole("calibration_num", self.calibration_num, 16, 100_000)
        if self.steps is not None:
            _whole("steps", self.steps, 1, 100_000)
        if self.batch_size is not None:
            _whole("batch_size", self.batch_size, 1, MAX_BATCH)
        if self.vjp_chunk is not None:
            _whole("vjp_chunk", self.vjp_chunk, 1, MAX_BATCH)
        if self.target_activation is not None:
            self._set(target_activation=_finite("target_activation", self.target_activation))
        for name in ("beyond_pool", "allow_parity_failure"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, allowed are true and false")
        if self.beyond_pool and self.calibration != "sampler":
            raise ConfigError(
                "beyond_pool: only the sampler itself can say what lies there; give calibration sampler too"
            )
        self._check_start()
        self._check_lam()
        self._check_indices()
        self._check_interval()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        from tiltscope.engine.runtime.runners import AUTO, runner_names
        from tiltscope.engine.sampler.grids import GRIDS
        from tiltscope.engine.sampler.solvers import SOLVERS
        from tiltscope.engine.tilt.log_tilt import LOG_TILTS

        registries: dict[str, Any] = {"solver": SOLVERS, "grid": GRIDS, "log_tilt": LOG_TILTS}
        if self.lift is not None:
            from tiltscope.engine.sampler.lifts import LIFTS

            registries["lift"] = LIFTS
        for name, registry in registries.items():
            if (given := getattr(self, name)) is not None:
                self._set(**{name: describe_choice(parse_choice(given, registry, name), registry)})
        for name, allowed in (
            ("runner", (*runner_names(), AUTO)),
            ("kernels", KERNELS),
            ("device", DEVICES),
            ("graphs", GRAPHS),
            ("dtype", DTYPES),
            ("preset", tuple(PRESETS)),
            ("calibration", CALIBRATIONS),
            ("guidance", GUIDANCES),
        ):
            given = getattr(self, name)
            if given not in allowed and not (name == "guidance" and given is None):
                raise ConfigError(f"{name}: got {given!r}, allowed are {', '.join(allowed)}")
        if self.kernels == "triton" and self.dtype == "float64":
            raise ConfigError(
                "kernels triton: got dtype float64, allowed are float32 and bfloat16; kernels reference has float64"
            )
        if self.device != "cpu" and self.runner in CPU_RUNNERS:
            raise ConfigError(f"device: got {self.device} with runner {self.runner}, which runs on the CPU; give cpu")

    def _check_start(self) -> None:
        if self.start is not None:
            self._set(start=str(self.start))
            if not Path(self.start).is_file():
                raise ConfigError(f"start: got {self.start}, which is no file; name a picture's file")
        self._set(start_sigma=_finite("start_sigma", self.start_sigma))
        if not 0 < self.start_sigma < 1:
            raise ConfigError(f"start_sigma: got {self.start_sigma}, allowed is strictly between 0 and 1")

    def _check_lam(self) -> None:
        if self.lam is None:
            return
        if self.target_activation is not None:
            raise ConfigError(
                f"lam and target_activation: got both ({self.lam} and {self.target_activation}); "
                "give one, the other follows from it"
            )
        if isinstance(self.lam, Sequence) and not isinstance(self.lam, str):
            values = tuple(_finite(f"lam[{at}]", value) for at, value in enumerate(self.lam))
            if len(values) != self.num:
                raise ConfigError(f"lam: got {len(values)} values for num={self.num}; give one, or one a sample")
            self._set(lam=values)
        else:
            self._set(lam=_finite("lam", self.lam))

    def _check_indices(self) -> None:
        given: Any = self.indices  # what a caller gave need not be what the annotation says
        if given is None:
            return
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ConfigError(f"indices: got {given!r}, allowed is a list of whole numbers")
        for index in given:
            _whole("indices", index, 0, 2**31 - 1)
        if len(set(given)) != len(given):
            twice = next(index for index in given if given.count(index) > 1)
            raise ConfigError(f"indices: {twice} is given twice; an index is one picture, name each once")
        if len(given) != self.num:
            raise ConfigError(f"indices: got {len(given)} of them for num={self.num}; the two must agree")
        self._set(indices=tuple(given))

    def _check_interval(self) -> None:
        if self.guidance_interval is None:
            return
        if isinstance(self.guidance_interval, str) or len(self.guidance_interval) != 2:
            raise ConfigError(f"guidance_interval: got {self.guidance_interval!r}, allowed is (sigma_lo, sigma_hi)")
        lo, hi = (_finite("guidance_interval", value) for value in self.guidance_interval)
        if not 0 <= lo <= hi <= 1:
            raise ConfigError(f"guidance_interval: got ({lo}, {hi}), allowed is 0 <= sigma_lo <= sigma_hi <= 1")
        self._set(guidance_interval=(lo, hi))

    @property
    def bucket(self) -> int:
        """The one padded batch shape of a run: batch_size, else min(8, the next power of two that holds every slot)."""
        return self.batch_size or min(LARGEST_DEFAULT_BUCKET, 1 << (self.num * self.particles - 1).bit_length())

    @property
    def all_indices(self) -> Sequence[int]:
        return range(self.num) if self.indices is None else self.indices

    def resolved(self) -> Self:
        """The same settings with everything the preset fills written out. Raises ConfigError where the whole does not fit."""
        # The lift daps draws x0 itself and needs the solver that renoises it, whatever the preset's.
        own = {"solver": "renoise"} if (self.lift or "").startswith("daps") else {}
        missing = {
            name: value for name, value in (PRESETS[self.preset].settings | own).items() if getattr(self, name) is None
        }
        if self.has_target:
            missing.pop("lam", None)
        filled = replace(self, **missing)
        if filled.guidance == "constant" and filled.has_target and filled.calibration == "pool":
            raise ConfigError(
                "guidance constant: its scale is no lambda, and natural pictures cannot calibrate it; "
                "give calibration sampler, or the scale itself as lam"
            )
        return filled

    @property
    def has_target(self) -> bool:
        """Whether lambda is to follow from what was asked."""
        return self.target_activation is not None

    def identity(self, *parts: str) -> str:
        """64 hex digits over `parts` (command, bundle, feature) and every resolved setting that decides the pictures."""
        settings = {
            name: value
            for name, value in self.resolved().decisive().items()
            if name not in NOT_IN_IDENTITY and (name not in ALWAYS_SO or value not in ALWAYS_SO[name])
        }
        return _digest([*parts, settings])

    def decisive(self) -> dict[str, Any]:
        """to_json, with a starting picture's content in place of its name."""
        if self.start is None:
            return self.to_json()
        return self.to_json() | {"start": hashlib.sha256(Path(self.start).read_bytes()).hexdigest()}


# The ways to ask for a mean; at most one is given.
TARGETS = ("target_activation", "target_quantile", "target_z", "target_max_multiple")


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(SampleConfig):
    """Settings of explain(): those of sample(), and the target in terms of natural activation."""

    calibration: str = "sampler"
    """what lambda is calibrated on: sampler (dual ascent on its own draws) | pool (natural pictures)"""
    calibration_num: int = 64
    """draws of the sampler that calibrate lambda"""
    target_quantile: float | None = field(default=None)
    """the target as a quantile of natural activation, strictly between 0 and 1"""
    target_z: float | None = None
    """the target in natural standard deviations above the natural mean"""
    target_max_multiple: float | None = None
    """the target as a multiple of the largest natural activation; from 1 on it needs --beyond-pool"""

    @property
    def has_target(self) -> bool:
        return self.lam is None  # without any, explain chooses one

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self, "lam", *TARGETS)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Settings of compare(): which samplers, at which target, from how many pictures each."""

    num: int = 16
    """pictures of each method at each lambda"""
    lifts: tuple[str, ...] = ("dps", "none")
    """lifts to compare, each with every solver"""
    solvers: tuple[str, ...] = ("ddpm", "dpmpp_2m")
    """solvers to compare"""
    steps: tuple[int, ...] = (50,)
    """numbers of steps, each with every lift and solver"""
    presets: tuple[str, ...] = ()
    """presets to compare beside them, as they are"""
    lam_factors: tuple[float, ...] = (0.5, 2.0)
    """points of the curve over lambda, as multiples of the lambda that reaches the target (0 and 1 are always there)"""
    target_activation: float | None = None
    """the wanted mean of phi(activation)"""
    target_quantile: float | None = None
    """the target as a quantile of natural activation, strictly between 0 and 1"""
    target_z: float | None = None
    """the target in natural standard deviations above the natural mean"""
    target_max_multiple: float | None = None
    """the target as a multiple of the largest natural activation; from 1 on it needs --beyond-pool"""
    beyond_pool: bool = False
    """allow targets that natural pictures cannot carry"""
    log_tilt: str | None = None
    """of every sampler (default: the preset's)"""
    calibration_num: int = 64
    """draws that calibrate each sampler"""
    likelihood: bool = True
    """bits/dim of every method's pictures under the prior (80 evaluations a picture); --no-likelihood leaves them out"""
    seed: int = 0
    """0 to 2^64 - 1"""
    batch_size: int | None = None
    """slots a step advances together"""
    dtype: str = "float32"
    """float32 | float64 | bfloat16 (the networks alone, where the processor has it: faster, less exact)"""

    def __post_init__(self) -> None:
        _whole("num", self.num, 2, 4096)
        for name in ("lifts", "solvers", "steps"):
            if not getattr(self, name) and not self.presets:
                raise ConfigError(f"{name}: got none; name at least one, or a preset")
        for value in self.lam_factors:
            if _finite("lam_factors", value) <= 0:
                raise ConfigError(f"lam_factors: got {value}, allowed are numbers above 0")
        check_targets(self, *TARGETS)
        methods = self.methods()  # each is checked on construction
        if len(set(methods)) != len(methods):
            raise ConfigError("lifts, solvers, steps and presets: a method is named twice; name each once")

    def methods(self) -> tuple[ExplainConfig, ...]:
        """The samplers to compare, one configuration each. Raises ConfigError for one that is not allowed."""
        same = ("num", *TARGETS, "beyond_pool", "calibration_num", "seed", "batch_size", "dtype")
        shared: dict[str, Any] = {name: getattr(self, name) for name in same}
        crossed: list[dict[str, Any]] = [
            {"lift": lift, "solver": solver, "steps": steps}
            for lift in self.lifts
            for solver in self.solvers
            for steps in self.steps
        ]
        whole: list[dict[str, Any]] = [{"preset": preset} for preset in self.presets]
        tilted: dict[str, Any] = {} if self.log_tilt is None else {"log_tilt": self.log_tilt}
        return tuple(ExplainConfig(**shared, **tilted, **each) for each in [*crossed, *whole])

    def identity(self, *parts: str) -> str:
        """64 hex digits over `parts` and every setting."""
        return _digest([*parts, self.to_json()])


def check_targets(config: Any, *names: str) -> None:
    """At most one of `names` is given, and what is given is a number that can be meant. Raises ConfigError."""
    given = [name for name in names if getattr(config, name) is not None]
    if len(given) > 1:
        # The later name is the more particular one: it is what the message is about.
        raise ConfigError(f"{given[-1]} and {given[0]}: got both; give one, the other follows from it")
    for name in set(given) - {"lam"}:
        object.__setattr__(config, name, _finite(name, getattr(config, name)))
    if "target_quantile" in given and not 0 < config.target_quantile < 1:
        raise ConfigError(f"target_quantile: got {config.target_quantile}, allowed is strictly between 0 and 1")
    if "target_max_multiple" in given and not config.target_max_multiple > 0:
        raise ConfigError(f"target_max_multiple: got {config.target_max_multiple}, allowed are numbers above 0")


def _known(values: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    known = [each.name for each in fields(kind)]
    for name in values:
        if name not in known:
            raise ConfigError(f"config: unknown key {name!r}, allowed are {', '.join(known)}")
    return {name: _untangled(value) for name, value in values.items()}


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _untangled(value: Any) -> Any:
    """JSON's list as the tuple it was."""
    return tuple(value) if isinstance(value, list) else value


def _whole(name: str, value: Any, low: int, high: int, *, hint: str = "") -> None:
    if type(value) is not int or not low <= value <= high:
        allowed = f"{low}" if low == high else f"whole numbers from {low} to {high}"
        raise ConfigError(f"{name}: got {value!r}, allowed: {allowed}" + (f" ({hint})" if hint else ""))


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ConfigError(f"{name}: got {value!r}, allowed are finite numbers")
    return float(value)
