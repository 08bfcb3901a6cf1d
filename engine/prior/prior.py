"""What pictures look like: a denoiser D(x, sigma) = E[x0 | x], whatever it is made of.

Knows tensors and shapes; must not know features, plans or files.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.errors import ConfigError
from tiltscope.engine.prior.decoder import Decoder
from tiltscope.engine.prior.network import CPU, NetworkDenoiser
from tiltscope.engine.trial import check_name, trial_values

Denoise = Callable[[Tensor, Tensor], Tensor]


class Prior:
    """A distribution p(x0) of pictures, known by its denoiser in unit-variance coordinates:

        denoise(x, sigma) = E[x0 | x],   x = alpha x0 + sigma eps,   alpha^2 + sigma^2 = 1,   eps ~ N(0, I)

    denoise: x [batch, *shape] of any real floating dtype, sigma float64 [batch] in [0, 1] -> a tensor of x's shape and a real
    floating dtype. It gets copies and may not write into them; samples must not look at each other. Guidance differentiates it.

    name       for manifests and messages
    shape      of one sample
    levels     the network's own sigma, float64, strictly descending (what grid="native" walks), or None
    identity   "sha256:..." of the weights, or "custom:NAME"
    pictures   whether x0 is, or decodes to, [3, h, w] in [-1, 1]
    decoder    from latents to pictures where x0 is latent, or None
    pool       the pool of the bundle it comes from, or None
    network    the network behind denoise where there is one, or None (what an exporter traces)
    guidance_interval  (sigma_lo, sigma_hi) within which a lambda's push is worth following, or None: everywhere. Above it
               the answer of a network that is no posterior mean there need not have its derivative either

    Raises ConfigError for a shape that is not positive whole numbers, an empty name, or a denoise that cannot be called.
    """

    def __init__(self, denoise: Denoise, *, shape: Sequence[int], name: str = "custom") -> None:
        if not callable(denoise):
            raise ConfigError(f"denoise must be a function (x, sigma) -> E[x0 | x], got {type(denoise).__name__}")
        self._denoise = denoise
        self.name = check_name(name)
        self.shape = _check_shape(shape)
        self.identity = f"custom:{name}"
        self.levels: NDArray[np.float64] | None = None
        self.network: NetworkDenoiser | None = None
        self.decoder: Decoder | None = None
        self.pool: Any = None
        self.guidance_interval: tuple[float, float] | None = None
        self._root = self
        self._siblings: dict[tuple[torch.dtype, torch.device], Prior] = {}

    @classmethod
    def from_network(
        cls,
        network: NetworkDenoiser,
        *,
        shape: Sequence[int],
        name: str,
        identity: str,
        pool: object = None,
        decoder: Decoder | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> "Prior":
        """A prior whose denoiser is a network; `to(dtype)` moves it between precisions. decoder: of its latents, float32."""
        prior = cls(network, shape=shape, name=name)
        prior.decoder, prior.guidance_interval = decoder, guidance_interval
        prior.network, prior.levels, prior.identity, prior.pool = network, network.levels, identity, pool
        prior._siblings[network.dtype, network.device] = prior
        return prior

    def __repr__(self) -> str:
        return f"Prior({self.name!r}, shape={self.shape})"

    @property
    def pictures(self) -> bool:
        return self.decoder is not None or (len(self.shape) == 3 and self.shape[0] == 3)

    def decode(self, x0: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch 3 height width"]:
        """The picture of x0 in about [-1, 1]: itself, or what its decoder makes of it, in the decoder's float32.

        Raises ConfigError where the prior is not of pictures.
        """
        if not self.pictures:
            raise ConfigError(
                f"prior {self.name}: samples of shape {list(self.shape)} are no pictures and have no decoder"
            )
        if self.decoder is None:
            return x0
        with torch.no_grad():
            # One at a time: a decoder holds a hundred times its latent.
            return torch.cat([self.decoder(x0[[at]].float().to(self.decoder.device)) for at in range(len(x0))])

    def denoise(
        self, x: Float[Tensor, "batch *shape"], sigma: Float64[Tensor, "batch"]
    ) -> Float[Tensor, "batch *shape"]:
        """D = E[x0 | x], in x's dtype. Differentiable in x; the caller's tensors are never written.

        Raises ConfigError where shapes do not fit, or a custom denoiser's answer is not a real floating tensor of x's shape.
        """
        if x.shape[1:] != self.shape or sigma.shape != x.shape[:1]:
            raise ConfigError(
                f"prior {self.name}: x must be [batch, {', '.join(map(str, self.shape))}] and sigma [batch], "
                f"got {list(x.shape)} and {list(sigma.shape)}"
            )
        if self.network is not None:
            return self.network(x, sigma)
        # Copies: a denoiser that writes into its argument at some noise levels only must not reach the sampler's state.
        x0_hat = self._denoise(x.clone(), sigma.clone())
        _check_answer(x0_hat, x, self.name)
        return x0_hat if x0_hat.dtype == x.dtype else x0_hat.to(x.dtype)

    def to_images(self, x0: Float[Tensor, "batch *shape"]) -> UInt8[Tensor, "batch 3 height width"] | None:
        """`to_pixels` of the decoded x0; None where the prior is not of pictures."""
        if not self.pictures:
            return None
        return to_pixels(self.decode(x0.detach()))

    def to(self, dtype: torch.dtype, device: torch.device = CPU) -> "Prior":
        """This prior with its network in dtype on device (the same object each time; a custom prior is itself)."""
        root = self._root
        if root.network is None:
            return self
        if (dtype, device) not in root._siblings:
            # From the weights as they were loaded, never by way of a lower precision.
            sibling = Prior.from_network(
                root.network.in_dtype(dtype, device),
                shape=self.shape,
                name=self.name,
                identity=self.identity,
                pool=self.pool,
                decoder=self.decoder,
                guidance_interval=self.guidance_interval,
            )
            sibling._root = root
            root._siblings[dtype, device] = sibling
        return root._siblings[dtype, device]


def to_pixels(pictures: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch 3 height width"]:
    """round((picture + 1) * 127.5) within [0, 255], uint8. NaN becomes 0."""
    return ((pictures.float() + 1) * 127.5).nan_to_num(0.0).round().clamp(0, 255).to(torch.uint8)


def check_denoise(prior: Prior, dtype: torch.dtype, *, guided: bool = False) -> None:
    """One trial call at sigma = 0.6 on two samples of noise-like numbers.

    Raises ConfigError where denoise answers with another shape or something that is not a real floating tensor, writes into x or
    sigma, or (guided) cannot be differentiated with respect to x. A network prior is taken at its word.
    """
    if prior.network is not None:
        return
    x = 1.5 * trial_values((2, *prior.shape), dtype)
    sigma = torch.full((2,), 0.6, dtype=torch.float64)
    given_x, given_sigma = x.clone(), sigma.clone()
    with torch.no_grad():
        answer = prior._denoise(given_x, given_sigma)  # pyright: ignore[reportPrivateUsage]
    if not torch.equal(given_x, x) or not torch.equal(given_sigma, sigma):
        raise ConfigError(f"prior {prior.name}: denoise writes into its arguments; work on x.clone(), or out of place")
    _check_answer(answer, x, prior.name)
    if guided:
        with torch.enable_grad():
            answer = prior.denoise(x.requires_grad_(), sigma)
        if not answer.requires_grad:
            raise ConfigError(
                f"prior {prior.name}: denoise is not differentiable in x, which guidance needs; "
                "do not detach x, use numpy or torch.no_grad() inside it, or sample with lam=0"
            )


def _check_shape(shape: object) -> tuple[int, ...]:
    sizes: tuple[Any, ...] = tuple(shape) if isinstance(shape, tuple | list) else ()
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(f"shape must be positive whole numbers such as (3, 64, 64), got {shape!r}")
    return sizes


def _check_answer(answer: Any, x: Tensor, name: str) -> None:
    """Host-side facts only: no value is looked at, so nothing waits for a device."""
    if not isinstance(answer, Tensor):
        raise ConfigError(f"prior {name}: denoise must return a torch tensor, got {type(answer).__name__}")
    if not answer.is_floating_point():
        raise ConfigError(f"prior {name}: denoise must return a real floating dtype, got {answer.dtype}")
    if answer.shape != x.shape:
        raise ConfigError(f"prior {name}: denoise must return x's shape {list(x.shape)}, got {list(answer.shape)}")
