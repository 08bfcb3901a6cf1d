"""Train a sparse autoencoder on a trunk's patch tokens: bundle emoji64's, before block 5, or another trunk's at its hook.

    x = A (token - m),    A = s (C + e I)^(-1/2),   C the tokens' covariance, e a tenth of its mean eigenvalue
    pre = W_enc (x - b) + b_enc,    f = pre where pre is among the k * batch largest of the batch, else 0
     (BatchTopK, arXiv:2412.06410)
    L = |x - (W_dec f + b)|^2 + 1/32 |residual - W_dec f_dead|^2                         (auxiliary loss:
    arXiv:2406.04093, sec. 2.4)

The batch's threshold is found on every 16th number (a full sort of 4 million numbers costs more than the step).
Decoder rows keep unit norm.
After training, batch competition is replaced by one fixed threshold (JumpReLU) at which the mean number of firing
latents is k, and scaling and
biases are folded in, so that the stored file is plain:  latent_j = pre_j if pre_j > threshold_j else 0,  pre =
encoder.weight @ token + encoder.bias,
token ~ decoder.weight^T latent + decoder.bias, all in the token's own units.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from train_trunk import FIXED_HANDEDNESS, augment
from training import (
    Clock,
    learning_rate,
    load_checkpoint,
    log_line,
    prepare_machine,
    save_checkpoint,
    to_unit_range,
)

from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.trunk import load_trunk


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one training; minutes counts optimisation only, not the filling of the token bank."""

    data: Path = Path("build/train/emoji64.npz")
    trunk: Path = Path("build/train/trunk/model")
    hook: str = "blocks.5"
    out: Path = Path("build/train/sae")
    minutes: float = 4.0
    threads: int = 2
    seed: int = 0
    num_latents: int = 2048
    k: int = 20
    batch: int = 1024
    views: int = 1
    floor: float = 0.1
    peak_lr: float = 1e-3
    warmup: int = 50
    dead_after: int = 100_000
    aux_k: int = 64
    aux_weight: float = 1 / 32
    max_steps: int = 10**9


@torch.no_grad()
def hook_tokens(trunk: Trunk, x0: Tensor) -> Tensor:
    """Patch tokens as sampling reads them: [n, 3, 64, 64] in [-1, 1] -> [n, patches, width]."""
    return trunk(x0)[:, trunk.num_prefix_tokens :]


@torch.no_grad()
def fill_bank(trunk: Trunk, arrays: dict[str, np.ndarray], views: int, generator: torch.Generator) -> Tensor:
    """Tokens [rows, width] of every training picture (all vendors), once as it is and `views` times lightly augmented."""
    own = ~arrays["fluent_heldout"] & ~arrays["fluent_skin"]
    images = torch.from_numpy(
        np.concatenate([arrays["fluent_images"][own], arrays["other_images"][~arrays["other_heldout"]]])
    )
    category = arrays["fluent_category"][own]
    may_flip = torch.zeros(len(images), dtype=torch.bool)
    may_flip[: len(category)] = torch.tensor([c not in FIXED_HANDEDNESS for c in category])
    bank = []
    for view in range(1 + views):
        # Fluent pictures are what the bundle explains: they are in every view, the other vendors' in two of them.
        rows = torch.arange(len(images) if view < 2 else len(category))
        for chunk in rows.split(64):
            x0 = to_unit_range(images[chunk])
            if view:
                x0 = augment(x0, may_flip[chunk], area=(0.8, 1.2), size_px=64, generator=generator)
            bank.append(hook_tokens(trunk, x0).flatten(0, 1))
    return torch.cat(bank)


class Autoencoder(nn.Module):
    """Encoder and decoder in normalised units; `threshold` is a running average of the batch's."""

    def __init__(self, width: int, num_latents: int, start: Tensor) -> None:
        super().__init__()
        # Directions start at centred tokens mixed with noise: far fewer dead latents than a random start.
        directions = F.normalize(start + 0.5 * torch.randn_like(start), dim=-1)
        self.decoder = nn.Parameter(directions.clone())
        self.encoder = nn.Parameter(
            0.3 * directions
        )  # k neighbouring latents add up: a full gain would overshoot k-fold
        self.encoder_bias = nn.Parameter(torch.zeros(num_latents))
        self.decoder_bias = nn.Parameter(torch.zeros(width))
        self.threshold = nn.Buffer(torch.zeros(()))
        self.idle = nn.Buffer(torch.zeros(num_latents))  # tokens since a latent last fired

    def pre(self, x: Tensor) -> Tensor:
        return (x - self.decoder_bias) @ self.encoder.T + self.encoder_bias


