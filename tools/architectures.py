"""One question asked of two architectures: the embedded ViT and a ConvNeXt (tools/architectures.sh makes its bundle).

    python tools/architectures.py pictures --out FOLDER     the training data's pool as anyone's folder of pictures
    python tools/architectures.py ask --convnext BUNDLE     the figure and the tables of docs/architectures.md

The question is a word: the latent of that name which is most selective in each bundle. Both are explained at the same distance
from their own natural mean, and every answer's pictures are read by both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from measure import nearest_category
from PIL import Image
from pool_files import ArrayPictures
from train_convnext import trunk_config
from training import to_unit_range, write_trunk

import tiltscope
from tiltscope.engine.bundle import Bundle, FeatureInfo
from tiltscope.engine.feature.hooked import Trunk
from tiltscope.engine.feature.trunk import load_trunk
from tiltscope.engine.samples import Explanation

PAGE = Path("docs/architectures.md")
BEGIN, END = "<!-- tools/architectures.py: begin -->", "<!-- end -->"
TOP = 20
ANSWERS = {"tilt": "tilt", "topk": "top-K", "hard": "hard truncation", "actmax": "activation maximisation"}


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Write the pool's pictures as PNG files with metadata.jsonl."""

    data: Path = Path("build/train/emoji64.npz")
    out: Path


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Explain one word in both bundles."""

    convnext: Path
    data: Path = Path("build/train/emoji64.npz")
    out: Path = Path("build/architectures")
    figure: Path = Path("docs/figures/architectures.png")
    word: str | None = None
    """what to ask for; default: the name that both bundles have and are most selective for"""
    target_z: float = 2.0
    num: int = 8
    steps: int = 25
    seed: int = 0


def named(bundle: Bundle) -> dict[str, FeatureInfo]:
    """The most selective latent of each name."""
    best: dict[str, FeatureInfo] = {}
    for info in bundle.features():
        if info.name is not None and info.alive and info.selectivity > getattr(best.get(info.name), "selectivity", 0.0):
            best[info.name] = info
    return best


def choose(bundles: dict[str, Bundle], word: str | None) -> dict[str, FeatureInfo]:
    """A latent of one name in each. Stops with what there is, where there is none."""
    found = {name: named(bundle) for name, bundle in bundles.items()}
    both = set.intersection(*(set(each) for each in found.values()))
    if word is None:
        ranked = sorted(both, key=lambda each: (-min(names[each].selectivity for names in found.values()), each))
        print(f"names that both have: {', '.join(ranked[:40])}")
        word = ranked[0] if ranked else ""
    if word not in both:
        raise SystemExit(f"{word!r} names no latent in both bundles; both have: {', '.join(sorted(both)) or 'none'}")
    return {name: names[word] for name, names in found.items()}


def pooled(trunk: Trunk, x0: torch.Tensor) -> torch.Tensor:
    """Mean patch token of each picture."""
    with torch.no_grad():
        return torch.cat([trunk(part)[:, trunk.num_prefix_tokens :].mean(1) for part in x0.split(64)])


def judge(trunks: dict[str, Trunk], data: Path) -> dict[str, float]:
    """k-NN over categories, held-out pictures of the pool, on the mean token of the hook (tools/measure.py)."""
    arrays = np.load(data)
    pool, held, labels = arrays["fluent_pool"], arrays["fluent_heldout"], arrays["fluent_category"]
    train, query = np.flatnonzero(pool & ~held), np.flatnonzero(pool & held)
    x_train, x_query = (to_unit_range(torch.from_numpy(arrays["fluent_images"][rows])) for rows in (train, query))
    found: dict[str, float] = {}
    for name, trunk in trunks.items():
        a, b = pooled(trunk, x_train), pooled(trunk, x_query)
        centre = a.mean(0)
        found[name] = nearest_category(a - centre, labels[train], b - centre, labels[query])
    found["the commonest category"] = float(max(np.mean(labels[query] == c) for c in np.unique(labels[query])))
    return found


def untrained(hook: str, place: Path) -> Trunk:
    """The ConvNeXt as it began."""
    from transformers import DINOv3ConvNextModel

    torch.manual_seed(0)
    write_trunk(DINOv3ConvNextModel(trunk_config()), place)
    return load_trunk(place, hook)


def readings(results: dict[str, Explanation], bundles: dict[str, Bundle], chosen: dict[str, FeatureInfo]) -> list[str]:
    """Rows of the table: each answer's pictures, by both features, in their own natural standard deviations."""
    rows = ["| pictures of | answer | ViT's z | ConvNeXt's z | naturalness | diversity |", "|---|---|---|---|---|---|"]
    features = {name: bundles[name].feature(info.feature) for name, info in chosen.items()}
    natural = {name: bundles[name].pool.activations(feature) for name, feature in features.items()}
    for asked, result in results.items():
        for answer, title in ANSWERS.items():
            samples = result.answers[answer]
            with torch.no_grad():
                read = {name: feature.activation(samples.x0[samples.ok]).double() for name, feature in features.items()}
            z = {name: (float(a.mean()) - natural[name].mean()) / natural[name].std() for name, a in read.items()}
            numbers = [result.metrics[answer][each] for each in ("naturalness", "diversity")]
            told = " | ".join("-" if value is None else f"{value:.2f}" for value in numbers)
            rows.append(f"| {asked} | {title} | {z['ViT']:.1f} | {z['ConvNeXt']:.1f} | {told} |")
    one, other = natural.values()
    shared = len({*np.argsort(-one)[:TOP].tolist()} & {*np.argsort(-other)[:TOP].tolist()})
    rows += [
        "",
        f"Over the {len(one)} pictures of the pool the two features correlate by {np.corrcoef(one, other)[0, 1]:.2f}; of the "
        f"{TOP} pictures that fire each most, {shared} are the same.",
    ]
    return rows


