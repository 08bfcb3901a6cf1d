"""Train the trunk of bundle emoji64: a small DINOv3 ViT, self-supervised the DINO way.

    L = CE(Sinkhorn(teacher cls), student cls)   over global and local crops      (DINO, arXiv:2104.14294; Sinkhorn:
    SwAV, 2006.09882)
      + CE(Sinkhorn(teacher patch), student patch) over masked patches            (iBOT, arXiv:2111.07832)
      + 0.1 * KoLeo(student cls)                                                  (DINOv2, arXiv:2304.07193, sec. 4)
      + InfoNCE(student crop, student global crop of the same thing, in the batch) (SimCLR, arXiv:2002.05709)

The last term is there because of the budget: in the first hundreds of steps the prototype targets are nearly uniform
(measured: target entropy
5.25 of 5.55 nats after 110 steps) and teach little, while the contrast teaches from the first step.

A positive pair is two drawings of one code point by different vendors, so a feature comes to mean the thing and not
the rendering.
Crops are 40 px for most of the budget and 64 px (the size the bundle uses) for its last fifth, as DINOv3's high-resolution stage.
Only training-split pictures are seen.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from training import (
    Clock,
    average_gradients,
    imagenet_normalise,
    learning_rate,
    load_checkpoint,
    log_line,
    prepare_machine,
    run_processes,
    save_checkpoint,
    seed_step,
    to_unit_range,
    uniform,
    update_ema,
    warp,
    write_trunk,
)
from transformers import DINOv3ViTConfig, DINOv3ViTModel

BACKGROUND = 240 / 127.5 - 1
FIXED_HANDEDNESS = ("Flags", "Symbols")  # text and flags are not mirrored


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one training; minutes is the whole budget over all sittings."""

    data: Path = Path("build/train/emoji64.npz")
    out: Path = Path("build/train/trunk")
    minutes: float = 30.0
    processes: int = 1
    """of one thread each; `batch` is shared among them, and contrasts within its own share"""
    seed: int = 0
    batch: int = 32
    num_local: int = 3
    global_px: int = 40
    local_px: int = 24
    final_px: int = 64
    final_share: float = 0.2
    peak_lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 60
    teacher_decay: float = 0.95
    teacher_temperature: float = 0.04
    student_temperature: float = 0.1
    num_prototypes: int = 256
    mask_share: float = 0.35
    koleo: float = 0.1
    contrast: float = 1.0
    contrast_temperature: float = 0.15
    flag_share: float = 0.05
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the trunk's products; auto: what the machine does faster"""
    warm_start: Path | None = None
    max_steps: int = 10**9


def trunk_config() -> DINOv3ViTConfig:
    """The architecture that later sittings warm-start from."""
    return DINOv3ViTConfig(
        image_size=64, patch_size=8, hidden_size=192, intermediate_size=768, num_hidden_layers=8, num_attention_heads=6,
        num_register_tokens=4, pos_embed_rescale=1.2,
    )  # fmt: skip


class Head(nn.Module):
    """Projection to prototypes: MLP, L2-normalised bottleneck, cosine with unit-norm prototypes (DINO, sec. 3.1)."""

    def __init__(self, width: int, num_prototypes: int, hidden: int = 384, bottleneck: int = 96) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, bottleneck))

    def embed(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.mlp(tokens), dim=-1)

    def score(self, embedded: Tensor) -> Tensor:
        return embedded @ F.normalize(self.prototypes, dim=-1).T

    def forward(self, tokens: Tensor) -> Tensor:
        return self.score(self.embed(tokens))


