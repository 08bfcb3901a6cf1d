"""What many independent groups of weighted particles say together of Z, of KL and of E_q[phi].

    Z-hat   = mean_g Z_g                                   unbiased, as every Z_g is; log Z-hat is not, by about -se^2/2
    se      = sd_g(Z_g) / (sqrt(G) Z-hat)                  of log Z-hat, by the delta method; None for one group
    E_q[phi] = sum_g Z_g phi_g / sum_g Z_g                 the self-normalised estimate over all particles
    KL      = lam E_q[phi] - log Z-hat                     nats
    ESS     = (sum_g Z_g)^2 / sum_g (Z_g^2 / ess_g)        of all particles, those that share a start counted as one

Numpy only: knows nothing of pictures or samplers. Source: Del Moral 2004 (unbiasedness); method section 4.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tiltscope.engine.errors import ConfigError


@dataclass(frozen=True)
class Evidence:
    """Estimates from G groups (module docstring); phi_mean is E_q[phi] in units of phi, log_z and kl are nats."""

    log_z: float
    log_z_se: float | None
    kl: float
    phi_mean: float
    ess: float


def combine(log_z: ArrayLike, phi: ArrayLike, ess: ArrayLike, lam: float) -> Evidence | None:
    """One row a group: log Z_g, its weighted mean of phi, its effective sample size. None where no group survived.

    Groups with log Z_g = -inf (every particle failed) count as Z_g = 0. Raises ConfigError where the lengths differ.
    """
    log_zs, phis, sizes = (np.asarray(each, np.float64) for each in (log_z, phi, ess))
    if not log_zs.shape == phis.shape == sizes.shape or log_zs.ndim != 1:
        raise ConfigError(f"evidence: got shapes {log_zs.shape}, {phis.shape}, {sizes.shape}; one row a group in each")
    alive = np.isfinite(log_zs)
    if not alive.any():
        return None
    top = float(log_zs[alive].max())
    z = np.where(alive, np.exp(np.where(alive, log_zs, top) - top), 0.0)
    mean = float(z.mean())
    total, phi_mean = top + float(np.log(mean)), float(z[alive] @ phis[alive] / z.sum())
    return Evidence(
        log_z=total,
        log_z_se=float(z.std(ddof=1) / len(z) ** 0.5 / mean) if len(z) > 1 else None,
        kl=max(lam * phi_mean - total, 0.0),
        phi_mean=phi_mean,
        ess=float(z.sum() ** 2 / (z[alive] ** 2 / sizes[alive]).sum()),
    )
