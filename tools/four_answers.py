"""The README's picture, from the output folder of `tiltscope explain`: four answers side by side, with their numbers.

python tools/four_answers.py OUT docs/four_answers.png
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image, ImageDraw, ImageFont

TITLES = {
    "tilt": "KL-minimal tilt",
    "topk": "Top-K retrieval",
    "hard": "Hard truncation",
    "actmax": "Activation maximisation",
}
COLUMNS, ROWS, SIDE_PX, GAP_PX, MARGIN_PX, HEAD_PX = 2, 4, 128, 8, 32, 112
INK, QUIET, PAPER = (28, 28, 30), (110, 110, 115), (253, 253, 251)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where the explanation is, and where the picture goes."""

    out: Annotated[Path, tyro.conf.Positional]
    picture: Annotated[Path, tyro.conf.Positional] = Path("docs/four_answers.png")


def figure(manifest: dict[str, Any], folder: Path) -> Image.Image:
    """One block a method: title, mean activation and naturalness, then its first eight pictures, doubled."""
    block = COLUMNS * SIDE_PX + (COLUMNS - 1) * GAP_PX
    size = (
        2 * MARGIN_PX + len(TITLES) * block + (len(TITLES) - 1) * MARGIN_PX,
        2 * MARGIN_PX + HEAD_PX + ROWS * (SIDE_PX + GAP_PX),
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(20), ImageFont.load_default(15)
    name = manifest["feature_name"] or "no name"
    draw.text((MARGIN_PX, MARGIN_PX - 8), f"{manifest['feature']}  ({name})", INK, large)
    draw.text((MARGIN_PX, MARGIN_PX + 20), f"target: mean activation {manifest['target']:.2f}", QUIET, small)
    for at, (answer, title) in enumerate(TITLES.items()):
        left, top = MARGIN_PX + at * (block + MARGIN_PX), MARGIN_PX + 54
        metrics = manifest["metrics"][answer]
        draw.text((left, top), title, INK, large)
        draw.text((left, top + 26), _numbers(metrics), QUIET, small)
        pictures = sorted((folder / "answers" / answer / "samples").glob("*.png"))[: COLUMNS * ROWS]
        for place, path in enumerate(pictures):
            row, column = divmod(place, COLUMNS)
            with Image.open(path) as opened:
                picture = opened.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST)
            sheet.paste(
                picture,
                (left + column * (SIDE_PX + GAP_PX), MARGIN_PX + HEAD_PX + row * (SIDE_PX + GAP_PX)),
            )
    return sheet


def _numbers(metrics: dict[str, float | None]) -> str:
    shown = [("activation", metrics["activation_mean"]), ("naturalness", metrics["naturalness"])]
    return ", ".join(f"{name} {value:.2f}" for name, value in shown if value is not None)


def main(config: Config) -> None:
    manifest = json.loads((config.out / "manifest.json").read_text())
    config.picture.parent.mkdir(parents=True, exist_ok=True)
    figure(manifest, config.out).save(config.picture, optimize=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
