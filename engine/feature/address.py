"""How a feature is written: HOOK:KIND:INDEX[@POOLING]. Text in, text out; knows no weights and imports no torch.

Split at the first two colons and the last @, so a direction's file name may hold colons (and an @ if a pooling follows).
"""

import re
from dataclasses import dataclass

from tiltscope.engine.errors import ConfigError

KINDS = ("sae", "neuron", "direction", "cls")
POOLINGS = ("centre", "max", "mean", "lse")
DEFAULT_POOLING = "centre"
FORM = "HOOK:KIND:INDEX[@POOLING], for example blocks.5:sae:1169"
ALLOWED_HOOKS = (
    "blocks.N (the residual stream before block N), stages.S.B (before block B of stage S) or norm (the output)"
)
ALLOWED_POOLINGS = f"{', '.join(POOLINGS)}, or a position y,x"

_HOOK = re.compile(r"norm|blocks\.[0-9]{1,4}|stages\.[0-9]{1,4}\.[0-9]{1,4}", re.ASCII)
_INDEX = re.compile(r"[0-9]{1,9}", re.ASCII)
_POSITION = re.compile(r"([0-9]{1,4}),([0-9]{1,4})", re.ASCII)


@dataclass(frozen=True)
class FeatureAddress:
    """Which number of which hooked layer, and how it is pooled over the picture.

    hook     `blocks.N`, `stages.S.B` or `norm`
    kind     `sae` (a latent), `neuron` (a channel), `direction` (a vector in a file), `cls` (a channel of the class token)
    index    the latent or channel, >= 0; for `direction` the path of a .safetensors or .npy file
    pooling  `centre`, `max`, `mean`, `lse` or `y,x`; None for `cls`, which is one token

    str(address) is the canonical text (the default pooling is left out) and parse(str(address)) == address.
    """

    hook: str
    kind: str
    index: int | str
    pooling: str | None = DEFAULT_POOLING

    @property
    def position(self) -> tuple[int, int] | None:
        """(y, x) of a single-position pooling, else None."""
        found = _POSITION.fullmatch(self.pooling or "")
        return (int(found[1]), int(found[2])) if found else None

    def __str__(self) -> str:
        text = f"{self.hook}:{self.kind}:{self.index}"
        # A path with an @ of its own must not be read as if its tail were the pooling.
        hidden = self.pooling is None or (self.pooling == DEFAULT_POOLING and "@" not in text)
        return text if hidden else f"{text}@{self.pooling}"


def parse(text: object) -> FeatureAddress:
    """Read HOOK:KIND:INDEX[@POOLING]. Raises ConfigError that names the offending part and what is allowed there.

    Whether the hook and the index exist is for the bundle to say; here only the form is judged.
    """
    parts = text.split(":", 2) if isinstance(text, str) else []
    if not isinstance(text, str) or len(parts) != 3:
        raise ConfigError(
            f"feature {text!r} is not of the form {FORM}; hooks: {ALLOWED_HOOKS}; kinds: {', '.join(KINDS)}"
        )
    hook, kind, rest = parts
    index_text, at, pooling_text = rest.rpartition("@") if "@" in rest else (rest, "", "")
    if kind not in KINDS:
        raise ConfigError(f"feature {text!r}: kind {kind!r} is not known; allowed: {', '.join(KINDS)}")
    return FeatureAddress(
        hook=_parse_hook(hook, text),
        kind=kind,
        index=_parse_index(index_text, kind, text),
        pooling=_parse_pooling(pooling_text, kind, text) if at else (None if kind == "cls" else DEFAULT_POOLING),
    )


def _parse_hook(hook: str, text: str) -> str:
    found = _HOOK.fullmatch(hook)
    if not found:
        raise ConfigError(f"feature {text!r}: hook {hook!r} is not known; allowed: {ALLOWED_HOOKS}")
    name, *numbers = hook.split(".")
    return ".".join([name, *(str(int(number)) for number in numbers)])


def _parse_index(index: str, kind: str, text: str) -> int | str:
    if kind == "direction":
        if not index.endswith((".safetensors", ".npy")):
            raise ConfigError(f"feature {text!r}: a direction is a .safetensors or .npy file, got {index!r}")
        return index
    if not _INDEX.fullmatch(index):
        what = "a latent of the sparse autoencoder" if kind == "sae" else "a channel"
        raise ConfigError(f"feature {text!r}: index {index!r} must be {what}: a whole number, 0 or above")
    return int(index)


def _parse_pooling(pooling: str, kind: str, text: str) -> str:
    if kind == "cls":
        raise ConfigError(f"feature {text!r}: cls is one token and takes no pooling; leave out @{pooling}")
    if pooling in POOLINGS:
        return pooling
    position = _POSITION.fullmatch(pooling)
    if not position:
        raise ConfigError(f"feature {text!r}: pooling {pooling!r} is not known; allowed: {ALLOWED_POOLINGS}")
    return f"{int(position[1])},{int(position[2])}"
