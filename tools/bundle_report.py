"""Measure a built bundle and write what was found into it: bundle.json's `reference`, the card, the card's pictures.

    python tools/bundle_report.py                       # every figure of the embedded bundle anew: an hour and more on two cores

What a user would get is what is measured: samples come from the engine with its default plan. Every figure stands beside what a
real picture, random weights or a grey blur would show. Parts (--parts) can be measured alone; the others keep their figures.
`--parts` with none writes the card anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import claim
import fidelity
import numpy as np
import posterior_mean
import pyarrow.parquet as pq
import torch
from measure import BATCH, NUM_SHOWN, embed_pool, measure_prior, measure_recovered, measure_trunk
from PIL import Image
from pool_files import HOOK
from scipy.stats import ks_2samp
from sheets import labelled, to_pictures
from training import prepare_machine

import tiltscope
from tiltscope.engine.bundle import Bundle
from tiltscope.engine.calibration import calibrate_on_sampler, calibration_key
from tiltscope.engine.config import ExplainConfig
from tiltscope.engine.errors import CalibrationError
from tiltscope.engine.explain import inquire
from tiltscope.engine.files import describe_files
from tiltscope.engine.tilt.calibrate import default_target, estimates

HERE = Path(__file__).parent
Part = Literal["trunk", "prior", "posterior", "features", "claim", "calibrations"]
PARTS: tuple[Part, ...] = ("trunk", "prior", "posterior", "features", "claim", "calibrations")
# Figures that the card shows, and the part that measures each.
CARD_NEEDS: dict[str, Part] = {
    "prior": "prior",
    "posterior": "posterior",
    "features": "features",
    "claim": "claim",
    "fidelity": "claim",
}
NUM_BEST = 50
NUM_POSTERIOR = 96


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which bundle to measure, what of it, and from how many samples."""

    bundle: Path = Path("engine/_root/bundles/emoji64")
    data: Path = Path("build/train/emoji64.npz")
    parts: tuple[Part, ...] = PARTS
    num: int = 1000
    """unguided samples"""
    num_claim: int = 16
    """samples a feature and answer"""
    calibrate: tuple[str, ...] = ("blocks.5:sae:1169",)
    """features whose calibration on the sampler the bundle brings, so that the demo need not draw for it"""
    runner: str = "torch"
    """of the samples and answers"""
    processes: int = 2
    """of one thread each, for samples and answers: two do more than one of two threads"""


def deal(config: Config, work: Callable[[Bundle, str, Any], Any], tasks: Sequence[Any]) -> Iterator[Any]:
    """work(bundle, runner, task) of every task in their order, by `config.processes` processes."""
    with ProcessPoolExecutor(config.processes, get_context("spawn"), prepare_machine, (1,)) as pool:
        yield from pool.map(partial(_with_bundle, work, config.bundle, config.runner), tasks)


def _with_bundle(work: Callable[[Bundle, str, Any], Any], folder: Path, runner: str, task: Any) -> Any:
    return work(_opened(folder), runner, task)


@cache
def _opened(folder: Path) -> Bundle:
    return tiltscope.load(str(folder))


def unguided(bundle: Bundle, runner: str, indices: Sequence[int]) -> torch.Tensor:
    """x0 of draws of the prior alone, of seed 0."""
    any_feature = next(f.feature for f in bundle.features() if f.alive)
    feature = bundle.feature(any_feature)
    more = {"lam": 0.0, "batch_size": BATCH, "runner": runner}
    return tiltscope.sample(bundle.prior, feature, num=len(indices), indices=list(indices), **more).x0


def draw_unguided(config: Config, num: int) -> torch.Tensor:
    """x0 of `num` draws: indices 0, 1, ..."""
    size = 4 * BATCH
    parts = [list(range(at, min(at + size, num))) for at in range(0, num, size)]
    return torch.cat(list(deal(config, unguided, parts)))


def histogram_figures(bundle: Bundle, x0: torch.Tensor) -> dict[str, Any]:
    """Are the pool and the sampler's prior one p? Over the live latents: Kolmogorov-Smirnov distance between the pool's
    activations and the samples', beside that between the pool's own two splits; and what the difference does to log Z and KL at
    the default target's lambda, in nats.
    """
    table = pq.read_table(bundle.path / "pool/activations.parquet")
    names = [f.feature for f in bundle.features() if f.alive and f.feature in table.column_names]
    latents = torch.cat([bundle.latents(part, HOOK) for part in x0.split(BATCH)]).double().numpy()
    heldout = bundle.pool.heldout
    distance, split_distance, log_z, kl = [], [], [], []
    for name in names:
        natural = table.column(name).to_numpy().astype(np.float64)
        drawn = latents[:, int(name.rsplit(":", 1)[1])]
        distance.append(ks_2samp(natural, drawn, method="asymp").statistic)
        split_distance.append(ks_2samp(natural[~heldout], natural[heldout], method="asymp").statistic)
        lam = default_target(natural).lam
        if drawn.std() > 0:
            pool, prior = estimates(natural, lam), estimates(drawn, lam)
            log_z.append(abs(pool.log_z - prior.log_z))
            kl.append(abs(pool.kl - prior.kl))
    return {
        "num_latents": len(names),
        "num_silent_in_samples": len(names) - len(log_z),
        "ks_median": float(np.median(distance)),
        "ks_p90": float(np.percentile(distance, 90)),
        "ks_splits_median": float(np.median(split_distance)),
        "ks_splits_p90": float(np.percentile(split_distance, 90)),
        "log_z_error_median": float(np.median(log_z)),
        "kl_error_median": float(np.median(kl)),
    }


