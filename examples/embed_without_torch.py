"""Guided sampling inside a program that has no torch: numpy and onnxruntime alone, tiltscope's own table and generator.

    python embed_without_torch.py pack blocks.5:sae:1169 packed/ --lam 1.5  # where torch is: graphs, readout, the expected answer
    pip install --no-deps tiltscope; pip install numpy onnxruntime         # and where it is not:
    python embed_without_torch.py run packed/

`run` draws the same picture from the same seed and index, and says how far its activation is from the packed one.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np


def pack(feature: str, folder: Path, *, lam: float, steps: int, bundle: str) -> None:
    """Everything `run` needs, into `folder`."""
    import torch

    import tiltscope
    from tiltscope.engine.runtime.exported import READOUT, readout_inputs
    from tiltscope.engine.runtime.runners import build_step

    loaded = tiltscope.load(bundle)
    chosen = loaded.feature(feature)
    artefact = build_step("onnx", loaded.prior, chosen, torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    for path in artefact.folder.iterdir():
        shutil.copy(path, folder)
    np.savez(
        folder / "readout.npz",
        **dict(zip(READOUT, (t.numpy() for t in readout_inputs(chosen.readout, 1)), strict=True)),
    )
    expected = tiltscope.sample(loaded.prior, chosen, num=1, lam=lam, steps=steps, solver="ddpm", seed=0, batch_size=1)
    facts = {"lam": lam, "steps": steps, "seed": 0, "index": 0, "activation": float(expected.activation[0])}
    (folder / "expected.json").write_text(json.dumps(facts))
    np.save(folder / "expected.npy", expected.x0[0].numpy())


def run(folder: Path) -> tuple[np.ndarray, float]:
    """The picture in [-1, 1] and its activation."""
    import onnxruntime

    from tiltscope.engine.runtime.schedule import Schedule
    from tiltscope.engine.sampler.noise import STREAM_START, STREAM_STEP, normal
    from tiltscope.engine.sampler.plan import GraphKind, make_plan

    schedule, asked = Schedule.read(folder), json.loads((folder / "expected.json").read_text())
    readout = dict(np.load(folder / "readout.npz"))
    graph = {
        name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        for name in ("guided", "unguided", "measure")
    }
    plan = make_plan("ddpm", steps=asked["steps"], grid="native", levels=np.array(schedule.levels))

    def noise(stream: int, row: int) -> np.ndarray:
        drawn = normal(asked["seed"], asked["index"], row, stream, shape=schedule.shape, dtype=np.float32)
        return drawn[None]

    x, history = noise(STREAM_START, 0), np.zeros((1, *schedule.shape), np.float32)
    for row in range(plan.num_rows):
        a, b, c, d, e, p, q, f, r = (np.float32(each) for each in plan.table[row, 2:])
        level = schedule.conditioning(plan.table[row : row + 1, 0])
        names = ("from_x", "from_output", "time_embedding", "input_scale")
        inputs = {"x": x} | dict(zip(names, (each.astype(np.float32) for each in level), strict=True))
        push = np.float32(0)
        if plan.kind[row] == GraphKind.GUIDED:
            x0_hat, _, _, grad = graph["guided"].run(None, inputs | readout)
            push = np.float32(asked["lam"]) * grad  # a linear log-tilt: its slope is 1
        else:
            (x0_hat,) = graph["unguided"].run(None, inputs)
        z = noise(STREAM_STEP, row)
        x, history = (
            a * x + b * x0_hat + e * push + c * z + d * history,
            p * x + q * x0_hat + f * push + r * history,
        )
    activation, _ = graph["measure"].run(None, {"x": x} | readout)
    return x[0], float(activation[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("feature")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--lam", type=float, default=1.5)
    packing.add_argument("--steps", type=int, default=50)
    packing.add_argument("--bundle", default="emoji64")
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    asked = parser.parse_args()
    if asked.command == "pack":
        pack(asked.feature, asked.folder, lam=asked.lam, steps=asked.steps, bundle=asked.bundle)
        return
    x0, activation = run(asked.folder)
    expected = json.loads((asked.folder / "expected.json").read_text())["activation"]
    away = float(np.abs(x0 - np.load(asked.folder / "expected.npy")).max())
    print(f"activation {activation:.6f}, packed {expected:.6f}; the picture is within {away:.1e}")


if __name__ == "__main__":
    main()
