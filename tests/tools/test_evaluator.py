"""Folded batch normalisation changes nothing, and the embedded weights embed as the published package did."""

import torch
import torch.nn.functional as F

from tiltscope.engine.report.evaluator import EMBEDDING_SIZE, STAGES, Evaluator, SameConv, fold_batch_norm

EPS = 1e-3


def published_layout(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of efficientnet_lite_pytorch."""
    state: dict[str, torch.Tensor] = {}

    def add(conv: str, norm: str, outputs: int, inputs: int, kernel: int) -> None:
        state[f"{conv}.weight"] = (
            torch.randn(outputs, inputs, kernel, kernel, generator=generator) / (inputs * kernel**2) ** 0.5
        )
        state[f"{norm}.weight"] = torch.rand(outputs, generator=generator) + 0.5
        state[f"{norm}.bias"] = torch.randn(outputs, generator=generator)
        state[f"{norm}.running_mean"] = torch.randn(outputs, generator=generator)
        state[f"{norm}.running_var"] = torch.rand(outputs, generator=generator) + 0.5

    add("_conv_stem", "_bn0", 32, 3, 3)
    channels, index = 32, 0
    for repeats, kernel, _, expansion, outputs in STAGES:
        for _ in range(repeats):
            name, width = f"_blocks.{index}", channels * expansion
            if expansion != 1:
                add(f"{name}._expand_conv", f"{name}._bn0", width, channels, 1)
            add(f"{name}._depthwise_conv", f"{name}._bn1", width, 1, kernel)
            add(f"{name}._project_conv", f"{name}._bn2", outputs, width, 1)
            channels, index = outputs, index + 1
    add("_conv_head", "_bn1", EMBEDDING_SIZE, channels, 1)
    return state


def slow_features(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The published forward, written out: convolution with SAME padding, batch norm, ReLU6, skips."""

    def conv_norm(x: torch.Tensor, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
        w = state[f"{conv}.weight"]
        kernel, groups = w.shape[-1], x.shape[1] // w.shape[1]
        pads = [max((-(-s // stride) - 1) * stride + kernel - s, 0) for s in (x.shape[-1], x.shape[-2])]
        x = F.pad(x, (pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2))
        x = F.conv2d(x, w, stride=stride, groups=groups)
        stats = (state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *stats, eps=EPS)

    x, index = F.relu6(conv_norm(x, "_conv_stem", "_bn0", 2)), 0
    for repeats, _, stride, expansion, _ in STAGES:
        for i in range(repeats):
            name, y = f"_blocks.{index}", x
            if expansion != 1:
                y = F.relu6(conv_norm(y, f"{name}._expand_conv", f"{name}._bn0"))
            y = F.relu6(conv_norm(y, f"{name}._depthwise_conv", f"{name}._bn1", stride if i == 0 else 1))
            y = conv_norm(y, f"{name}._project_conv", f"{name}._bn2")
            x, index = (x + y if y.shape == x.shape else y), index + 1
    return F.relu6(conv_norm(x, "_conv_head", "_bn1"))


def test_folded_weights_compute_the_published_forward() -> None:
    state = published_layout(torch.Generator().manual_seed(0))
    evaluator = Evaluator().eval()
    evaluator.load_state_dict(fold_batch_norm(state))
    x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = slow_features(state, x), evaluator.features(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_embedding_ignores_what_no_viewer_sees() -> None:
    evaluator = Evaluator().eval()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 4 - 2
    assert evaluator.embed(x).shape == (1, EMBEDDING_SIZE)
    assert torch.equal(evaluator.embed(x), evaluator.embed(x.clamp(-1, 1)))


def test_same_padding_puts_the_odd_pixel_right_and_below() -> None:
    conv = SameConv(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    out = conv(torch.ones(1, 1, 4, 4))[0, 0]
    assert out.tolist() == [[9.0, 6.0], [6.0, 4.0]]
