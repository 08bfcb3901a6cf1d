"""What the vision model responds to: one number a(x0) of a picture, from a hooked trunk or from any differentiable function.

Knows trunks and readouts as tensors; must not know bundles, files or sampling.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.feature.address import FeatureAddress
from tiltscope.engine.feature.hooked import CPU, Trunk
from tiltscope.engine.feature.readout import Readout, read, token_map
from tiltscope.engine.trial import check_name, trial_values
from tiltscope.kernels.implementation import Implementation

Activation = Callable[[Tensor], Tensor]


class Feature:
    """A scalar a(x0) of a picture, differentiable in it. A bundle's features are readouts of a trunk; any function can be one.

        activation(x0) -> [batch]      x0 [batch, *shape]; samples must not look at each other

    Features of one trunk form a vector space:  2.0 * a - b  is the feature  x0 -> 2 a(x0) - b(x0).

    name       for manifests and messages
    identity   for the run's identity: the address (a direction: with the hash of its vector), or "custom:NAME"
    address    of a single feature of a bundle, else None
    terms      ((weight, address), ...) of a weighted sum of a bundle's features; empty for a custom feature
    pool_key   the name of the column that holds this feature's activations where a pool stores them, else None
    readout    batch 1; None for a custom feature          trunk   the same object for all features of one hook and dtype
    pool       the pool of the bundle it comes from, or None

    Raises ConfigError for an activation that cannot be called or an empty name.
    """

    # numpy leaves `2.0 * feature` to __rmul__, whatever float type the 2.0 is
    __array_ufunc__ = None

    def __init__(self, activation: Activation, *, name: str) -> None:
        if not callable(activation):
            raise ConfigError(f"activation must be a function x0 -> [batch], got {type(activation).__name__}")
        self._activation = activation
        self.name = check_name(name)
        self.identity = f"custom:{name}"
        self.address: FeatureAddress | None = None
        self.terms: tuple[tuple[float, FeatureAddress], ...] = ()
        self.readout: Readout | None = None
        self.trunk: Trunk | None = None
        self.pool: Any = None
        self._siblings: dict[tuple[torch.dtype, torch.device], Feature] = {}
        self._on_pictures: Feature | None = None

    @classmethod
    def from_readout(
        cls,
        trunk: Trunk,
        readout: Readout,
        *,
        name: str,
        identity: str | None = None,
        terms: Sequence[tuple[float, FeatureAddress]] = (),
        pool: object = None,
    ) -> "Feature":
        """A feature read off a trunk's tokens. readout has batch 1; identity defaults to the name."""
        feature = cls(lambda x0: read(trunk(x0), readout)[0], name=name)
        feature.trunk, feature.readout, feature.pool = trunk, readout, pool
        feature.identity = identity or name
        feature.terms = tuple(terms)
        if len(feature.terms) == 1 and feature.terms[0][0] == 1.0:
            feature.address = feature.terms[0][1]
        return feature

    def __repr__(self) -> str:
        return f"Feature({self.name!r})"

    @property
    def pool_key(self) -> str | None:
        return None if self.address is None else str(self.address)

    def activation(self, x0: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch"]:
        """a(x0), thresholded where the feature has a threshold: what q* and every report are about."""
        return self.activation_and_drive(x0)[0]

    def activation_and_drive(
        self, x0: Float[Tensor, "batch *shape"], *, kernels: Implementation = "reference"
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """(activation, drive): drive is the same sum before any threshold, which guidance differentiates.

        Custom: the same number twice; ConfigError where it is not a real floating tensor [batch]. kernels: which implementation
        of the ops on the way runs.
        """
        if self.trunk is not None and self.readout is not None:
            return read(self.trunk(x0, kernels=kernels), self.readout, kernels=kernels)
        value: Any = self._activation(x0)
        _check_answer(value, x0, self.name)
        return value, value

    def heat_map(self, x0: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch rows columns"] | None:
        """Where it fires: the weighted latents on the patch grid [batch, gh, gw], before pooling; None where it has no place.

        A custom feature has none, and neither has one that reads the class token.
        """
        if self.trunk is None or self.readout is None or any(address.kind == "cls" for _, address in self.terms):
            return None
        with torch.no_grad():
            tokens = token_map(self.trunk(x0), self.readout)
        return tokens[:, self.trunk.num_prefix_tokens :].unflatten(1, self.trunk.grid)

    def to(self, dtype: torch.dtype, device: torch.device = CPU) -> "Feature":
        """This feature with its trunk and readout in dtype on device (the same object each time; a custom one is itself).

        In 16-bit dtypes the trunk alone is narrowed: readouts are float32 at least.
        """
        wanted = (dtype, device)
        if self.trunk is None or self.readout is None or (self.trunk.dtype, self.trunk.device) == wanted:
            return self
        if wanted not in self._siblings:
            self._siblings.setdefault((self.trunk.dtype, self.trunk.device), self)
            wide = torch.promote_types(dtype, torch.float32)
            self._siblings[wanted] = self._sibling(self.trunk.in_dtype(*wanted), self.readout.to(wide, device))
        return self._siblings[wanted]

    def _sibling(self, trunk: Trunk, readout: Readout) -> "Feature":
        sibling = Feature.from_readout(
            trunk, readout, name=self.name, identity=self.identity, terms=self.terms, pool=self.pool
        )
        sibling._siblings = self._siblings
        return sibling

    def on_pictures(self) -> "Feature":
        """The same feature read off pictures [batch, 3, height, width] where the prior's samples are latents; else itself.

        One function behind the decoder, so a(x0) of a latent is a of its picture; the same object each time.
        """
        if self.trunk is None or self.readout is None or (trunk := self.trunk.on_pictures()) is self.trunk:
            return self
        if self._on_pictures is None:
            self._on_pictures = Feature.from_readout(
                trunk, self.readout, name=self.name, identity=self.identity, terms=self.terms, pool=self.pool
            )
        return self._on_pictures

    def masked(self, mask: Bool[Tensor, "rows columns"]) -> "Feature":
        """The same latents pooled over the places of `mask` alone, on the hook's grid: where, beside what.

        Pooling stays the feature's (the published mix, max, mean, lse), over these places. Its natural activations are not the
        stored ones: a pool computes them. Raises ConfigError for a mask of another shape or without a place, and for a feature
        that has none (custom, or of the class token).
        """
        if self.trunk is None or self.readout is None or any(address.kind == "cls" for _, address in self.terms):
            raise ConfigError(
                f"feature {self.name} has no places to be masked; give a feature pooled over a hook's grid"
            )
        grid = self.trunk.grid
        if mask.dtype != torch.bool or tuple(mask.shape) != grid or not bool(mask.any()):
            raise ConfigError(
                f"mask: got {mask.dtype} {list(mask.shape)} with {int(mask.sum())} places; allowed is bool {list(grid)} with at "
                "least one"
            )
        places = mask.cpu().flatten()
        if self.readout.mask.dim() == 3:  # tokens in a row, behind those that have no place
            places = torch.cat([torch.zeros(self.trunk.num_prefix_tokens, dtype=torch.bool), places])
        whole = places.view(self.readout.mask.shape[2:]).to(self.readout.mask.device)
        digest = hashlib.sha256(mask.cpu().numpy().tobytes()).hexdigest()[:16]
        return Feature.from_readout(
            self.trunk,
            replace(self.readout, mask=whole.expand(self.readout.mask.shape)),
            name=f"{self.name} in a mask of {int(mask.sum())} places",
            identity=f"({self.identity})@mask:{grid[0]}x{grid[1]}:{digest}",
            pool=self.pool,
        )

    def __mul__(self, factor: object) -> "Feature":
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        number = float(factor)
        if not math.isfinite(number):
            raise ConfigError(f"a feature is scaled by a finite number, got {number}")
        name = f"{number:g}*{self.name}" if " " not in self.name else f"{number:g}*({self.name})"
        if self.trunk is None or self.readout is None:
            return Feature(lambda x0: number * self._activation(x0), name=name)
        return Feature.from_readout(
            self.trunk,
            self.readout.scale(number),
            name=name,
            identity=f"{number!r}*({self.identity})",
            terms=[(number * weight, address) for weight, address in self.terms],
            pool=self.pool,
        )

    def __rmul__(self, factor: object) -> "Feature":
        return self.__mul__(factor)

    def __neg__(self) -> "Feature":
        return self * -1.0

    def __add__(self, other: object) -> "Feature":
        if not isinstance(other, Feature):
            return NotImplemented
        if self.trunk is None or self.readout is None or other.trunk is not self.trunk or other.readout is None:
            raise ConfigError(
                f"{self.name} and {other.name} are not read off one hook of one bundle in one dtype, so they cannot be added; "
                "write a function of both as Feature(activation, name=...)"
            )
        return Feature.from_readout(
            self.trunk,
            Readout.concat([self.readout, other.readout]),
            name=f"{self.name} + {other.name}",
            identity=f"({self.identity})+({other.identity})",
            terms=[*self.terms, *other.terms],
            pool=self.pool,
        )

    def __sub__(self, other: object) -> "Feature":
        if not isinstance(other, Feature):
            return NotImplemented
        return self + (-other)


def check_activation(feature: Feature, shape: Sequence[int], dtype: torch.dtype) -> None:
    """One trial call on two samples of fixed numbers in (-1, 1).

    Raises ConfigError where activation answers with something that is not a real floating tensor [batch], writes into x0,
    cannot be differentiated, gives NaN for every sample, or (a trunk's) reads pictures of another shape.
    """
    if feature.trunk is not None:
        expected = feature.trunk.input_shape
        if tuple(shape) != expected:
            raise ConfigError(
                f"feature {feature.name} reads samples of shape {expected}, the prior's are {tuple(shape)}"
            )
        return
    given = trial_values((2, *shape), dtype)
    x0 = given.clone().requires_grad_()
    with torch.enable_grad():
        # Through a view: writing into a leaf that requires a gradient would raise torch's own error, not ours.
        answer = feature.activation(x0 * 1.0)
    if not answer.requires_grad:
        raise ConfigError(
            f"feature {feature.name}: activation is not differentiable in x0; do not detach it, and use torch throughout"
        )
    gradient: Any = torch.autograd.grad(answer.sum(), x0, allow_unused=True)[0]
    if gradient is None:
        raise ConfigError(f"feature {feature.name}: activation does not depend on x0 by a differentiable path")
    if bool(answer.detach().isnan().all()):
        raise ConfigError(f"feature {feature.name}: activation is NaN for every sample of a trial call")
    _check_reads_only(feature, given)


def _check_answer(answer: Any, x0: Tensor, name: str) -> None:
    """Host-side facts only: no value is looked at, so nothing waits for a device."""
    if not isinstance(answer, Tensor):
        raise ConfigError(f"feature {name}: activation must return a torch tensor, got {type(answer).__name__}")
    if not answer.is_floating_point():
        raise ConfigError(f"feature {name}: activation must return a real floating dtype, got {answer.dtype}")
    if answer.shape != x0.shape[:1]:
        raise ConfigError(
            f"feature {name}: activation must return one number a sample, {[len(x0)]} for this batch, got {list(answer.shape)}"
        )


def _check_reads_only(feature: Feature, given: Tensor) -> None:
    x0 = given.clone()
    with torch.no_grad():
        feature.activation(x0)
    if not torch.equal(x0, given):
        raise ConfigError(f"feature {feature.name}: activation writes into x0; work out of place")
