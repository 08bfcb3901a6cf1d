"""What the trained models are worth: k-NN of the trunk, its recovered loss, KID, precision, recall and copies of the prior;
and sheets to look at. Needs the training data; a training is judged without a bundle around it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from prior_quality import Copies, copies, kid, precision_recall, way
from sheets import labelled, sheet, to_pictures
from torch import Tensor
from training import prepare_machine, to_unit_range

from tiltscope.engine.report.evaluator import Evaluator, load_evaluator

BATCH = 32
NUM_SHOWN = 64
QUANTILES = (1, 10, 50, 90, 99)


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


@torch.no_grad()
def draw_samples(prior: Path, num: int, *, rows: int = 50, eta: float = 1.0, seed: int = 0, batch: int = 32) -> Tensor:
    """Unguided samples [num, 3, 64, 64] of an exported prior: DDIM(eta) on a grid uniform in the noise angle.

    Kept apart from the engine so that a training can be judged without it.
    """
    from prior_network import build_scheduler, denoise, level_angles, load_unet

    unet = load_unet(prior).eval()
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


@torch.no_grad()
def embed_pool(data: Path, evaluator_folder: Path) -> Tensor:
    """The evaluator's numbers of the pool's pictures, in pool order, not normalised: [pictures, 1280]."""
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
def measure_prior(data: Path, evaluator: Evaluator, x0: Tensor) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """KID, precision, recall and copies of unguided samples, with the scale to read them on; and what a person should look at."""
    arrays = dict(np.load(data))
    pictures = to_unit_range(torch.from_numpy(arrays["fluent_images"]))
    heldout, pool = arrays["fluent_heldout"], arrays["fluent_pool"]

    def embed(rows: Tensor) -> np.ndarray:
        return evaluator.embed(rows, batch_size=BATCH).double().numpy()

    samples, real = embed(x0), embed(pictures)
    test, train = real[heldout & pool], real[~heldout & pool]
    noise = torch.randn(len(test), *x0.shape[1:], generator=torch.Generator().manual_seed(1))
    mean = embed(pictures[pool].mean(0, keepdim=True)).repeat(len(test), axis=0)
    value, error = kid(samples, test)
    real_value, real_error = kid(train, test)
    mean_value = kid(mean, test)[0]
    precision, recall = precision_recall(samples, real[pool])
    found = copies(samples, real[~heldout], test)
    figures = {
        "num_samples": len(x0),
        "kid": value,
        "kid_se": error,
        "kid_train_pictures": real_value,
        "kid_train_pictures_se": real_error,
        "kid_mean_picture": mean_value,
        "kid_noise": kid(embed(noise), test)[0],
        "way": way(value, real=real_value, mean_picture=mean_value),
        "precision": precision,
        "recall": recall,
        "neighbours": 5,
        "copy_threshold": found.threshold,
        "copy_share": found.share,
        "distance_quantiles": list(QUANTILES),
        "sample_distances": np.percentile(found.samples, QUANTILES).tolist(),
        "heldout_distances": np.percentile(found.heldout, QUANTILES).tolist(),
    }
    nearest = _nearest_five(found, x0, pictures[~heldout])
    return figures, {"unguided": sheet(to_pictures(x0[:NUM_SHOWN]), columns=8), "nearest": nearest}


def _nearest_five(found: Copies, x0: Tensor, training: Tensor) -> Image.Image:
    """The five samples nearest to a training picture, each beside it."""
    closest = np.argsort(found.samples)[:5]
    rows = [
        (
            f"sample {at}\ndistance {found.samples[at]:.2f}",
            to_pictures(torch.stack([x0[at], training[found.nearest[at]]])),
        )
        for at in closest.tolist()
    ]
    return labelled(rows, scale=2, label_px=120)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which of the trained models to measure; sheets of pictures are written beside the figures."""

    train: Path = Path("build/train")
    evaluator: Path = Path("engine/_root/bundles/emoji64/evaluator")
    prior: Path | None = None
    num: int = 512
    threads: int = 1
    trunk_only: bool = False
    prior_only: bool = False


def main(config: Config) -> None:
    prepare_machine(config.threads)
    data, trunk = config.train / "emoji64.npz", config.train / "trunk/model"
    pool = embed_pool(data, config.evaluator)
    figures: dict[str, object] = {}
    if not config.prior_only:
        figures["knn_top1_heldout"] = measure_trunk(data, trunk, pool)
    if not config.prior_only and (config.train / "sae/config.json").exists():
        figures["cls_recovered_heldout"] = measure_recovered(data, trunk, config.train / "sae")
    if not config.trunk_only:
        prior = config.prior or config.train / "prior/model"
        samples = draw_samples(prior, config.num)
        figures["prior"], pictures = measure_prior(data, load_evaluator(config.evaluator), samples)
        for name, picture in pictures.items():
            picture.save(config.train / f"{name}.png")
    (config.train / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