def feature_figures(bundle: Bundle) -> tuple[dict[str, Any], list[dict[str, Any]], Image.Image]:
    """Counts; the most selective latents, named ones first; their eight strongest pictures."""
    infos = [f for f in bundle.features() if ":sae:" in f.feature]
    live = [f for f in infos if f.alive]
    best = sorted(live, key=lambda f: (f.name is None, -f.selectivity))[:NUM_BEST]
    counts = {"num_live": len(live), "num_named": sum(f.name is not None for f in live)}
    rows, pictures = [], []
    for info in best:
        strongest = np.argsort(-bundle.pool.activations(bundle.feature(info.feature)), kind="stable")[:8]
        pictures.append((f"{info.feature}\n{info.name or 'no name'}", to_pictures(bundle.pool.x0(strongest))))
        rows.append(
            {
                "feature": info.feature,
                "name": info.name,
                "density": info.density,
                "selectivity": info.selectivity,
                "strongest": [bundle.pool.names[at] for at in strongest[:3].tolist()],
            }
        )
    return counts, rows, labelled(pictures, label_px=150)


class Claimed(NamedTuple):
    """Of one feature: its row of the claim's table, its distances to the exact tilt, eight of its guided samples."""

    row: dict[str, Any]
    fidelity: dict[str, Any]
    shown: torch.Tensor


def claim_row(bundle: Bundle, runner: str, task: tuple[str, torch.Tensor]) -> Claimed:
    """task: the feature, and as many pictures of the prior alone as it is to have samples."""
    address, alone = task
    explanation = claim.explain_at_target(bundle, address, num=len(alone), runner=runner)
    return Claimed(
        claim.row_of(explanation),
        fidelity.row_of(bundle, explanation, alone),
        explanation.answers["tilt"].x0[:8],
    )


