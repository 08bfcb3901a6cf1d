"""What the three trainers share: threads and precision, a wall-clock schedule, an EMA, exact checkpoints, loss
curves, augmentation.

A trainer knows its own model and loss; this module must not know any of them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def prepare_machine(threads: int) -> None:
    """Threads, and denormals flushed: they cost 100x on some CPUs and appear in every decaying average.

    OMP_WAIT_POLICY=PASSIVE and GOMP_SPINCOUNT=0 must be set before torch is imported (train_all.sh does): spinning at every
    barrier makes a shared machine 5 to 7 times slower.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def probe_precision(repeats: int = 5) -> dict[str, float]:
    """Milliseconds of one convolution of the prior's size in each precision; a trainer may use bfloat16 only where it
    is faster.
    """
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, w = torch.randn(16, 96, 16, 16).to(dtype), torch.randn(96, 96, 3, 3).to(dtype)
        F.conv2d(x, w, padding=1)
        start = time.perf_counter()
        for _ in range(repeats):
            F.conv2d(x, w, padding=1)
        found[name] = 1e3 * (time.perf_counter() - start) / repeats
    return found


def choose_precision(wanted: str) -> str:
    """'auto' -> the faster of float32 and bfloat16 here; anything else as it is."""
    times = probe_precision()
    return min(times, key=lambda name: times[name]) if wanted == "auto" else wanted


def run_processes(train: Callable[[int, Any, str], None], config: Any, *, processes: int, precision: str) -> None:
    """train(rank, config, precision) in `processes` processes of one thread each, which can average their gradients."""
    if config.batch % processes:
        raise SystemExit(f"a batch of {config.batch} cannot be shared among {processes} processes")
    chosen = choose_precision(precision)
    if processes == 1:
        train(0, config, chosen)
        return
    with TemporaryDirectory() as folder:
        arguments = (train, config, chosen, f"file://{folder}/meeting", processes)
        torch.multiprocessing.spawn(_join, arguments, nprocs=processes)


def _join(
    rank: int, train: Callable[[int, Any, str], None], config: Any, precision: str, meeting: str, processes: int
) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    train(rank, config, precision)
    dist.destroy_process_group()


def seed_step(generator: torch.Generator, *, seed: int, step: int, rank: int) -> None:
    """A step's random numbers depend on (seed, step, process) alone: a checkpoint needs no random state."""
    generator.manual_seed((seed << 40) + (step << 8) + rank)