def batch_threshold(pre: Tensor, k: int) -> Tensor:
    """The value above which a batch keeps about k latents a token, from every 16th number."""
    sample = pre.detach().flatten()[:: 16 if pre.numel() > 1_000_000 else 1]
    keep = max(1, round(k / pre.shape[1] * len(sample)))
    return torch.topk(sample, keep, sorted=False).values.min().clamp(min=0)


def loss_of(model: Autoencoder, x: Tensor, config: Config) -> tuple[Tensor, dict[str, float]]:
    pre = model.pre(x)
    threshold = batch_threshold(pre, config.k)
    f = torch.where(pre > threshold, pre, 0.0)
    residual = x - (f @ model.decoder + model.decoder_bias)
    loss = residual.square().sum(-1).mean()
    fired = (f.detach() > 0).any(0)
    model.idle.copy_(torch.where(fired, 0.0, model.idle + len(x)))
    model.threshold.lerp_(threshold, 0.01 if model.threshold > 0 else 1.0)
    fvu = loss.item() / x.var(0).sum().item()
    dead = torch.nonzero(model.idle > config.dead_after)[:, 0]
    if len(dead):
        weak = pre[:, dead]
        if len(dead) > config.aux_k:
            cut = torch.topk(weak.detach(), config.aux_k, dim=-1).values[:, -1:]
            weak = torch.where(weak >= cut, weak, 0.0)
        loss = (
            loss + config.aux_weight * (residual.detach() - F.relu(weak) @ model.decoder[dead]).square().sum(-1).mean()
        )
    return loss, {"fvu": fvu, "dead": len(dead), "threshold": threshold.item()}