def claim_figures(bundle: Bundle, config: Config) -> tuple[dict[str, Any], Image.Image]:
    """The claim's table, the distances to the exact tilt, and eight guided samples of each feature (64 in all)."""
    figures: dict[str, Any] = {"claim": [], "fidelity": []}
    pictures = []
    alone = draw_unguided(config, config.num_claim)
    tasks = [(address, alone) for address in claim.chosen_features(bundle)]
    for row, distances, x0 in deal(config, claim_row, tasks):
        figures["claim"].append(row)
        figures["fidelity"].append(distances)
        pictures.append((f"{row['feature']}\n{row['name'] or 'no name'}", to_pictures(x0)))
        print(json.dumps(row | distances), flush=True)
    return figures, labelled(pictures[: NUM_SHOWN // 8], label_px=150)


def calibrations(bundle: Bundle, features: tuple[str, ...]) -> dict[str, Any]:
    """What `explain` finds on the sampler at its defaults, by key: engine/calibration.py looks here before it draws."""
    found: dict[str, Any] = {}
    for address in features:
        inquiry = inquire(bundle, address, ExplainConfig())
        try:
            ascent = calibrate_on_sampler(inquiry.run, inquiry.target).ascent
        except CalibrationError as error:
            print(f"{address} is not calibrated: {error}", flush=True)
            continue
        if ascent is not None:
            found[calibration_key(inquiry.run, inquiry.target)] = ascent.to_json()
    return found


def feature_table(best: list[dict[str, Any]]) -> str:
    lines = ["| feature | name | fires on | selectivity | strongest pictures |", "|---|---|---|---|---|"]
    lines += [
        f"| `{r['feature']}` | {r['name'] or '-'} | {r['density']:.1%} | {r['selectivity']:.1f} | {', '.join(r['strongest'])} |"
        for r in best
    ]
    return "\n".join(lines)


def write_card(path: Path, facts: dict[str, Any]) -> None:
    """README.md: the template's {names} are looked up in these flat records."""
    training, reference = facts["training"], facts["reference"]
    columns = ("loss", "mse_low", "mse_mid", "mse_high")
    curve = ["| step | minutes | loss | low | middle | high |", "|---|---|---|---|---|---|"]
    curve += [
        f"| {r['step']} | {r['seconds'] / 60:.0f} | " + " | ".join(f"{r[c]:.4f}" for c in columns) + " |"
        for r in training["prior"]["curve"]
    ]
    quality = reference["prior"]
    distances = zip(
        quality["distance_quantiles"], quality["sample_distances"], quality["heldout_distances"], strict=True
    )
    tries = json.loads((HERE / "prior_tries.json").read_text())
    path.write_text(
        (HERE / "bundle_card.md")
        .read_text()
        .format(
            description=facts["description"],
            note=f"**{facts['note']}**\n" if facts["note"] else "",
            prior=SimpleNamespace(**training["prior"]),
            trunk=SimpleNamespace(**training["trunk"]),
            quality=SimpleNamespace(**quality),
            knn=SimpleNamespace(**reference["knn_top1_heldout"]),
            sae=SimpleNamespace(**reference["sae"]),
            features=SimpleNamespace(**reference["features"]),
            histograms=SimpleNamespace(**reference["histograms"]),
            posterior=posterior_mean.table(reference["posterior"]),
            num_posterior=NUM_POSTERIOR,
            prior_runner=reference.get("prior_runner", "not recorded"),
            claim_runner=reference.get("claim_runner", "not recorded"),
            recovered=reference["cls_recovered_heldout"],
            parameters=reference["prior_parameters"] / 1e6,
            pool=SimpleNamespace(**facts["pool"]),
            data=SimpleNamespace(**facts["data"]),
            curve="\n".join(curve),
            distances="\n".join(f"| {q} % | {a:.3f} | {b:.3f} |" for q, a, b in distances),
            tries="\n".join(f"| {t['what']} | {t['hours']} | {t['kid']} | {t['seen']} |" for t in tries),
            claim=claim.table(reference["claim"]),
            fidelity=fidelity.table(reference["fidelity"]),
            nearer_unguided=fidelity.nearer(reference["fidelity"], "unguided"),
            nearer_actmax=fidelity.nearer(reference["fidelity"], "actmax"),
            num_more_natural=sum(r["more_natural"] for r in reference["claim"]),
            num_above=sum(r["above_p99"] for r in reference["claim"]),
            num_matched=sum(r["matched"] for r in reference["claim"]),
            num_claim=len(reference["claim"]),
            best=feature_table(reference["best_features"]),
            seen=(HERE / "samples_seen.md").read_text().strip(),
            notes="".join(
                f"\n{name}: {training[name]['note']}" for name in ("trunk", "sae", "prior") if training[name]["note"]
            ),
        )
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def measure(config: Config, bundle: Bundle, part: Part) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """The figures of one part, and their pictures by name."""
    figures: dict[str, Any] = {}
    pictures: dict[str, Image.Image] = {}
    folder = bundle.path
    if part == "trunk":
        figures["knn_top1_heldout"] = measure_trunk(
            config.data, folder / "trunk", embed_pool(config.data, folder / "evaluator")
        )
        figures["cls_recovered_heldout"] = measure_recovered(config.data, folder / "trunk", folder / "sae")
    if part == "prior":
        x0 = draw_unguided(config, config.num)
        figures["prior"], pictures = measure_prior(config.data, bundle.evaluator(), x0)
        figures["histograms"] = histogram_figures(bundle, x0)
    if part == "posterior":
        heldout = np.flatnonzero(bundle.pool.heldout)[:NUM_POSTERIOR].tolist()
        figures["posterior"] = posterior_mean.second_order(bundle.prior, bundle.pool.x0(heldout))
    if part == "features":
        figures["features"], figures["best_features"], pictures["features"] = feature_figures(bundle)
    if part == "claim":
        found, pictures["guided"] = claim_figures(bundle, config)
        figures |= found
    if part in ("prior", "claim"):
        figures[f"{part}_runner"] = config.runner
    return figures, pictures


def missing_parts(reference: dict[str, Any], asked: Sequence[Part]) -> list[Part]:
    """Parts that the card needs and that were neither measured before nor are asked for."""
    return sorted({part for figure, part in CARD_NEEDS.items() if figure not in reference and part not in asked})


def main(config: Config) -> None:
    prepare_machine(config.processes)
    bundle = tiltscope.load(str(config.bundle))
    facts = json.loads((config.bundle / "bundle.json").read_text())
    if missing := missing_parts(facts["reference"], config.parts):
        raise SystemExit(
            f"--parts: the card shows {', '.join(missing)} too, and this bundle has no such figures; add them"
        )
    for part in config.parts:
        # Kept as soon as it is there: the whole takes the better part of an hour.
        figures, pictures = measure(config, bundle, part)
        facts["reference"] |= figures
        write_json(config.bundle / "bundle.json", facts)
        for name, picture in pictures.items():
            picture.save(config.bundle / f"{name}.webp", lossless=True, quality=80, method=4)
    if "calibrations" in config.parts:
        found = calibrations(tiltscope.load(str(config.bundle)), config.calibrate)
        write_json(config.bundle / "pool/calibrations.json", found)
    write_card(config.bundle / "README.md", facts)
    facts["files"] = describe_files(config.bundle)
    write_json(config.bundle / "bundle.json", facts)
    print(json.dumps(facts["reference"] | {"best_features": "..."}, indent=2))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
