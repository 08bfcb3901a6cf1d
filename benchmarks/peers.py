"""Whole pictures of one feature at one mean activation: this engine beside what else draws such pictures, in one process.

    tiltscope   the preset fast, and in fewer rows (FEWEST)
    plain       diffusers + transformers + autograd, the same solver and noise: on the preset's rows, and guided in every row of
                the network's own levels, as diffusers' scheduler places them
    deepinv     its DPS at several step counts: |a(D) - y|, y the target, the libraries' own networks behind its interfaces
    published   the 1,000-row update (preset paper_exact, drawn by this engine: faster than as it was published)
    actmax      activation maximisation over a spectrum, as Horama, lucid and lucent do it (engine/tilt/actmax.py)

The gate: each way's strength is the one at which the mean over the same `--num` seeds is the target's within 5 %
(matching.py); a way that does not get there is timed, and marked. Over eight seeds naturalness moves by .4 from one of our
own grids to the next, so that whoever looks long enough is the most natural: hence 32. The published update takes too long
for a search: its strength, activation and naturalness are benchmarks/ablation.py's, and it is timed over some of its rows,
all of which cost the same. All ways are timed in turn. Naturalness is the reports'. Appends a line to results/peers.jsonl;
tools/benchmark_tables.py writes docs/benchmarks.md.

deepinv declares torchvision, which declares a torch of its own, so it has an environment of its own:

    python -m venv build/bench-venv
    build/bench-venv/bin/pip install --constraint constraints/cpu.txt --editable '.[onnx]'
    build/bench-venv/bin/pip install --no-deps deepinv==0.5.0 torchvision==0.28.0 torchmetrics lightning-utilities \
        einops h5py natsort
    build/bench-venv/bin/python benchmarks/peers.py
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import tiltscope
from tiltscope.engine.bench.machine import append_result
from tiltscope.engine.bench.plain import PlainStep
from tiltscope.engine.bench.timing import interleave
from tiltscope.engine.config import ExplainConfig, SampleConfig
from tiltscope.engine.explain import inquire
from tiltscope.engine.prepare import prepare
from tiltscope.engine.run import Progress, Run
from tiltscope.engine.sampler.noise import STREAM_START, STREAM_STEP, seed_key
from tiltscope.engine.sampler.plan import GraphKind
from tiltscope.engine.samples import join
from tiltscope.engine.tilt.actmax import activation_maximisation, natural_magnitude
from tiltscope.kernels.philox import normal

sys.path.append(str(Path(__file__).parent))

from matching import Drawn, activation_of, detail, match, naturalness

RESULTS = Path(__file__).parent / "results"
PUBLISHED_ROWS = 1000
# What differs from the preset fast in the fewest rows that reach the target on every feature of benchmarks/budget.py.
FEWEST: dict[str, Any] = {
    "steps": 4,
    "guidance_interval": (0.0, 0.96),
}
# Natural pictures whose mean spectrum activation maximisation keeps.
MAGNITUDE_NUM = 256
Draw = Callable[[float, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    feature: str = "blocks.5:sae:1169"
    num: int = 32
    """pictures, drawn in one batch, at which strengths are found and naturalness is measured"""
    together: int = 8
    """pictures at once when timed, beside one alone"""
    plain_steps: tuple[int, ...] = (25,)
    """rows of plain where diffusers' scheduler would place them"""
    runner: str = "auto"
    deepinv_steps: tuple[int, ...] = (3, 4, 5, 6, 8, 10, 25)
    published_rows: int = 8
    without: tuple[str, ...] = ()
    """ways to leave out, by name"""
    turns: int = 3
    """of timing, for the batch and again for one picture"""


@dataclass(frozen=True, kw_only=True)
class Way:
    """draw(strength, num) -> x0 [num, ...]. cannot: what this one cannot do. scale: whole pictures a call stands for."""

    name: str
    draw: Draw
    start: float
    rows: int
    cannot: str
    scale: float = 1.0


def own(run: Run, name: str, start: float) -> Way:
    """This engine, in a bucket of just so many: a padded one would draw what nobody asked for."""
    of_num = {run.config.bucket: run}

    def draw(strength: float, num: int) -> Tensor:
        if num not in of_num:
            of_num[num] = prepare(run.prior, run.feature, replace(run.config, num=num, batch_size=num))
        asked = of_num[num]
        return join(replace(asked, lam=strength, config=replace(asked.config, num=num)).draw()).x0

    return Way(name=name, draw=draw, start=start, rows=run.plan.num_rows, cannot="")


