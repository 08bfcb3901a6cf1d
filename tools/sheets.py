"""Pictures of pictures, for a person to look at: sheets in rows, with words beside them. Knows no model and no bundle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP_PX = 4
PAPER, INK = (255, 255, 255), (28, 28, 30)


def to_pictures(x0: Tensor) -> list[Image.Image]:
    """[n, 3, h, w] in [-1, 1] -> n pictures, clamped as a viewer clamps."""
    pixels = ((x0.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(one)) for one in pixels]


def sheet(pictures: Sequence[Image.Image], *, columns: int, scale: int = 1) -> Image.Image:
    """All pictures (of one size) row by row; each pixel becomes scale x scale pixels, nothing is smoothed."""
    return labelled([("", pictures[at : at + columns]) for at in range(0, len(pictures), columns)], scale=scale)


def labelled(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], *, scale: int = 1, label_px: int | None = None
) -> Image.Image:
    """One row of pictures a label, which stands at its left; label_px: room for it (default: none where all are empty)."""
    if label_px is None:
        label_px = 240 if any(label for label, _ in rows) else 0
    width, height = (side * scale for side in rows[0][1][0].size)
    columns = max(len(pictures) for _, pictures in rows)
    canvas = Image.new(
        "RGB",
        (label_px + GAP_PX + columns * (width + GAP_PX), GAP_PX + len(rows) * (height + GAP_PX)),
        PAPER,
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for at, (label, pictures) in enumerate(rows):
        top = GAP_PX + at * (height + GAP_PX)
        draw.multiline_text((GAP_PX, top + 2), label, INK, font)
        for column, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (label_px + GAP_PX + column * (width + GAP_PX), top))
    return canvas
