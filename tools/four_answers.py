"""The README's picture: the four answers of one `tiltscope explain` folder, a row each.

tiltscope explain FEATURE --out OUT && python tools/four_answers.py OUT docs/four_answers.png
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tiltscope.engine.report.words import ANSWERS, number

SHOWN = 8
SIDE_PX, GAP_PX, LABEL_PX = 96, 6, 190
INK, QUIET, PAPER = (30, 30, 34), (105, 105, 115), (255, 255, 255)


def main(out: Path, target: Path) -> None:
    """Write `target`; the same folder gives the same bytes."""
    manifest = json.loads((out / "manifest.json").read_text())
    title, small = ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    size = (LABEL_PX + SHOWN * (SIDE_PX + GAP_PX) + GAP_PX, len(ANSWERS) * (SIDE_PX + GAP_PX) + GAP_PX)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (answer, words) in enumerate(ANSWERS.items()):
        top = GAP_PX + row * (SIDE_PX + GAP_PX)
        metrics = manifest["metrics"][answer]
        lines = [
            f"activation {number(metrics['activation_mean'])}",
            f"naturalness {number(metrics['naturalness'])}",
        ]
        draw.text((GAP_PX, top + 18), words.title, fill=INK, font=title)
        for at, line in enumerate(lines):
            line = line.replace("−", "-")  # the font has no true minus
            draw.text((GAP_PX, top + 42 + 18 * at), line, fill=QUIET, font=small)
        described = (out / "answers" / answer / "samples" / "metadata.jsonl").read_text().splitlines()
        for column, line in enumerate(described[:SHOWN]):
            picture = Image.open(out / "answers" / answer / "samples" / json.loads(line)["file_name"]).convert("RGB")
            place = (LABEL_PX + column * (SIDE_PX + GAP_PX), top)
            sheet.paste(picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS), place)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