def plain_way(step: PlainStep, run: Run, start: float) -> Way:
    """x <- a x + b D + e lam grad_a + c z over the table's rows; noise is drawn beforehand, so that it costs nothing here."""
    plan, shape = run.plan, run.prior.shape
    columns = {name: plan.column(name) for name in ("sigma", "a", "b", "c", "e")}
    levels = [int((step.sigmas - sigma).abs().argmin()) for sigma in columns["sigma"]]

    def noise(num: int, row: int, stream: int) -> Tensor:
        zeros, key = torch.zeros(num, dtype=torch.int64), torch.tensor([seed_key(0)]).expand(num, 2)
        index = torch.arange(num)
        return normal(key, index, zeros + row, zeros, stream=stream, shape=shape, dtype=torch.float32)

    kept: dict[int, list[Tensor]] = {}

    def draw(strength: float, num: int) -> Tensor:
        if num not in kept:
            kept[num] = [noise(num, 0, STREAM_START), *(noise(num, row, STREAM_STEP) for row in range(plan.num_rows))]
        x, *z = kept[num]
        for row, level in enumerate(levels):
            a, b, c, e = (float(columns[name][row]) for name in "abce")
            if plan.kind[row] == GraphKind.GUIDED:
                x0_hat, _, _, grad_a = step(x, level)
                x = a * x + b * x0_hat + e * strength * grad_a + c * z[row]
            else:
                with torch.no_grad():
                    x = a * x + b * step.denoise(x, level) + c * z[row]
        return x

    cannot = "no calibrated lambda, one feature a batch"
    where = "of its levels" if run.config.grid == "native" else "as ours"
    return Way(name=f"plain, {plan.num_rows} rows {where}", draw=draw, start=start, rows=plan.num_rows, cannot=cannot)


class _DeepinvDenoiser(nn.Module):
    """The library's network as deepinv calls one: x = x0 + sigma eps with pictures in [0, 1]."""

    def __init__(self, step: PlainStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, sigma: Any, **kwargs: Any) -> Tensor:
        del kwargs
        noise = 2 * torch.as_tensor(sigma, dtype=torch.float32).reshape(-1)[0]
        norm = torch.sqrt(1 + noise * noise)
        level = int((self.step.sigmas - float(noise / norm)).abs().argmin())
        return (self.step.denoise((2 * x - 1) / norm, level) + 1) / 2


def deepinv_way(step: PlainStep, target: float, steps: int, shape: tuple[int, ...]) -> Way:
    """deepinv.sampling.DPS with its own defaults but the number of steps and the weight."""
    deepinv: Any = import_module("deepinv")  # in its own environment alone

    def forward(x0: Tensor, **kwargs: Any) -> Tensor:
        del kwargs
        return step.measure(2 * x0 - 1)[1][:, None]

    physics = deepinv.physics.Physics(A=forward)

    def draw(strength: float, num: int) -> Tensor:
        sampler = deepinv.sampling.DPS(
            _DeepinvDenoiser(step), num_steps=steps + 1, weight=strength, rng=torch.Generator().manual_seed(0)
        )
        y = torch.full((num, 1), target)
        x0 = sampler(y, physics, x_init=(num, *shape), seed=0)
        return 2 * x0.float().detach() - 1

    cannot = "no calibrated lambda, one feature a batch, nothing redrawn alone"
    return Way(name=f"deepinv DPS, {steps} steps", draw=draw, start=4.0, rows=steps, cannot=cannot)


def published_way(run: Run, rows: int, start: float) -> Way:
    """The first `rows` of it: every row costs the same."""

    def stop(told: Progress) -> Literal["stop"] | None:
        return "stop" if told.row + 1 == rows else None

    def draw(strength: float, num: int) -> Tensor:
        asked = replace(run, lam=strength, config=replace(run.config, num=num, batch_size=num))
        return join(asked.draw(on_step=stop)).x0

    cannot = "a scale in place of lambda; the batch's mean is capped, so no picture is redrawn alone"
    scale = PUBLISHED_ROWS / rows
    return Way(name="published", draw=draw, start=start, rows=PUBLISHED_ROWS, cannot=cannot, scale=scale)


def actmax_way(feature: tiltscope.Feature, target: float, magnitude: Tensor, shape: tuple[int, ...]) -> Way:
    """Stops at the target by itself: its strength says nothing."""

    def draw(strength: float, num: int) -> Tensor:
        del strength
        found = activation_maximisation(feature, shape=shape, num=num, target_mean=target, seed=0, magnitude=magnitude)
        return found.x0

    return Way(name="actmax", draw=draw, start=1.0, rows=0, cannot="draws from no distribution; no lambda, KL or ESS")


