"""Build the wheel from a clean archive of HEAD, install it where the repository is not, and run it.

    python tools/wheel_check.py [--bundle NAME]

Shown: the wheel stays under 60 MB; diffusers and transformers load the installed bundle's folders by themselves; `tiltscope
explain` runs from the wheel alone. All in a temporary folder with an empty HOME. Exits non-zero at the first failure.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

LIMIT_BYTES = 60_000_000
ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import sys
from pathlib import Path
import tiltscope
bundle = tiltscope.load(sys.argv[1])
root = Path(sys.argv[2])
assert not [path for path in sys.path if Path(path).resolve() == root], "the repository is on sys.path"
assert root not in Path(tiltscope.__file__).resolve().parents, "tiltscope is imported from the repository"
from diffusers import UNet2DModel
from transformers import DINOv3ViTModel
unet = UNet2DModel.from_pretrained(bundle.path / "prior", local_files_only=True)
trunk = DINOv3ViTModel.from_pretrained(bundle.path / "trunk", local_files_only=True)
print(f"UNet2DModel {unet.num_parameters():,} parameters, DINOv3ViTModel {trunk.num_parameters():,}")
print(bundle.features()[0].feature)
"""


def step(what: str, command: list[str], *, cwd: Path, env: dict[str, str]) -> str:
    """Run one command; its output is shown where it fails. Returns stdout."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    print(
        f"{what}: {'ok' if done.returncode == 0 else f'exit {done.returncode}'}, {time.perf_counter() - started:.0f} s",
        flush=True,
    )
    if done.returncode != 0:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise SystemExit(1)
    return done.stdout


def main(bundle: str) -> None:
    with tempfile.TemporaryDirectory(prefix="wheel-check-") as text:
        place = Path(text)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        env |= {"HOME": str(place / "home"), "PYTHONSAFEPATH": "1"}
        source, away, venv = place / "source", place / "away", place / "venv"
        for folder in (place / "home", source, away):
            folder.mkdir()
        archive = place / "head.tar"
        step("archive of HEAD", ["git", "archive", "--output", str(archive), "HEAD"], cwd=ROOT, env=env)
        with tarfile.open(archive) as tar:
            tar.extractall(source, filter="data")
        step(
            "wheel",
            [sys.executable, "-m", "build", "--wheel", "--outdir", str(place / "dist"), "."],
            cwd=source,
            env=env,
        )
        wheel = next((place / "dist").glob("*.whl"))
        size = wheel.stat().st_size
        print(f"{wheel.name}: {size / 1e6:.1f} MB of {LIMIT_BYTES / 1e6:.0f}")
        if size >= LIMIT_BYTES:
            raise SystemExit(f"the wheel is too large: {size:,} bytes")
        step("clean environment", [sys.executable, "-m", "venv", str(venv)], cwd=away, env=env)
        python = str(venv / "bin" / "python")
        constraints = str(source / "constraints" / "cpu.txt")
        step("install", [python, "-m", "pip", "install", "--quiet", "-c", constraints, str(wheel)], cwd=away, env=env)
        found = step("other libraries load its folders", [python, "-c", SMOKE, bundle, str(ROOT)], cwd=away, env=env)
        print(found.strip())
        feature = found.split()[-1]
        program = str(venv / "bin" / "tiltscope")
        command = [program, "explain", feature, "--bundle", bundle, "--num", "2", "--steps", "10", "--out", "out"]
        print(step("tiltscope explain", command, cwd=away, env=env))
        step("tiltscope doctor", [program, "doctor", "--bundle", bundle], cwd=away, env=env)
        if not (away / "out" / "index.html").is_file():
            raise SystemExit("tiltscope explain wrote no page")


if __name__ == "__main__":
    main(sys.argv[2] if sys.argv[1:2] == ["--bundle"] else "emoji64")
