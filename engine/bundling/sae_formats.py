"""Autoencoders of other libraries in one normal form: their tensors and settings in, encoder rows and thresholds out.

Each function is one library's forward, written as `normal_form`'s arguments. What a latent is, is what that library's own encode
gives; tests/bundling/test_sae_formats.py holds each against a transcription of it. Knows tensors; must not know files.

    SAELens        pre = (s x - b_dec) W_enc + b_enc      s = 1, or sqrt(d)/|x|;   topk: times |W_dec row| where it says so
    saev           pre = x W_enc + b_enc                  (older releases: (x - b_dec) W_enc + b_enc, told by `centre`)
    overcomplete   pre = BatchNorm(W x + b)               thresholds exp(t) for its JumpSAE
    probe          pre = W x + b                          no threshold
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.sae import SparseAutoencoder, normal_form

_BATCH_NORM_EPS = 1e-5
_RESIDUAL = re.compile(r"blocks\.([0-9]+)\.hook_resid_(pre|post)")


class Read(NamedTuple):
    """An autoencoder, its kind, and the hook its settings name (None: they do not)."""

    sae: SparseAutoencoder
    kind: str
    hook: str | None


def _need(tensors: Mapping[str, Tensor], library: str, *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise BundleError(
            f"this is no {library} autoencoder: it holds no tensor {missing[0]!r}, but {', '.join(sorted(tensors)[:4])}"
        )
    return [tensors[name].float() for name in names]


def from_saelens(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Read:
    """cfg.json and sae_weights.safetensors of SAELens: standard, topk, jumprelu (BatchTopK and Matryoshka are saved as it too).

    Raises BundleError for an architecture or normalisation that one row of the encoder cannot express.
    """
    weight, bias, decoder, centre = _need(tensors, "SAELens", "W_enc", "b_enc", "W_dec", "b_dec")
    architecture = config.get("architecture", "standard")
    zero = torch.zeros_like(bias)
    if architecture == "jumprelu":
        if "log_threshold" in tensors:
            threshold = tensors["log_threshold"].float().exp()
        else:
            # Below 0 its gate is that of a ReLU.
            threshold = _need(tensors, "SAELens jumprelu", "threshold")[0].clamp(min=0)
    elif architecture in ("standard", "topk"):
        threshold = zero
    else:
        raise BundleError(f"SAELens architecture {architecture!r} is not known; allowed: standard, jumprelu, topk")
    normalised = config.get("normalize_activations", "none")
    if normalised not in ("none", "constant_norm_rescale"):
        raise BundleError(
            f"SAELens normalize_activations {normalised!r} is not known; allowed: none, constant_norm_rescale (save it again "
            "with its factor folded in)"
        )
    if config.get("reshape_activations", "none") != "none":
        raise BundleError(
            "SAELens reshape_activations other than none are of attention heads, which trunks here do not hook"
        )
    folds = architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm"))
    sae = normal_form(
        weight.T.contiguous(),
        bias,
        threshold,
        centre=centre if config.get("apply_b_dec_to_input", True) else None,
        decoder=decoder if folds else None,
        rescales=normalised == "constant_norm_rescale",
    )
    kind = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}[architecture]
    told = config.get("metadata")
    metadata: Mapping[str, Any] = told if isinstance(told, dict) else {}
    return Read(sae, kind, _hook(str(config.get("hook_name") or metadata.get("hook_name") or "")))


def _hook(name: str) -> str | None:
    """`blocks.N` of TransformerLens' residual streams: what stands after block N stands before block N + 1."""
    found = _RESIDUAL.fullmatch(name)
    return f"blocks.{int(found[1]) + (found[2] == 'post')}" if found else None


def from_saev(header: Mapping[str, Any], tensors: Mapping[str, Tensor], *, centre: bool = False) -> Read:
    """The header line and the state of a saev checkpoint (schemas up to 2): ReLU, TopK, BatchTopK (there: per sample, so TopK).

    centre: whether b_dec is subtracted first, as releases before schema 2 did. Matryoshka: the same encoder.
    """
    weight, bias, decoder_bias = _need(tensors, "saev", "W_enc", "b_enc", "b_dec")
    schema = header.get("schema", 0)
    if schema not in (0, 1, 2):
        raise BundleError(f"saev schema {schema!r} is not known; allowed: 1, 2, and the format before them")
    told = header.get("cfg") if schema else header
    config: Mapping[str, Any] = told if isinstance(told, dict) else {}
    named = config.get("activation")
    activation = named.get("cls") if isinstance(named, dict) else header.get("cls", "Relu")
    kinds = {"Relu": "relu", "SparseAutoencoderConfig": "relu", "TopK": "topk", "BatchTopK": "topk"}
    if activation not in kinds:
        raise BundleError(f"saev activation {activation!r} is not known; allowed: Relu, TopK, BatchTopK")
    sae = normal_form(weight.T.contiguous(), bias, torch.zeros_like(bias), centre=decoder_bias if centre else None)
    return Read(sae, kinds[activation], None)


def from_overcomplete(
    tensors: Mapping[str, Tensor], *, kind: str | None = None, threshold: float | None = None
) -> Read:
    """The state of an overcomplete SAE with a linear encoder (`linear`, `mlp_bn_1`): SAE, TopKSAE, BatchTopKSAE, JumpSAE.

    kind: relu, topk or batchtopk, which its state does not tell (jumprelu it does); threshold: batchtopk's running threshold,
    which overcomplete does not save. Raises BundleError for deeper encoders, ConfigError where kind or threshold are missing.
    """
    weight, bias = _need(tensors, "overcomplete", "encoder.final_block.0.weight", "encoder.final_block.0.bias")
    if any(name.startswith("encoder.mlp_blocks.") for name in tensors):
        raise BundleError(
            "an overcomplete encoder of several layers has no rows to read latents by; allowed: linear and mlp_bn_1"
        )
    norm = "encoder.final_block.1."
    if f"{norm}running_var" in tensors:
        gain, offset, mean, variance = (
            tensors[f"{norm}{each}"].float() for each in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / (variance + _BATCH_NORM_EPS).sqrt()
        weight, bias = weight * scale[:, None], (bias - mean) * scale + offset
    elif f"{norm}weight" in tensors:
        raise BundleError("an overcomplete encoder with a layer norm mixes all latents; allowed: linear, mlp_bn_1")
    if "thresholds" in tensors:
        return Read(normal_form(weight, bias, tensors["thresholds"].float().exp()), "jumprelu", None)
    if kind not in ("relu", "topk", "batchtopk"):
        raise ConfigError(
            f"overcomplete does not say which autoencoder it saved; give the kind (relu, topk, batchtopk), got {kind!r}"
        )
    if kind == "batchtopk" and threshold is None:
        raise ConfigError("overcomplete does not save batchtopk's running threshold; give it: --threshold T")
    level = torch.full_like(bias, max(threshold or 0.0, 0.0))
    return Read(normal_form(weight, bias, level), kind, None)


def from_probe(tensors: Mapping[str, Tensor]) -> Read:
    """A linear probe's weight [classes, d] (or [d]) and bias: every class is a latent without a threshold, its logit."""
    weight = _need(tensors, "linear probe", "weight")[0]
    weight = weight[None] if weight.ndim == 1 else weight
    bias = tensors["bias"].float().reshape(-1) if "bias" in tensors else torch.zeros(len(weight))
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise BundleError(
            f"a linear probe is a weight [classes, d] and a bias [classes], got {list(weight.shape)} and {list(bias.shape)}"
        )
    return Read(normal_form(weight, bias, torch.full_like(bias, float("-inf"))), "linear", None)
