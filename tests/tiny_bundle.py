"""A bundle in the real layout and formats with random weights: 40 little pictures, a few thousand parameters, built in seconds.

    build_tiny_bundle(folder) -> folder      prior (3, 64, 64); trunk of 2 blocks, width 32; 24 latents at blocks.1

Latents are placed so that most pictures fire each, more or less; the last one is dead. Fixed: the same bytes every time.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tiltscope.engine.feature.poolings import central_half
from tiltscope.engine.feature.sae import load_sae
from tiltscope.engine.feature.trunk import TruncatedViT, load_trunk
from tiltscope.engine.feature.vit import ViTConfig
from tiltscope.engine.report.evaluator import Evaluator

HOOK = "blocks.1"
NUM_LATENTS = 24
NUM_PICTURES = 40
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (41, 98, 255),
    "yellow": (241, 196, 15),
    "black": (20, 20, 20),
}
FORMS = ("disc", "square", "bar", "ring")


def draw_pictures() -> tuple[np.ndarray, list[str]]:
    """uint8 [40, 64, 64, 3]: every form in every colour, small and large, on light grey."""
    y, x = np.mgrid[0:64, 0:64] - 31.5
    pictures, names = [], []
    for size_name, size in (("small", 12), ("large", 24)):
        for colour_name, colour in COLOURS.items():
            for form in FORMS:
                radius = np.hypot(x, y)
                inside = {
                    "disc": radius < size,
                    "square": np.maximum(abs(x), abs(y)) < 0.9 * size,
                    "bar": (abs(x) < size / 3) & (abs(y) < 1.2 * size),
                    "ring": (radius < size) & (radius > 0.6 * size),
                }[form]
                pictures.append(np.where(inside[..., None], np.array(colour), 240).astype(np.uint8))
                names.append(f"{size_name} {colour_name} {form}")
    return np.stack(pictures), names


def fill(module: nn.Module, generator: torch.Generator, *, bias: float = 0.02) -> None:
    """Every parameter random, signals kept of order one: matrices by fan-in, gains near one, offsets near zero."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if ("norm" in name and name.endswith("weight")) or "lambda1" in name:
                p.copy_(1 + 0.1 * noise)
            elif p.ndim < 2:
                p.copy_(bias * noise)
            else:
                p.copy_(noise * (2 / p[0].numel()) ** 0.5)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_prior(folder: Path, generator: torch.Generator) -> None:
    from diffusers import DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        unet = UNet2DModel(
            sample_size=16,
            in_channels=48,
            out_channels=48,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    fill(unet, generator)
    nn.Module.half(unet).save_pretrained(folder)
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample").save_pretrained(folder)


def write_trunk(folder: Path, generator: torch.Generator) -> None:
    sizes = {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_register_tokens": 4,
    }
    write_json(folder / "config.json", {"model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"], **sizes})
    write_json(
        folder / "preprocessor_config.json",
        {"image_mean": MEAN, "image_std": STD, "size": {"height": 64, "width": 64}},
    )
    trunk = TruncatedViT(ViTConfig(**sizes), "norm", mean=MEAN, std=STD)
    fill(trunk, generator)
    weights = dict(trunk.state_dict()) | {"embeddings.mask_token": torch.zeros(1, 1, 32)}
    save_file({name: t.half() for name, t in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def write_sae(folder: Path, trunk: TruncatedViT, pictures: Tensor, generator: torch.Generator) -> None:
    """Encoder rows along contrasts of two pictures' centres, biased so that each fires on most of the pictures."""
    tokens = trunk(pictures)
    centre = central_half(trunk.grid[0])
    patches = tokens[:, trunk.num_prefix_tokens :].unflatten(1, trunk.grid)[:, centre, centre].flatten(1, 2)
    first, second = torch.randint(0, NUM_PICTURES, (2, NUM_LATENTS), generator=generator)
    means = patches.mean(1)
    weight = F.normalize(means[first] - means[(second + (first == second)) % NUM_PICTURES], dim=-1)
    # Scaled to vary by about one over the pool, so that a lambda of one is a mild tilt.
    weight = weight / (patches @ weight.T).mean(1).std(0)[:, None]
    pre = patches @ weight.T
    bias = -pre.mean(1).median(0).values
    bias[-1] = -1e3  # dead
    threshold = 0.1 * pre.std((0, 1))
    folder.mkdir()
    tensors = {
        "encoder.weight": weight,
        "encoder.bias": bias,
        "threshold": threshold,
        "decoder.weight": weight.clone(),
        "decoder.bias": tokens.mean((0, 1)),
    }
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae.safetensors")
    write_json(folder / "config.json", {"hook": HOOK, "kind": "jumprelu", "num_latents": NUM_LATENTS, "width": 32})


def write_feature_table(path: Path, activations: np.ndarray, names: list[str], hook: str = HOOK) -> None:
    top = np.argsort(-activations, axis=0, kind="stable")[:5]
    mean, sd = activations.mean(0), activations.std(0)
    z = (np.take_along_axis(activations, top, 0) - mean) / np.where(sd > 0, sd, 1)
    num = activations.shape[1]
    words = [sorted({w for i in top[:, j] for w in names[i].split()}) for j in range(num)]
    pq.write_table(
        pa.table(
            {
                "feature": [f"{hook}:sae:{j}" for j in range(num)],
                "density": (activations > 0).mean(0),
                "max": activations.max(0),
                "selectivity": z.mean(0),
                # Every second latent is called by the first word of its strongest picture, the others have no name.
                "name": [names[top[0, j]].split()[1] if j % 2 else None for j in range(num)],
                "name_source": ["words" if j % 2 else None for j in range(num)],
                "words": words,
                "alive": (activations > 0).any(0),
            }
        ),
        path,
    )


def write_evaluator(folder: Path, generator: torch.Generator) -> Evaluator:
    with torch.random.fork_rng(devices=[]):
        evaluator = Evaluator()
    fill(evaluator, generator)
    folder.mkdir()
    save_file({name: t.half().contiguous() for name, t in evaluator.state_dict().items()}, folder / "model.safetensors")
    write_json(folder / "config.json", {"kind": "efficientnet_lite0"})
    return evaluator.eval()


def write_pool(
    folder: Path,
    pixels: np.ndarray,
    names: list[str],
    activations: np.ndarray,
    embeddings: Tensor,
    hook: str = HOOK,
) -> None:
    def webp(picture: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "WEBP", lossless=True)
        return buffer.getvalue()

    folder.mkdir()
    pq.write_table(
        pa.table(
            {
                "image": [{"bytes": webp(p), "path": f"{i:02d}.webp"} for i, p in enumerate(pixels)],
                "name": names,
                "code_points": [f"{0xE000 + i:x}" for i in range(NUM_PICTURES)],
                "category": [name.split()[2] for name in names],
                "keywords": [name.split() for name in names],
                "split": ["heldout" if i % 4 == 3 else "train" for i in range(NUM_PICTURES)],
            }
        ),
        folder / "pool.parquet",
    )
    columns = {f"{hook}:sae:{j}": activations[:, j].astype(np.float32) for j in range(activations.shape[1])}
    pq.write_table(pa.table(columns), folder / "activations.parquet")
    double = torch.from_numpy(activations).double()
    save_file({"mean": double.mean(0), "sd": double.std(0, correction=0)}, folder / "statistics.safetensors")
    save_file({"embeddings": F.normalize(embeddings, dim=-1).half()}, folder / "embeddings.safetensors")


def describe(folder: Path, **parts: Any) -> None:
    """(Re)write bundle.json with the hashes of the files as they are now; parts: other sections than the tiny bundle's."""
    entries = {
        str(p.relative_to(folder)): {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "bytes": p.stat().st_size}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "bundle.json"
    }
    write_json(
        folder / "bundle.json",
        {
            "schema_version": 1,
            "name": "tiny",
            "title": "Tiny",
            "description": "Random weights, for tests.",
            "licence": "Apache-2.0",
            "attribution": [],
            "files": entries,
            "prior": {"kind": "diffusers_unet2d", "path": "prior", "shape": [3, 64, 64], "pixel_unshuffle": 4},
            "trunk": {"kind": "dinov3_vit", "path": "trunk"},
            "saes": [{"hook": HOOK, "path": "sae", "kind": "jumprelu", "num_latents": NUM_LATENTS}],
            "evaluator": {"kind": "efficientnet_lite0", "path": "evaluator"},
            "pool": {"path": "pool", "num": NUM_PICTURES, "num_heldout": NUM_PICTURES // 4},
            "data": {},
            "training": {},
            "reference": {},
        }
        | parts,
    )


def build_tiny_bundle(folder: Path) -> Path:
    """Write the bundle into `folder` (made if need be) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    pixels, names = draw_pictures()
    x0 = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    write_prior(folder / "prior", generator)
    write_trunk(folder / "trunk", generator)
    with torch.no_grad():
        trunk = load_trunk(folder / "trunk", HOOK)
        write_sae(folder / "sae", trunk, x0, generator)
        activations = load_sae(folder / "sae/sae.safetensors").latents(trunk(x0), trunk).double().numpy()
        embeddings = write_evaluator(folder / "evaluator", generator).embed(x0)
    write_feature_table(folder / "sae/features.parquet", activations, names)
    write_pool(folder / "pool", pixels, names, activations, embeddings)
    (folder / "README.md").write_text("# Tiny: random weights, for tests\n")
    describe(folder)
    return folder