def operators_of_torchvision() -> None:
    """torchvision's wheel is built for another torch, so its operators do not load; these two it must at least find declared."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


_libraries: list[Any] = []


def published_strength(feature: str) -> tuple[float, dict[str, Any]]:
    """What benchmarks/ablation.py last found for this feature's 1,000 rows. Raises SystemExit where it found nothing."""
    lines = [json.loads(line) for line in (RESULTS / "ablation.jsonl").read_text().splitlines()]
    found = [line["rows"]["published"] for line in lines if line["feature"] == feature]
    if not found or not found[-1]["matched"]:
        raise SystemExit(
            f"results/ablation.jsonl has no matched published row of {feature}; run benchmarks/ablation.py"
        )
    return float(found[-1]["lam"]), found[-1]


def main(config: Config) -> None:
    operators_of_torchvision()
    bundle = tiltscope.load("emoji64")
    feature, prior = bundle.feature(config.feature), bundle.prior
    target = inquire(bundle, config.feature, ExplainConfig()).target

    def asked(preset: str, runner: str = "torch", **settings: Any) -> Run:
        asked_for = SampleConfig(
            num=config.num, lam=1.0, preset=preset, batch_size=config.num, runner=runner, **settings
        )
        return prepare(prior, feature, asked_for)

    run = asked("fast", config.runner)
    published = asked("paper_exact")
    strength, of_ablation = published_strength(config.feature)
    step = PlainStep(bundle, feature)
    magnitude = natural_magnitude(bundle.pool.x0(range(MAGNITUDE_NUM)))
    ways = [
        own(run, f"tiltscope, preset fast ({run.plan.num_rows} rows)", 1.1),
        own(asked("fast", config.runner, **FEWEST), f"tiltscope, {FEWEST['steps']} rows", 1.1),
        plain_way(step, asked("fast"), 1.1),
        *(
            plain_way(step, asked("fast", steps=n, grid="native", guidance_interval=(0.0, 1.0)), 1.1)
            for n in config.plain_steps
        ),
        *(deepinv_way(step, target, steps, prior.shape) for steps in config.deepinv_steps),
        published_way(published, config.published_rows, strength),
        actmax_way(feature, target, magnitude, prior.shape),
    ]
    ways = [way for way in ways if way.name not in config.without]
    drawn: dict[str, Drawn] = {}
    for way in ways:
        if way.name != "published":
            print(way.name, flush=True)
            drawn[way.name] = match(partial(_draw, way, config.num), activation_of(feature), target, way.start)
    found = {way.name: described(bundle, way, drawn.get(way.name), of_ablation) for way in ways}
    for num in (config.together, 1):
        calls = {way.name: partial(way.draw, found[way.name]["strength"], num) for way in ways}
        for name, timing in interleave(calls, seconds=0.0, least=config.turns).items():
            scale = next(way.scale for way in ways if way.name == name)
            found[name][f"seconds_{num}"] = {
                share: 1e-3 * scale * getattr(timing, share) / num for share in ("p20", "p50", "p80")
            }
    append_result(
        RESULTS / "peers.jsonl",
        "peers",
        feature=config.feature,
        prior=prior.identity,
        target=target,
        num=config.num,
        together=config.together,
        deepinv=version("deepinv"),
        runner=run.config.runner,
        runner_choice=None if run.choice is None else run.choice.to_json(),
        base=ways[0].name,
        ways=found,
    )
    for name, each in found.items():
        print(
            name,
            {key: each[key] for key in ("mean", "naturalness", "matched")},
            each[f"seconds_{config.together}"],
            flush=True,
        )


def _draw(way: Way, num: int, strength: float) -> Tensor:
    return way.draw(strength, num)


def described(bundle: tiltscope.Bundle, way: Way, drawn: Drawn | None, of_ablation: dict[str, Any]) -> dict[str, Any]:
    """A way's facts; the published update's from the ablation."""
    facts = {"rows": way.rows, "cannot": way.cannot}
    if drawn is None:
        taken = ("naturalness", "naturalness_se", "matched")
        reached = {"mean": of_ablation["activation_mean"], "se": of_ablation["activation_se"]}
        return (
            facts | {"strength": of_ablation["lam"], "from": "ablation"} | reached | {k: of_ablation[k] for k in taken}
        )
    mean, se = naturalness(bundle, drawn.x0)
    return facts | {
        "strength": drawn.strength,
        "mean": drawn.mean,
        "se": drawn.se,
        "matched": drawn.matched,
        "tries": drawn.tries,
        "naturalness": mean,
        "naturalness_se": se if math.isfinite(se) else None,
        "detail": detail(bundle, drawn.x0),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
