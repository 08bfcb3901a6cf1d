"""Predicted, not measured: what one guided step takes on an H100, from bytes, floating-point operations and launches.

The networks run on the meta device, published sizes and all, so nothing is computed. Of each way of drawing:

    arithmetic   FLOPs of products and convolutions, forward and again for the input gradient, over the dense peak
    roofline     every operator the longer of its arithmetic and its traffic, one after the other, as torch launches them
    launches     operators that touch memory: at LAUNCH_US each what a small step waits for, unless a CUDA graph replays it

No time can be under the first; the second is what eager torch cannot beat, and an engine that fuses may. bfloat16 networks,
float32 state, the update as its one fused kernel. Appends a line to results/roofline.jsonl; tools/benchmark_tables.py writes
docs/benchmarks.md. What will measure it, on the card: `make gpu` (emoji64), `tiltscope bench row --bundle DIR` (the others).

    python benchmarks/roofline.py
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiltscope
from tiltscope.engine.bench.machine import append_result
from tiltscope.engine.bench.traffic import Traffic
from tiltscope.engine.feature.convnext import TruncatedConvNeXt
from tiltscope.engine.feature.trunk import TruncatedViT
from tiltscope.engine.prior.decoder import KINDS, Decoder
from tiltscope.engine.prior.dit import DiT
from tiltscope.engine.runtime.step import TorchStep

sys.path.append(str(Path(__file__).parent.parent / "tools"))

from published_sizes import ADM_256, CONVNEXT_L, KL_DECODER, vit_config

RESULTS = Path(__file__).parent / "results" / "roofline.jsonl"
META = torch.device("meta")
BATCHES = (1, 8, 32)
# NVIDIA H100 SXM5, vendor's data sheet: dense bfloat16 and HBM3; what a launch costs the host is our estimate.
H100 = {"flops_a_second": 989e12, "bytes_a_second": 3.35e12}
LAUNCH_US = 5.0
# Of the fused update (kernels/guided_step.py): x, H, x', H' in float32, D and grad_a in bfloat16.
UPDATE_BYTES = 20
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT_L = vit_config("L")
Guided = Callable[[int], None]


@dataclass(frozen=True)
class System:
    """guided(batch): one guided step on the meta device. shape: of a state."""

    name: str
    shape: tuple[int, ...]
    guided: Guided


def frozen(network: nn.Module) -> Any:
    return network.to(META, torch.bfloat16).requires_grad_(False)


def differentiated(shape: tuple[int, ...], features: Callable[[Tensor], Tensor]) -> Guided:
    """d (sum of what `features` makes of x) / dx, through everything, as a guided step takes it."""

    def guided(batch: int) -> None:
        x = torch.empty(batch, *shape, dtype=torch.bfloat16, device=META, requires_grad=True)
        torch.autograd.grad(features(x).sum(), x)

    return guided


def emoji64() -> System:
    bundle = tiltscope.load("emoji64")
    feature = bundle.feature("blocks.5:sae:1169").to(torch.bfloat16, META)
    step, shape = TorchStep(bundle.prior.to(torch.bfloat16, META), feature), bundle.prior.shape

    def guided(batch: int) -> None:
        sigma = torch.empty(batch, dtype=torch.float64, device=META)
        x = torch.empty(batch, *shape, dtype=torch.bfloat16, device=META)
        readout = feature.readout
        step.guided(x, sigma, sigma, None if readout is None else readout.expand(batch))

    return System("emoji64: U-Net, DINOv3 ViT", shape, guided)


def adm_convnext() -> System:
    """One latent of the convolutional autoencoder, 7x7 over 768 channels, read from stages.2.20."""
    from diffusers import UNet2DModel

    with META:
        network = frozen(UNet2DModel(**ADM_256))
        trunk = frozen(TruncatedConvNeXt(CONVNEXT_L, "stages.2.20", mean=MEAN, std=STD))
        latent = torch.empty(1, 768, 7, 7, dtype=torch.bfloat16)

    def features(x: Tensor) -> Tensor:
        time = torch.zeros(len(x), device=META)
        tokens = trunk(network(x, time).sample[:, :3])
        return nn.functional.conv2d(tokens.transpose(1, 2).unflatten(2, trunk.grid), latent, padding=3)

    return System("energydps: ADM-256, ConvNeXt-L", (3, 256, 256), differentiated((3, 256, 256), features))


def dit_vit() -> System:
    """One row of a token-wise autoencoder at the trunk's last block, read through the decoder."""
    from diffusers import DiTTransformer2DModel

    with META:
        network = frozen(DiT(DiTTransformer2DModel(out_channels=8)))
        whole, factor = KINDS["AutoencoderKL"](KL_DECODER)
        decoder = Decoder(
            whole.decoder, whole.post_quant_conv, shape=(4, 32, 32), factor=factor, scale=0.18215, shift=0.0
        )
        decoder = frozen(decoder)
        trunk = frozen(TruncatedViT(VIT_L, "norm", mean=MEAN, std=STD))
        row = torch.empty(VIT_L.hidden_size, dtype=torch.bfloat16)

    def features(x: Tensor) -> Tensor:
        time = torch.zeros(len(x), device=META, dtype=torch.float64)
        return trunk(decoder(network(x, time)[0][:, :4])) @ row

    return System("DiT-XL/2 and decoder, ViT-L", (4, 32, 32), differentiated((4, 32, 32), features))


def predicted(system: System, batch: int) -> dict[str, Any]:
    with Traffic() as traffic:
        system.guided(batch)
    update = UPDATE_BYTES * batch * torch.Size(system.shape).numel()
    launches = len(traffic.operations) + 1
    return {
        "system": system.name,
        "batch": batch,
        "gflop": traffic.flops / 1e9,
        "mib": (traffic.bytes + update) / 2**20,
        "launches": launches,
        "arithmetic_ms": 1e3 * traffic.flops / H100["flops_a_second"],
        "roofline_ms": 1e3 * (traffic.seconds(**H100) + update / H100["bytes_a_second"]),
        "launch_ms": 1e-3 * LAUNCH_US * launches,
    }


def main() -> None:
    rows = [predicted(system, batch) for system in (emoji64(), adm_convnext(), dit_vit()) for batch in BATCHES]
    append_result(RESULTS, "roofline", card="NVIDIA H100 SXM5", **H100, launch_us=LAUNCH_US, rows=rows)
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    main()