def average_gradients(model: nn.Module, extra: list[float]) -> list[float]:
    """Every gradient becomes its mean over the processes, in one message, and so do the numbers of `extra`."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not dist.is_initialized():
        return extra
    message = torch.cat([*(g.flatten() for g in gradients), torch.tensor(extra)])
    dist.all_reduce(message)
    message /= dist.get_world_size()
    *parts, numbers = message.split([*(g.numel() for g in gradients), len(extra)])
    for gradient, mean in zip(gradients, parts, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return numbers.tolist()


@dataclass
class Clock:
    """Seconds of training so far, over all sittings: `total` counts what a checkpoint brought, idle time between
    sittings does not count.
    """

    budget: float
    before: float = 0.0
    start: float = field(default_factory=time.monotonic)

    @property
    def total(self) -> float:
        return self.before + time.monotonic() - self.start

    @property
    def share(self) -> float:
        """In [0, 1]: how much of the budget is spent. The schedule runs over this, because a shared machine has no
        fixed step time.
        """
        return min(1.0, self.total / self.budget)


def learning_rate(
    peak: float, *, share: float, step: int, warmup: int, hold: float = 2 / 3, floor: float = 0.02
) -> float:
    """peak * min(1, (step+1)/warmup) * cosine from 1 (at `hold`) down to `floor` (at share 1): constant, then the
    last third decays.
    """
    decay = max(0.0, (share - hold) / (1 - hold))
    return peak * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decay)))


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with Nesterov momentum and AdamW's root mean square, its products in float32.

        B <- .95 B + .05 G,   U = orthogonal(.05 G + .95 B),   W <- (1 - lr decay) W - .2 lr sqrt(max(m, n)) U

    torch's own multiplies in bfloat16 whatever the machine: 3.6 of 4.6 seconds of a step of the prior where that is not native.
    """

    MOMENTUM = 0.95

    def __init__(self, matrices: list[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = self.state[matrix]["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, self.MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """[m, n] -> about U V^T of its U S V^T: singular values between .7 and 1.2, by Newton and Schulz's iteration with Keller
    Jordan's coefficients (kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonAndAdamW:
    """Muon for every matrix and convolution kernel [out, in k k], AdamW for biases and norms, as one optimiser.

    Muon takes matrices alone: it is given a view of each kernel. Its steps have AdamW's root mean square, so one learning rate
    serves both (arXiv:2502.16982). On the prior, in 300 steps from trained weights on the same batches: a loss .8 % below
    AdamW's, for an eighth more time a step.
    """

    def __init__(self, model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        self.matrices = [p for p in model.parameters() if p.ndim > 1]
        self.views = [nn.Parameter(p.detach().view(len(p), -1)) for p in self.matrices]
        others = [p for p in model.parameters() if p.ndim <= 1]
        self.parts = (
            Muon(self.views, lr=lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True),
        )
        self.others = others

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for view, matrix in zip(self.views, self.matrices, strict=True):
            view.grad = None if matrix.grad is None else matrix.grad.view_as(view)
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in (*self.matrices, *self.others):
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state[name])


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, parameter by parameter; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        a.copy_(b)


def save_checkpoint(
    path: Path,
    *,
    modules: dict[str, nn.Module],
    optimiser: torch.optim.Optimizer | MuonAndAdamW,
    generator: torch.Generator,
    facts: dict[str, Any],
) -> None:
    """Everything the next step reads: weights, averages, optimiser, random state, counters. Atomic (written beside,
    then renamed).
    """
    state = {
        "modules": {name: m.state_dict() for name, m in modules.items()},
        "optimiser": optimiser.state_dict(),
        "generator": generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "facts": facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(
    path: Path,
    *,
    modules: dict[str, nn.Module],
    optimiser: torch.optim.Optimizer | MuonAndAdamW,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Put a checkpoint back; returns its `facts`. The next step is bit for bit what it would have been (proved by
    tests/tools).
    """
    state = torch.load(path, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    optimiser.load_state_dict(state["optimiser"])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["torch_rng"])
    return state["facts"]


def write_trunk(trunk: Any, folder: Path) -> None:
    """A folder as transformers writes it, with the normalisation that the trunk was trained under."""
    trunk.save_pretrained(folder)
    processor = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def log_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line: the loss curve that the bundle's card shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}) + "\n")


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def imagenet_normalise(x0: Tensor) -> Tensor:
    """[-1, 1] -> ((x0 + 1)/2 - mean)/std, without a clamp: a denoised estimate outside the range keeps its gradient."""
    mean, std = x0.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1), x0.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return ((x0 + 1) / 2 - mean) / std


def uniform(shape: Iterable[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator) * (high - low) + low


def warp(
    images: Tensor, *, scale: Tensor, aspect: Tensor, shift: Tensor, flip: Tensor, background: float, size_px: int
) -> Tensor:
    """Resample a window: side `scale` (1 = the whole picture), centre `shift` in [-1, 1], mirrored where `flip`.

    images [n, 3, h, w] -> [n, 3, size_px, size_px]; outside the picture is background. scale, aspect [n]; shift [n,
    2]; flip bool [n].
    """
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0] = scale * aspect * torch.where(flip, -1.0, 1.0)
    theta[:, 1, 1] = scale / aspect
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [len(images), 3, size_px, size_px], align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background
