"""What the trained models are worth: k-NN of the trunk, KID and precision/recall of the prior, the trunk's recovered
loss; and contact sheets to look at.

KID  = unbiased MMD^2 with k(a, b) = (a.b/d + 1)^3 over the evaluator's 1,280 features          (arXiv:1801.01401, sec. 4)
precision, recall = share of samples (pictures) inside the other set's k = 3 nearest-neighbour balls   (arXiv:1904.06991)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from training import prepare_machine, to_unit_range


def nearest_category(
    train: Tensor, train_labels: np.ndarray, queries: Tensor, labels: np.ndarray, k: int = 10
) -> float:
    """Share of queries whose category is the (similarity-weighted) vote of their k nearest pictures in the training
    split, cosine similarity.
    """
    similarity = F.normalize(queries, dim=-1) @ F.normalize(train, dim=-1).T
    near = similarity.topk(k, dim=-1)
    classes, index = np.unique(train_labels, return_inverse=True)
    votes = torch.zeros(len(queries), len(classes))
    votes.scatter_add_(1, torch.from_numpy(index)[near.indices], torch.exp(near.values / 0.1))
    return float((classes[votes.argmax(1).numpy()] == labels).mean())


def kid(a: Tensor, b: Tensor, *, subsets: int = 20, subset_size: int = 96, seed: int = 0) -> tuple[float, float]:
    """(KID over all rows, standard error from random subsets)."""

    def mmd(x: Tensor, y: Tensor) -> float:
        x, y = x.double(), y.double()
        k = lambda u, v: (u @ v.T / u.shape[1] + 1) ** 3  # noqa: E731
        kx, ky, n, m = k(x, x), k(y, y), len(x), len(y)
        return float(
            (kx.sum() - kx.trace()) / (n * (n - 1)) + (ky.sum() - ky.trace()) / (m * (m - 1)) - 2 * k(x, y).mean()
        )

    generator = torch.Generator().manual_seed(seed)

    def some(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:subset_size]]

    draws = [mmd(some(a), some(b)) for _ in range(subsets)]
    return mmd(a, b), float(np.std(draws, ddof=1) / np.sqrt(subsets))


def precision_recall(samples: Tensor, pictures: Tensor, k: int = 3) -> tuple[float, float]:
    def radius(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values

    between = torch.cdist(samples.double(), pictures.double())
    inside_pictures = (between <= radius(pictures.double())[None]).any(1).double().mean()
    inside_samples = (between <= radius(samples.double())[:, None]).any(0).double().mean()
    return float(inside_pictures), float(inside_samples)


@torch.no_grad()
def draw_samples(prior: Path, num: int, *, rows: int = 50, eta: float = 1.0, seed: int = 0, batch: int = 32) -> Tensor:
    """Unguided samples [num, 3, 64, 64] of an exported prior: DDIM(eta) on a grid uniform in the noise angle.

    Kept apart from the engine so that a training can be judged without it.
    """
    from diffusers import UNet2DModel
    from train_prior import build_scheduler, denoise, level_angles

    unet = UNet2DModel.from_pretrained(prior, low_cpu_mem_usage=False).float().eval()
    angles = level_angles(build_scheduler())
    grid = np.linspace(np.arccos(1e-3), angles[0], rows)
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, num, batch):
        x = torch.randn(min(batch, num - start), 3, 64, 64, generator=generator)
        x0_hat = x
        for row, theta in enumerate(grid):
            alpha, sigma = np.cos(theta), np.sin(theta)
            t = float(np.interp(theta, angles, np.arange(len(angles))))
            x0_hat = denoise(unet, x, torch.full((len(x),), t))
            if row + 1 < rows:
                alpha_next, sigma_next = np.cos(grid[row + 1]), np.sin(grid[row + 1])
                noise = eta * sigma_next / sigma * np.sqrt(max(0.0, 1 - (alpha / alpha_next) ** 2))
                eps_hat = (x - alpha * x0_hat) / sigma
                x = alpha_next * x0_hat + np.sqrt(max(0.0, sigma_next**2 - noise**2)) * eps_hat
                x = x + noise * torch.randn(x.shape, generator=generator)
        out.append(x0_hat)
    return torch.cat(out)


def contact_sheet(x0: Tensor, path: Path, *, columns: int = 12, scale: int = 2) -> None:
    from PIL import Image

    n, _, h, w = x0.shape
    rows = -(-n // columns)
    sheet = torch.full((3, rows * (h + 2), columns * (w + 2)), 1.0)
    for i in range(n):
        r, c = divmod(i, columns)
        sheet[:, r * (h + 2) : r * (h + 2) + h, c * (w + 2) : c * (w + 2) + w] = x0[i].clamp(-1, 1)
    pixels = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def embed_pool(data: Path, evaluator_folder: Path) -> Tensor:
    """The evaluator's numbers of the pool's pictures, in pool order, not normalised: [pictures, 1280]."""
    from tiltscope.engine.report.evaluator import load_evaluator

    arrays = np.load(data)
    return load_evaluator(evaluator_folder).embed(
        to_unit_range(torch.from_numpy(arrays["fluent_images"][arrays["fluent_pool"]]))
    )


@torch.no_grad()
def measure_trunk(data: Path, trunk_folder: Path, embedded_pool: Tensor) -> dict[str, float]:
    """k-NN over categories on held-out pool pictures: trunk, random weights, raw pixels, evaluator; and the share of
    the commonest category.
    """
    from train_trunk import trunk_config
    from training import imagenet_normalise
    from transformers import DINOv3ViTModel

    arrays = np.load(data)
    pool, held, labels = arrays["fluent_pool"], arrays["fluent_heldout"], arrays["fluent_category"]
    train, query = np.flatnonzero(pool & ~held), np.flatnonzero(pool & held)
    x0 = to_unit_range(torch.from_numpy(arrays["fluent_images"]))

    def embed(trunk: DINOv3ViTModel, rows: np.ndarray) -> Tensor:
        out = []
        for x in x0[rows].split(64):
            tokens = trunk(imagenet_normalise(x)).last_hidden_state
            prefix = 1 + trunk.config.num_register_tokens
            out.append(
                torch.cat([F.normalize(tokens[:, 0], dim=-1), F.normalize(tokens[:, prefix:].mean(1), dim=-1)], dim=-1)
            )
        return torch.cat(out)

    torch.manual_seed(0)
    trunk = DINOv3ViTModel.from_pretrained(trunk_folder, attn_implementation="eager").float().eval()
    untrained = DINOv3ViTModel(trunk_config()).eval()
    held_in_pool = torch.from_numpy(held[pool])
    embeddings = {
        "trunk": [embed(trunk, rows) for rows in (train, query)],
        "random_weights": [embed(untrained, rows) for rows in (train, query)],
        "raw_pixels": [(x0[rows].flatten(1) - x0[train].flatten(1).mean(0)) for rows in (train, query)],
        "evaluator": [embedded_pool[~held_in_pool], embedded_pool[held_in_pool]],
    }
    out = {name: nearest_category(a, labels[train], b, labels[query]) for name, (a, b) in embeddings.items()}
    out["commonest_category"] = float(max(np.mean(labels[query] == c) for c in np.unique(labels[query])))
    return out


@torch.no_grad()
def measure_recovered(data: Path, trunk_folder: Path, sae: Path) -> float:
    """1 - |cls(reconstruction) - cls|^2 / |cls(mean token) - cls|^2 on held-out pool pictures: how much of what the
    blocks after the hook do survives.
    """
    from safetensors.torch import load_file
    from training import imagenet_normalise
    from transformers import DINOv3ViTModel

    arrays, tensors = np.load(data), load_file(sae / "sae.safetensors")
    x0 = to_unit_range(torch.from_numpy(arrays["fluent_images"][arrays["fluent_pool"] & arrays["fluent_heldout"]]))
    trunk = DINOv3ViTModel.from_pretrained(trunk_folder, attn_implementation="eager").float().eval()
    hook = int(json.loads((sae / "config.json").read_text())["hook"].split(".")[1])
    pixels = imagenet_normalise(x0)
    stream, position = trunk.embeddings(pixels), trunk.rope_embeddings(pixels)
    for layer in trunk.model.layer[:hook]:
        stream = layer(stream, position_embeddings=position)
    prefix = 1 + trunk.config.num_register_tokens
    tokens = stream[:, prefix:]
    pre = tokens @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    latents = torch.where(pre > tensors["threshold"], pre, 0.0)

    def cls(patches: Tensor) -> Tensor:
        s = torch.cat([stream[:, :prefix], patches], dim=1)
        for layer in trunk.model.layer[hook:]:
            s = layer(s, position_embeddings=position)
        return trunk.norm(s)[:, 0]

    whole = cls(tokens)
    kept = cls(latents @ tensors["decoder.weight"] + tensors["decoder.bias"])
    ablated = cls(tokens.mean((0, 1)).expand_as(tokens))
    return float(1 - (kept - whole).square().sum() / (ablated - whole).square().sum())


@torch.no_grad()
def measure_prior(
    data: Path, prior: Path, evaluator_folder: Path, embedded_pool: Tensor, *, num: int = 192, sheet: Path | None = None
) -> dict[str, float]:
    """KID, precision and recall of unguided samples against the whole pool, with the references that give the scale."""
    from tiltscope.engine.report.evaluator import load_evaluator

    arrays = np.load(data)
    pool = arrays["fluent_pool"]
    held = torch.from_numpy(arrays["fluent_heldout"][pool])
    mean = to_unit_range(torch.from_numpy(arrays["fluent_images"][pool])).mean(0, keepdim=True)
    evaluator = load_evaluator(evaluator_folder)
    samples = draw_samples(prior, num)
    if sheet is not None:
        contact_sheet(samples[:96], sheet)
    embedded = evaluator.embed(samples)
    noise = evaluator.embed(torch.randn(num, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    value, error = kid(embedded, embedded_pool)
    precision, recall = precision_recall(embedded, embedded_pool)
    return {
        "kid": value,
        "kid_se": error,
        "precision": precision,
        "recall": recall,
        "num_samples": num,
        "kid_heldout_pictures": kid(embedded_pool[held], embedded_pool[~held])[0],
        "kid_mean_picture": kid(evaluator.embed(mean).expand(num, -1), embedded_pool)[0],
        "kid_noise": kid(noise, embedded_pool)[0],
    }


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which of the trained models to measure; sheets of pictures are written beside the figures."""

    train: Path = Path("build/train")
    evaluator: Path = Path("engine/_root/bundles/emoji64/evaluator")
    prior: Path | None = None
    num: int = 192
    threads: int = 1
    trunk_only: bool = False


def main(config: Config) -> None:
    prepare_machine(config.threads)
    data, trunk = config.train / "emoji64.npz", config.train / "trunk/model"
    pool = embed_pool(data, config.evaluator)
    figures: dict[str, object] = {"knn_top1_heldout": measure_trunk(data, trunk, pool)}
    if (config.train / "sae/config.json").exists():
        figures["cls_recovered_heldout"] = measure_recovered(data, trunk, config.train / "sae")
    if not config.trunk_only:
        prior = config.prior or config.train / "prior/model"
        figures["prior"] = measure_prior(
            data, prior, config.evaluator, pool, num=config.num, sheet=config.train / "samples.png"
        )
    (config.train / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
