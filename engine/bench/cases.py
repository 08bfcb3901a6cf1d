"""The cases of `tiltscope bench`: what is timed, beside what baseline, after which check.

    row          one guided row, gradient included: every runner beside plain diffusers + transformers + autograd
    picture      a whole picture: the sampler beside a plain loop over the same table and the same noise
    update       the fused update of a row alone: its implementations beside the definition
    throughput   guided rows a second over the batch: where sharing stops paying
    growth       time over batch, rows and number of features, and the exponent that fits it: 1 is linear
    host         what the sampler costs around the networks: rows of a denoiser without cost
    sae_rows     one latent of the published convolutional autoencoder (768 -> 12,288, 7x7) beside its whole encoder; 2 GB

Whatever is timed has first been held to the reference's numbers; what differs is reported and not timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiltscope.engine.bench.growth import growth
from tiltscope.engine.bench.line import Line, Options, asked_by, dtype_of, lines
from tiltscope.engine.bench.machine import copy_gb_s, matmul_gflops
from tiltscope.engine.bench.plain import PlainStep
from tiltscope.engine.bench.timing import Way, interleave
from tiltscope.engine.bundle import Bundle
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import ConfigError, RunnerError
from tiltscope.engine.feature.poolings import pooling_tensors
from tiltscope.engine.feature.readout import Readout, pool, read
from tiltscope.engine.prepare import prepare
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.step import Step, StepOutput, TorchStep, guided_as_in_a_tick
from tiltscope.engine.sampler.noise import STREAM_START, STREAM_STEP, seed_key
from tiltscope.engine.sampler.plan import GraphKind
from tiltscope.engine.tilt.worlds import GaussianWorld
from tiltscope.kernels.philox import normal
from tiltscope.kernels.reference import StepInputs

# Relative norms, of D, drive and grad_a: rounding through two networks, in another order of summation. bfloat16: three to
# five times what is seen on emoji64 (1e-2, 1e-2, 6e-2).
GATES = {
    "float32": {"x0_hat": 1e-4, "drive": 1e-4, "grad_a": 1e-3},
    "bfloat16": {"x0_hat": 3e-2, "drive": 5e-2, "grad_a": 2e-1},
}
# RMS over a picture, after so many guided rows that rounding has grown (design: 1e-3 across batch sizes).
PICTURE_GATES = {"float32": 1e-2, "bfloat16": 1e-1}
# Relative: a sum over 37,632 products, in another order.
LATENT_GATE = 1e-5
LEVEL = 400


def row(options: Options) -> Iterator[Line]:
    """One guided row."""
    bundle, feature = options.bundle, options.bundle.feature(options.feature)
    plain, reference = PlainStep(bundle, feature), TorchStep(bundle.prior, feature)
    steps: dict[str, Step] = {way: _step(bundle, options.feature, way) for way in options.runners}
    peak = matmul_gflops()
    for batch in options.batches:
        x, sigma, alpha = noisy(bundle.prior, batch)
        readout = None if feature.readout is None else feature.readout.expand(batch)
        guided = partial(reference.guided, x, sigma, alpha, readout)
        all_ways = {"plain": partial(plain, x, LEVEL)} | {
            way: partial(guided_as_in_a_tick, step, x, sigma, alpha, readout) for way, step in steps.items()
        }
        expected, ways = guided(), dict[str, Way]()
        for name, way in all_ways.items():
            if (wrong := _difference(StepOutput(*way()), expected, dtype_of(name))) is not None:
                yield Line(case="row", setting=f"batch {batch}", way=name, timing=None, refused=wrong)
            else:
                ways[name] = way
        yield from lines("row", f"batch {batch}", ways, options, settle=True, bound_ms=1e-6 * _flops(guided) / peak)


def picture(options: Options) -> Iterator[Line]:
    """A whole picture at one lambda: the same table, the same noise, the same picture."""
    bundle, feature = options.bundle, options.bundle.feature(options.feature)
    plain = PlainStep(bundle, feature)
    config = SampleConfig(num=1, lam=0.5, steps=options.steps, solver="ddpm", grid="native", batch_size=1)
    run = prepare(bundle.prior, feature, config)

    runs = {way: prepare(bundle.prior, feature, replace(config, **asked_by(way))) for way in options.runners}
    by_hand = partial(_plain_picture, plain, run.plan, bundle.prior, lam=0.5)
    ways: dict[str, Way] = {"plain": by_hand}
    expected = by_hand()
    for way, each in runs.items():
        draw = partial(each.draw_bucket, np.array([0]))
        rms = float((draw().x0 - expected).square().mean().sqrt())
        allowed = PICTURE_GATES[dtype_of(way)]
        if not rms <= allowed:
            why = f"differs from the plain loop's picture by {rms:.1e} RMS, allowed {allowed:.0e}"
            yield Line(case="picture", setting=f"{options.steps} rows", way=way, timing=None, refused=why)
        else:
            ways[way] = draw
    yield from lines("picture", f"{options.steps} rows", ways, options)


def update(options: Options) -> Iterator[Line]:
    """The update of a row alone."""
    from tiltscope.kernels.dispatch import IMPLEMENTATIONS, guided_step, require_implementation

    shape, peak = options.bundle.prior.shape, copy_gb_s()
    for batch in options.batches:
        arguments = _update_arguments(batch, shape)
        ways: dict[str, Way] = {}
        for name in IMPLEMENTATIONS:
            try:
                require_implementation(name, torch.device("cpu"))
            except RunnerError as error:
                yield Line(
                    case="update", setting=f"batch {batch}", way=name, timing=None, refused=str(error).partition(";")[0]
                )
                continue
            ways[name] = partial(guided_step, arguments, implementation=name)
        moved = 6 * 4 * arguments.x.numel()
        yield from lines("update", f"batch {batch}", ways, options, bound_ms=1e-6 * moved / peak)


def throughput(options: Options) -> Iterator[Line]:
    """Guided rows a second over the batch, of the first runner asked for."""
    bundle, feature = options.bundle, options.bundle.feature(options.feature)
    runner = options.runners[0]
    step = _step(bundle, options.feature, runner)
    ways: dict[str, Way] = {}
    sizes = (1, 2, 4, 8, 16, 32)
    for batch in sizes:
        x, sigma, alpha = noisy(bundle.prior, batch)
        readout = None if feature.readout is None else feature.readout.expand(batch)
        ways[str(batch)] = partial(guided_as_in_a_tick, step, x, sigma, alpha, readout)
    timings = interleave(ways, seconds=options.seconds, settle=True)
    for batch in sizes:
        timing = timings[str(batch)]
        rate = 1e3 * batch / timing.p50
        gain = rate / (1e3 / timings["1"].p50)
        yield Line(
            case="throughput",
            setting=f"batch {batch}",
            way=runner,
            timing=timing,
            faster=gain if batch > 1 else None,
            more={"sample_rows_a_second": rate},
        )


def host(options: Options) -> Iterator[Line]:
    """The sampler's own work: 50 rows of a denoiser and a feature that cost nothing, microseconds a row."""
    world = GaussianWorld(s=1.3, shape=options.bundle.prior.shape)
    prior = Prior(lambda x, sigma: x, shape=world.shape, name="no cost")
    rows = 50
    for batch in options.batches:
        config = SampleConfig(num=batch, lam=0.0, steps=rows, batch_size=batch)
        run = prepare(prior, world.feature, config)
        draw = partial(run.draw_bucket, np.arange(batch))
        timing = interleave({"torch": draw}, seconds=options.seconds)["torch"]
        yield Line(
            case="host",
            setting=f"batch {batch}",
            way="torch",
            timing=timing,
            more={"us_a_row": 1e3 * timing.p50 / rows},
        )