class Student(nn.Module):
    def __init__(self, num_prototypes: int) -> None:
        super().__init__()
        config = trunk_config()
        self.trunk = DINOv3ViTModel(config)
        self.trunk.set_attn_implementation("eager")  # 30 tokens: faster than the blocked kernel (measured)
        self.cls_head = Head(config.hidden_size, num_prototypes)
        self.patch_head = Head(config.hidden_size, num_prototypes)


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignment [n, k] whose rows sum to one and whose columns are equally used (SwAV, eq. 3)."""
    q = torch.exp((scores - scores.max()) / temperature).T
    k, n = q.shape
    for _ in range(iterations):
        q = q / (q.sum(1, keepdim=True) + 1e-9) / k
        q = q / (q.sum(0, keepdim=True) + 1e-9) / n
    return (q * n).T


def koleo(cls: Tensor) -> Tensor:
    """-mean log distance to the nearest neighbour on the sphere: spreads the batch (DINOv2)."""
    z = F.normalize(cls, dim=-1)
    nearest = (z @ z.T - 2 * torch.eye(len(z))).max(dim=1).values
    return -torch.log((2 - 2 * nearest).clamp(min=1e-8).sqrt() + 1e-6).mean()


class Things:
    """Training pictures grouped by thing (bare code points): Fluent first, the other vendors' drawings after it."""

    def __init__(self, path: Path, flag_share: float) -> None:
        arrays = np.load(path)
        own = ~arrays["fluent_heldout"] & ~arrays["fluent_skin"]
        other = ~arrays["other_heldout"]
        self.images = torch.from_numpy(np.concatenate([arrays["fluent_images"][own], arrays["other_images"][other]]))
        bare = np.concatenate([arrays["fluent_bare"][own], arrays["other_bare"][other]])
        names, thing = np.unique(bare[: own.sum()], return_inverse=True)
        place = {name: i for i, name in enumerate(names)}
        self.drawings: list[list[int]] = [[] for _ in names]
        for i, name in enumerate(bare):
            if name in place:
                self.drawings[place[name]].append(i)
        category = np.empty(len(names), dtype=object)
        category[thing] = arrays["fluent_category"][own]
        flag = category == "Flags"
        self.may_flip = torch.tensor([c not in FIXED_HANDEDNESS for c in category])
        self.weight = torch.from_numpy(np.where(flag, flag_share / flag.sum(), (1 - flag_share) / (~flag).sum()))

    def draw(self, batch: int, num_crops: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """-> pictures [num_crops, batch, 3, 64, 64], may_flip [batch]. Crop 0 shows the Fluent drawing, the others
        any vendor's.
        """
        things = torch.multinomial(self.weight, batch, generator=generator)
        pick = torch.randint(0, 2**20, (num_crops, batch), generator=generator)
        rows = [
            [
                self.drawings[t][0 if c == 0 else int(pick[c, b]) % len(self.drawings[t])]
                for b, t in enumerate(things.tolist())
            ]
            for c in range(num_crops)
        ]
        return torch.stack([to_unit_range(self.images[r]) for r in rows]), self.may_flip[things]


def augment(
    images: Tensor, may_flip: Tensor, *, area: tuple[float, float], size_px: int, generator: torch.Generator
) -> Tensor:
    """A random crop with mild colour changes, a little blur and noise (what x0_hat looks like while it is being sampled)."""
    n = len(images)
    scale = uniform((n,), *area, generator).sqrt()
    shift = uniform((n, 2), -1, 1, generator) * (1 - scale).clamp(min=0.05)[:, None]
    flip = may_flip & (torch.rand(n, generator=generator) < 0.5)
    x = warp(
        images,
        scale=scale,
        aspect=uniform((n,), -0.2, 0.2, generator).exp(),
        shift=shift,
        flip=flip,
        background=BACKGROUND,
        size_px=size_px,
    )
    contrast, brightness = uniform((n, 1, 1, 1), 0.7, 1.3, generator), uniform((n, 3, 1, 1), -0.15, 0.15, generator)
    x = x * contrast + brightness + uniform((n, 1, 1, 1), -0.2, 0.2, generator)
    grey = torch.rand(n, 1, 1, 1, generator=generator) < 0.1
    x = torch.where(grey, x.mean(1, keepdim=True).expand_as(x), x)
    blurred = torch.rand(n, 1, 1, 1, generator=generator) < 0.2
    x = torch.where(blurred, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), x)
    amount = 0.12 * torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.3)
    return x + amount * torch.randn(x.shape, generator=generator)


def block_mask(n: int, side: int, share: float, generator: torch.Generator) -> Tensor:
    """bool [n, side*side]: one rectangle a picture plus scattered patches, about `share` in all; every second picture
    has none.
    """
    rows, cols = torch.arange(side)[None, :, None], torch.arange(side)[None, None, :]
    extent = max(2, round(side * share**0.5))
    corner = torch.randint(0, side - extent + 1, (n, 2, 1, 1), generator=generator)
    mask = (
        (rows >= corner[:, 0])
        & (rows < corner[:, 0] + extent)
        & (cols >= corner[:, 1])
        & (cols < corner[:, 1] + extent)
    )
    mask = mask | (torch.rand(n, side, side, generator=generator) < 0.08)
    return mask.flatten(1) & (torch.arange(n) % 2 == 0)[:, None]