def sheet(folders: dict[str, Path]) -> Image.Image:
    """Both figures of four answers, one above the other."""
    from four_answers import figure

    parts = [figure(json.loads((folder / "manifest.json").read_text()), folder) for folder in folders.values()]
    whole = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)), (253, 253, 251))
    for at, part in enumerate(parts):
        whole.paste(part, (0, sum(before.height for before in parts[:at])))
    return whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.LANCZOS)


def ask(config: Ask) -> None:
    """Explain, read, draw, write."""
    bundles = {"ViT": tiltscope.load("emoji64"), "ConvNeXt": tiltscope.load(config.convnext)}
    chosen = choose(bundles, config.word)
    results: dict[str, Explanation] = {}
    folders: dict[str, Path] = {}
    for name, bundle in bundles.items():
        asked: dict[str, Any] = {"num": config.num, "steps": config.steps, "seed": config.seed, "calibration": "pool"}
        results[name] = tiltscope.explain(bundle, chosen[name].feature, target_z=config.target_z, **asked)
        folders[name] = config.out / f"explained-{name}"
        results[name].save(folders[name])
    config.figure.parent.mkdir(parents=True, exist_ok=True)
    sheet(folders).save(config.figure, optimize=True)

    hooks = {name: bundle.sae_hooks[0] for name, bundle in bundles.items()}
    trunks = {f"{name}, {hooks[name]}": bundle.trunk(hooks[name]) for name, bundle in bundles.items()}
    place = config.out / "untrained"
    trunks["the ConvNeXt as it began"] = untrained(hooks["ConvNeXt"], place)
    lines = [f"![The ViT's four answers above the ConvNeXt's]({config.figure.relative_to(PAGE.parent).as_posix()})", ""]
    lines += [
        "| | feature | name | fires on | selectivity | lambda | mean reached / asked |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, info in chosen.items():
        result = results[name]
        reached = result.metrics["tilt"]["activation_mean"] or 0.0
        lines.append(
            f"| {name} | `{info.feature}` | {info.name} | {info.density:.1%} | {info.selectivity:.1f} | {result.lam:.3g} | "
            f"{reached:.3g} / {result.target:.3g} |"
        )
    lines += [
        "",
        *readings(results, bundles, chosen),
        "",
        "| k-NN over categories, mean token | held-out pictures right |",
        "|---|---|",
    ]
    lines += [f"| {name} | {share:.1%} |" for name, share in judge(trunks, config.data).items()]
    lines += ["", trained(config.convnext.parent)]
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text("\n".join([before + BEGIN, *lines, END + after]))
    print("\n".join(lines))


def trained(folder: Path) -> str:
    """How much training is behind it, from its logs."""
    log = [json.loads(line) for line in (folder / "trunk/log.jsonl").read_text().splitlines()]
    done = next(row for row in reversed(log) if "done" in row)
    sae = json.loads((folder / "sae/config.json").read_text())
    minutes = done["seconds"] / 60
    return (
        f"The ConvNeXt here: {done['step']} steps of {done['batch']} pictures, in {minutes:.0f} minutes of a busy machine; its "
        f"autoencoder of {sae['num_latents']} latents leaves {sae['fvu_heldout']:.2f} of held-out variance unexplained, and "
        f"{sae['dead_share']:.0%} of it never fires."
    )


Command = Annotated[Pictures, tyro.conf.subcommand("pictures")] | Annotated[Ask, tyro.conf.subcommand("ask")]


def main(command: Pictures | Ask) -> None:
    if isinstance(command, Pictures):
        ArrayPictures(dict(np.load(command.data))).write_folder(command.out)
    else:
        ask(command)


if __name__ == "__main__":
    main(tyro.cli(Command, description=__doc__))