# The published autoencoder (method 2): its width, its latents, its window, and the grid it reads.
PUBLISHED_ENCODER = (768, 12288, 7, 16)


def sae_rows(options: Options, encoder: tuple[int, int, int, int] = PUBLISHED_ENCODER) -> Iterator[Line]:
    """One latent's activation and its gradient with respect to the tokens: its own row, or the encoder whole."""
    width, latents, window, grid = encoder
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, grid * grid, width, generator=generator, requires_grad=True)
    weight = torch.randn(latents, width, window, window, generator=generator) / (width**0.5 * window)
    bias, chosen = torch.zeros(latents), latents // 3
    mixture, mask = pooling_tensors("centre", grid=(grid, grid), num_prefix_tokens=0)
    own = Readout(
        direction=weight[None, chosen : chosen + 1],
        bias=bias[None, chosen : chosen + 1],
        threshold=torch.zeros(1, 1),
        weight=torch.ones(1, 1),
        pooling=mixture.expand(1, 1, 3),
        mask=mask.view(1, 1, grid, grid),
    )

    def whole() -> tuple[Tensor, Tensor]:
        picture = tokens.transpose(1, 2).unflatten(2, (grid, grid))
        every = F.conv2d(picture, weight, bias, padding=window // 2).relu()
        a = pool(every[:, chosen].flatten(1)[:, None], own.pooling, mask.view(1, 1, -1))[:, 0]
        return a.detach(), torch.autograd.grad(a.sum(), tokens)[0]

    def row() -> tuple[Tensor, Tensor]:
        a = read(tokens, own)[0]
        return a.detach(), torch.autograd.grad(a.sum(), tokens)[0]

    setting = f"{width} -> {latents}, {window}x{window}, {grid}x{grid}"
    for name, got, wanted in zip(("activation", "gradient"), row(), whole(), strict=True):
        error = float((got - wanted).norm() / wanted.norm())
        if not error <= LATENT_GATE:
            why = f"{name} differs from the whole encoder's by {error:.1e}, allowed {LATENT_GATE:.0e}"
            yield Line(case="sae_rows", setting=setting, way="row", timing=None, refused=why)
            return
    ways: dict[str, Way] = {"encoder": whole, "row": row}
    peak = matmul_gflops()
    for line in lines("sae_rows", setting, ways, options):
        yield replace(line, more={"bound_ms": 1e-6 * _flops(ways[line.way]) / peak})


CASES: dict[str, Callable[[Options], Iterator[Line]]] = {
    "row": row,
    "picture": picture,
    "update": update,
    "throughput": throughput,
    "growth": growth,
    "host": host,
    "sae_rows": sae_rows,
}


def _step(bundle: Bundle, feature: str, way: str) -> Step:
    run = prepare(bundle.prior, bundle.feature(feature), SampleConfig(lam=0.5, **asked_by(way)))  # pyright: ignore[reportArgumentType]
    return run.programme.step


def noisy(prior: Prior, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, sigma, alpha at the native level LEVEL."""
    if prior.levels is None:
        raise ConfigError("bench: this prior has no levels of its own, so there is no plain baseline for it")
    sigma = torch.full((batch,), float(prior.levels[::-1][LEVEL]), dtype=torch.float64)
    zeros = torch.zeros(batch, dtype=torch.int64)
    key = torch.tensor([seed_key(0)]).expand(batch, 2)
    x = normal(key, torch.arange(batch), zeros, zeros, stream=STREAM_START, shape=prior.shape, dtype=torch.float32)
    return x, sigma, (1 - sigma**2).sqrt()


def _difference(output: StepOutput, expected: StepOutput, dtype: str) -> str | None:
    for name, allowed in GATES[dtype].items():
        got, wanted = getattr(output, name), getattr(expected, name)
        error = float((got - wanted).norm() / wanted.norm())
        if not error <= allowed:
            return f"{name} differs from the reference by {error:.1e}, allowed {allowed:.0e}"
    return None


def _flops(way: Way) -> int:
    """Floating-point operations of products and convolutions in one call, counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def _plain_picture(plain: PlainStep, plan: Any, prior: Prior, *, lam: float) -> Tensor:
    """The loop one would write: x <- a x + b D + e lam grad_a + c z over the table's rows, noise by the engine's definition."""
    key, zero = torch.tensor([seed_key(0)]), torch.zeros(1, dtype=torch.int64)
    x = normal(key, zero, zero, zero, stream=STREAM_START, shape=prior.shape, dtype=torch.float32)
    columns = {name: plan.column(name) for name in ("sigma", "a", "b", "c", "e")}
    for at in range(plan.num_rows):
        level = int((plain.sigmas - columns["sigma"][at]).abs().argmin())
        x0_hat, _, _, grad_a = plain(x, level)
        push = columns["e"][at] * lam * grad_a if plan.kind[at] == GraphKind.GUIDED else 0.0
        row = torch.tensor([at])
        z = normal(key, zero, row, zero, stream=STREAM_STEP, shape=prior.shape, dtype=torch.float32)
        x = columns["a"][at] * x + columns["b"][at] * x0_hat + push + columns["c"][at] * z
    return x.float()


def _update_arguments(batch: int, shape: tuple[int, ...]) -> StepInputs:
    generator = torch.Generator().manual_seed(0)
    x, x0_hat, grad_a, history = (torch.randn(batch, *shape, generator=generator) for _ in range(4))
    whole, ones = torch.zeros(batch, dtype=torch.int64), torch.ones(batch)
    return StepInputs(
        x=x,
        x0_hat=x0_hat,
        grad_a=grad_a,
        history=history,
        table=torch.full((1, 2, 11), 0.3),
        num_rows=torch.tensor([2]),
        plan=whole,
        row=whole,
        ok=ones.bool(),
        drive=ones,
        strength=ones,
        guided=ones.bool(),
        key=torch.tensor([seed_key(0)]).expand(batch, 2).contiguous(),
        index=torch.arange(batch),
        particle=whole,
    )