@torch.no_grad()
def whitening(tokens: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """(m, A): mean and symmetric map with x = A (token - m) of mean squared norm equal to the width.

    Without it the autoencoder spends itself on brightness and colour: 16 directions of the small trunk's 192 hold 97 % of
    the variance at the hook, and the plain version reached FVU 0.01 with 84 % of its latents dead. Directions
    weaker than `floor` mean eigenvalues stay attenuated. Linear, so it folds into the stored weights exactly.
    """
    mean = tokens.mean(0)
    centred = (tokens - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(tokens))
    gain = (values + floor * values.mean()).rsqrt()
    scale = (len(mean) / (values * gain.square()).sum()).sqrt()
    return mean, (vectors * (scale * gain) @ vectors.T).float()


@torch.no_grad()
def normal_form(model: Autoencoder, mean: Tensor, whiten: Tensor, threshold: float) -> dict[str, Tensor]:
    """Fold centring and whitening in; with unit-norm decoder rows a latent is measured in the token's own units.

    token ~ A^-1 (W_dec^T f + b) + m; with n_j = |A^-1 W_dec,j| the stored latent is n_j f_j.
    """
    unwhiten = torch.linalg.inv(whiten.double()).float()
    decoder = model.decoder @ unwhiten
    gain = decoder.norm(dim=1)
    encoder = model.encoder @ whiten
    bias = model.encoder_bias - model.encoder @ model.decoder_bias - encoder @ mean
    return {
        "encoder.weight": (encoder * gain[:, None]).contiguous(),
        "encoder.bias": (bias * gain).contiguous(),
        "threshold": threshold * gain,
        "decoder.weight": (decoder / gain[:, None]).contiguous(),
        "decoder.bias": (mean + unwhiten @ model.decoder_bias).contiguous(),
    }


@torch.no_grad()
def measure(tensors: dict[str, Tensor], tokens: Tensor, whiten: Tensor) -> dict[str, float]:
    """FVU (in the tokens' units, and whitened), mean number of firing latents and dead share of the stored form."""
    error, white_error, total_l0, fired = 0.0, 0.0, 0.0, torch.zeros(len(tensors["threshold"]), dtype=torch.bool)
    for chunk in tokens.split(8192):
        pre = chunk @ tensors["encoder.weight"].T + tensors["encoder.bias"]
        f = torch.where(pre > tensors["threshold"], pre, 0.0)
        residual = chunk - f @ tensors["decoder.weight"] - tensors["decoder.bias"]
        error += residual.square().sum().item()
        white_error += (residual @ whiten).square().sum().item()
        total_l0 += (f > 0).sum().item()
        fired |= (f > 0).any(0)
    centred = tokens - tokens.mean(0)
    spread, white_spread = centred.square().sum().item(), (centred @ whiten).square().sum().item()
    return {
        "fvu": error / spread,
        "fvu_whitened": white_error / white_spread,
        "l0": total_l0 / len(tokens),
        "dead_share": 1 - fired.float().mean().item(),
    }


def main(config: Config) -> None:
    prepare_machine(config.threads)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    arrays = dict(np.load(config.data))
    trunk = load_trunk(config.trunk, config.hook)
    bank = fill_bank(trunk, arrays, config.views, torch.Generator().manual_seed(config.seed + 1))
    mean, whiten = whitening(bank, config.floor)
    bank.sub_(mean)
    for chunk in bank.split(65536):  # in place: the bank is the largest thing in memory
        chunk.copy_(chunk @ whiten)
    start = bank[torch.randperm(len(bank), generator=generator)[: config.num_latents]]
    model = Autoencoder(bank.shape[1], config.num_latents, F.normalize(start, dim=-1) * 4)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.peak_lr, betas=(0.9, 0.99), fused=True)
    step, clock = 0, Clock(60 * config.minutes)
    if (path := config.out / "checkpoint.pt").exists():
        facts = load_checkpoint(path, modules={"model": model}, optimiser=optimiser, generator=generator)
        step, clock = facts["step"], Clock(60 * config.minutes, facts["seconds"])
    while clock.share < 1 and step < config.max_steps:
        lr = learning_rate(config.peak_lr, share=clock.share, step=step, warmup=config.warmup)
        optimiser.param_groups[0]["lr"] = lr
        x = bank[torch.randint(len(bank), (config.batch,), generator=generator)]
        loss, facts = loss_of(model, x, config)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            model.decoder.div_(model.decoder.norm(dim=-1, keepdim=True))
        step += 1
        if step % 50 == 0:
            log_line(
                config.out / "log.jsonl", {"step": step, "seconds": clock.total, "lr": lr, "loss": loss.item(), **facts}
            )
        if step % 1000 == 0:
            save_checkpoint(
                path,
                modules={"model": model},
                optimiser=optimiser,
                generator=generator,
                facts={"step": step, "seconds": clock.total},
            )
    save_checkpoint(
        path,
        modules={"model": model},
        optimiser=optimiser,
        generator=generator,
        facts={"step": step, "seconds": clock.total},
    )

    with torch.no_grad():  # one threshold at which k latents fire a token, over many batches
        sample = bank[torch.randperm(len(bank), generator=generator)[: 16 * config.batch]]
        threshold = float(np.mean([batch_threshold(model.pre(x), config.k).item() for x in sample.split(config.batch)]))
    tensors = normal_form(model, mean, whiten, threshold)
    pool, heldout = arrays["fluent_pool"], arrays["fluent_heldout"]

    def tokens_of(rows: np.ndarray) -> Tensor:
        images = to_unit_range(torch.from_numpy(arrays["fluent_images"][rows]))
        return torch.cat([hook_tokens(trunk, x).flatten(0, 1) for x in images.split(64)])

    train, held = (measure(tensors, tokens_of(pool & side), whiten) for side in (~heldout, heldout))
    facts = {
        "hook": config.hook, "kind": "jumprelu", "num_latents": config.num_latents, "width": bank.shape[1],
        "k": config.k, "steps": step, "seconds": round(clock.total, 1), "seed": config.seed,
        "tokens_seen": step * config.batch,
        "fvu": train["fvu"], "fvu_heldout": held["fvu"],
        "fvu_whitened": train["fvu_whitened"], "fvu_whitened_heldout": held["fvu_whitened"],
        "l0": train["l0"], "l0_heldout": held["l0"],
        "dead_share": train["dead_share"],
    }  # fmt: skip
    config.out.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().clone() for name, t in tensors.items()}, config.out / "sae.safetensors")
    (config.out / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    log_line(config.out / "log.jsonl", {"done": True, **facts})


if __name__ == "__main__":
    main(tyro.cli(Config))