def loss_of(
    student: Student,
    teacher: Student,
    things: Things,
    config: Config,
    global_px: int,
    generator: torch.Generator,
    precision: str = "float32",
) -> tuple[Tensor, dict[str, float]]:
    b, num_crops = config.batch // config.processes, 2 + config.num_local
    pictures, may_flip = things.draw(b, num_crops, generator)
    large = augment(
        pictures[:2].flatten(0, 1), may_flip.repeat(2), area=(0.45, 1.15), size_px=global_px, generator=generator
    )
    small = augment(
        pictures[2:].flatten(0, 1),
        may_flip.repeat(config.num_local),
        area=(0.1, 0.45),
        size_px=config.local_px,
        generator=generator,
    )
    large, small = imagenet_normalise(large), imagenet_normalise(small)
    mask = block_mask(2 * b, global_px // 8, config.mask_share, generator)
    prefix = 1 + student.trunk.config.num_register_tokens

    def read(trunk: DINOv3ViTModel, pixels: Tensor, masked: Tensor | None = None) -> Tensor:
        # Heads and losses stay in float32: scores are divided by a temperature of 0.04.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            return trunk(pixels, bool_masked_pos=masked).last_hidden_state.float()

    with torch.no_grad():
        seen = read(teacher.trunk, large)  # [2b, 1+4+p, 192]
        target_cls = sinkhorn(teacher.cls_head(seen[:, 0]), config.teacher_temperature).view(2, b, -1)
        target_patch = sinkhorn(teacher.patch_head(seen[:, prefix:][mask]), config.teacher_temperature)

    tokens = read(student.trunk, large, mask)
    local = read(student.trunk, small)[:, 0]
    cls = torch.cat([tokens[:, 0], local])  # [(2 + num_local) * b, 192]
    queries = student.cls_head.embed(cls)
    log_cls = F.log_softmax(student.cls_head.score(queries) / config.student_temperature, dim=-1).view(num_crops, b, -1)
    log_patch = F.log_softmax(student.patch_head(tokens[:, prefix:][mask]) / config.student_temperature, dim=-1)

    pairs = [(t, s) for t in range(2) for s in range(num_crops) if s != t]
    dino = -torch.stack([(target_cls[t] * log_cls[s]).sum(-1).mean() for t, s in pairs]).mean()
    crops = queries.view(num_crops, b, -1)
    near = crops @ crops[:2, None].transpose(-1, -2) / config.contrast_temperature  # [2, crops, b, b]
    contrast = torch.stack([F.cross_entropy(near[t, s], torch.arange(b)) for t, s in pairs]).mean()
    ibot = -(target_patch * log_patch).sum(-1).mean()
    spread = koleo(tokens[:b, 0]) + koleo(tokens[b:, 0])
    usage = target_cls.mean((0, 1))
    facts = {
        "dino": dino.item(), "ibot": ibot.item(), "koleo": spread.item(), "contrast": contrast.item(),
        "prototypes_used": float(torch.exp(-(usage * (usage + 1e-9).log()).sum())),
        "target_entropy": float(-(target_cls * (target_cls + 1e-9).log()).sum(-1).mean()),
    }  # fmt: skip
    return dino + ibot + config.koleo * spread + config.contrast * contrast, facts


def train(rank: int, config: Config, precision: str) -> None:
    """One process of `config.processes`; process 0 writes."""
    prepare_machine(threads=1)
    torch.manual_seed(config.seed)
    generator = torch.Generator()
    things = Things(config.data, config.flag_share)
    student = Student(config.num_prototypes).train()
    if config.warm_start is not None:  # the trunk alone: the heads are not shipped, and start anew
        known = DINOv3ViTModel.from_pretrained(config.warm_start).float().state_dict()
        student.trunk.load_state_dict(known)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    decayed = [p for p in student.parameters() if p.ndim > 1]
    rest = [p for p in student.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=config.peak_lr,
        fused=True,
    )
    modules = {"student": student, "teacher": teacher}
    step, clock = 0, Clock(60 * config.minutes)
    if (path := config.out / "checkpoint.pt").exists():
        facts = load_checkpoint(path, modules=modules, optimiser=optimiser, generator=generator)
        step, clock = facts["step"], Clock(60 * config.minutes, facts["seconds"])

    def save() -> None:
        facts = {"step": step, "seconds": clock.total}
        save_checkpoint(path, modules=modules, optimiser=optimiser, generator=generator, facts=facts)
        write_trunk(teacher.trunk, config.out / "model")  # so an unfinished training can be looked at, and shipped

    saved, share = time.monotonic(), clock.share
    while share < 1 and step < config.max_steps:
        seed_step(generator, seed=config.seed, step=step, rank=rank)
        lr = learning_rate(config.peak_lr, share=share, step=step, warmup=config.warmup)
        for group in optimiser.param_groups:
            group["lr"] = lr
        global_px = config.final_px if share > 1 - config.final_share else config.global_px
        loss, facts = loss_of(student, teacher, things, config, global_px, generator, precision)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        # 0.95 rising to 0.999: a short training needs a teacher that follows at first and averages at the end.
        teacher_decay = 1 - (1 - config.teacher_decay) * (0.001 / (1 - config.teacher_decay)) ** share
        # The schedule is a clock's, and the processes must agree on it: on its mean, as on the gradient's.
        share, *means = average_gradients(student, [clock.share, loss.item(), *facts.values()])
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimiser.step()
        update_ema(teacher, student, teacher_decay)
        step += 1
        if rank > 0:
            continue
        if step % 10 == 0:
            figures = dict(zip(("loss", *facts), means, strict=True))
            record = {"step": step, "seconds": clock.total, "lr": lr, "global_px": global_px, **figures}
            log_line(config.out / "log.jsonl", record)
        if time.monotonic() - saved > 120:
            save()
            saved = time.monotonic()
    if rank == 0:
        save()
        facts = {"step": step, "seconds": clock.total, "batch": config.batch, "seed": config.seed}
        log_line(config.out / "log.jsonl", {"done": True, **facts, "precision": precision})


def main(config: Config) -> None:
    run_processes(train, config, processes=config.processes, precision=config.precision)


if __name__ == "__main__":
    main(tyro.cli(Config))
