"""Large pools: the embedded bundle's own numbers come back from a folder of its pictures, and memory stays flat."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest

import tiltscope
from tiltscope.engine.bundle import embedded_bundles

pytestmark = pytest.mark.slow
NUM = 100_000
# A multiple of three (colours), and not of a shard.
NUM_DRAWN = 900
LIMIT_MIB = 2048

# Stub networks: a random projection in the place of trunk and autoencoder. Run by itself: its peak memory is its own.
SCRIPT = """
import json, resource, sys
from pathlib import Path
import torch
from tiltscope.engine.bundling.pictures import FolderPictures
from tiltscope.engine.bundling.pool import write_features, write_pool
from tiltscope.engine.bundling.shards import Shards, read_shards

folder, out, num_latents = Path(sys.argv[1]), Path(sys.argv[2]), 1024
weight = torch.randn(num_latents, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)) / 14
pictures = FolderPictures(folder, size=(8, 8))
shards = Shards.plan(out / "work", num=pictures.num, num_latents=num_latents)
read_shards(shards, pictures, lambda x0: ((x0.flatten(1) @ weight.T - 0.5).clamp(min=0), x0.flatten(1)[:, :64]))
facts = write_pool(out / "pool", shards, hook="norm", num_latents=num_latents)
write_features(out / "features.parquet", facts.features)
used = resource.getrusage(resource.RUSAGE_SELF)
peak, cpu = used.ru_maxrss / 1024, used.ru_utime + used.ru_stime
told = {"peak_mib": peak, "cpu_seconds": cpu, "num": facts.num, "per_file": facts.latents_per_file}
print(json.dumps(told | {"named": facts.num_named}))
"""


def environment():
    return os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def png(pixels):
    """As little as a PNG can be."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    h, w, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def test_a_hundred_thousand_pictures_stay_under_two_gigabytes(tmp_path):
    rng = np.random.default_rng(0)
    folder, drawn = tmp_path / "pictures", tmp_path / "drawn"
    drawn.mkdir()
    colours = ("red", "green", "blue")
    for at in range(NUM_DRAWN):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        pixels[:, :, at % 3] |= 128
        (drawn / str(at)).write_bytes(png(pixels))
    for part in range(100):
        (folder / f"{part:02d}").mkdir(parents=True)
    # Every one is a file with a name of its own, and is read, decoded and kept; only its pixels are shared.
    for at in range(NUM):
        os.link(drawn / str(at % NUM_DRAWN), folder / f"{at % 100:02d}" / f"{colours[at % 3]}_thing_{at}.png")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    print(told)
    assert told["num"] == NUM
    assert told["peak_mib"] < LIMIT_MIB
    assert told["per_file"] < 1024  # the activations did not fit into one block
    stored = pq.read_table(tmp_path / "pool/activations-00001.parquet")
    assert stored.num_rows == NUM
    names = pq.read_table(tmp_path / "features.parquet").column("name").to_pylist()
    # A projection fires on the channel it weighs most: the colours are the only words there are to be found.
    assert set(names) <= {None, *colours}
    assert told["named"] > 0


@pytest.fixture(scope="module")
def emoji_folder(root, tmp_path_factory):
    """The training data's pool as PNG files and metadata.jsonl: `make build/train/emoji64.npz` fetches it."""
    data = root / "build/train/emoji64.npz"
    if not data.is_file():
        pytest.skip("needs build/train/emoji64.npz: make build/train/emoji64.npz")
    from pool_files import ArrayPictures

    folder = tmp_path_factory.mktemp("emoji")
    ArrayPictures(dict(np.load(data))).write_folder(folder)
    return folder


def test_the_emoji_pictures_give_the_embedded_pools_numbers(emoji_folder, tmp_path):
    """And a run that is killed (no handler, no clean-up) half-way goes on to the same bytes."""
    embedded = embedded_bundles()["emoji64"]
    parts = [f"--{name}={embedded / name}" for name in ("prior", "trunk", "sae")]
    outs = [tmp_path / name for name in ("straight", "killed")]

    def start(out):
        words = ["bundle", *parts, f"--pool={emoji_folder}", f"--out={out}", "--pixel-unshuffle=4", "--name=mine"]
        quiet = subprocess.DEVNULL
        return subprocess.Popen([sys.executable, "-m", "tiltscope", *words], env=environment(), stdout=quiet)

    killed = start(outs[1])
    while not (outs[1] / ".making/shard-000000.safetensors").is_file():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (outs[1] / "bundle.json").exists()
    assert [start(out).wait() for out in outs] == [0, 0]
    files = [{p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()} for out in outs]
    assert files[0] == files[1]

    mine, theirs = tiltscope.load(outs[0]), tiltscope.load("emoji64")
    assert (mine.pool.num, int(mine.pool.heldout.sum())) == (theirs.pool.num, int(theirs.pool.heldout.sum()))
    assert (mine.pool.names, mine.pool.keywords) == (theirs.pool.names, theirs.pool.keywords)
    columns = [pq.read_table(each.path / "pool/activations.parquet") for each in (mine, theirs)]
    assert columns[0].column_names == columns[1].column_names
    # The networks ran on another processor: float32's rounding, relative to activations of up to 40.
    for name in columns[0].column_names:
        np.testing.assert_allclose(*(each.column(name).to_numpy() for each in columns), rtol=1e-4, atol=1e-4)
    for each in zip(mine.pool.statistics("blocks.5"), theirs.pool.statistics("blocks.5"), strict=True):
        np.testing.assert_allclose(*each, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine.pool.embeddings(), theirs.pool.embeddings(), atol=1e-3)
    for a, b in zip(mine.features(), theirs.features(), strict=True):
        assert (a.feature, a.name, a.name_source, a.words, a.alive) == (
            b.feature, b.name, b.name_source, b.words, b.alive,
        )  # fmt: skip
        assert (a.density, a.max, a.selectivity) == pytest.approx((b.density, b.max, b.selectivity), rel=1e-4, abs=1e-4)
