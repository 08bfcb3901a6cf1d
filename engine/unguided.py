"""The prior's own draws through a request's plan: natural activation where no pool says, and what a pool is checked with."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tiltscope.engine.errors import NonFiniteError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.sampler.noise import CALIBRATION_INDEX
from tiltscope.engine.sampler.state import Programme, admit
from tiltscope.engine.sampler.tick import tick

# One fixed batch shape, so that what calibration finds does not depend on the run's own batch size.
CALIBRATION_BATCH = 64


def unguided_draws(
    programme: Programme, *, seed: int, num: int, bucket: int = CALIBRATION_BATCH
) -> Float[Tensor, "num ..."]:
    """`num` samples of the prior under the programme's first plan, at indices 2^31 + i, apart from every user's own."""
    programme = replace(programme, particles=1, bucket=None)
    finished: list[Tensor] = []
    for at in range(0, num, bucket):
        indices = CALIBRATION_INDEX + np.arange(at, min(at + bucket, num))
        state = admit(programme, seed=seed, indices=indices, lam=np.zeros(len(indices)), readout=None, bucket=bucket)
        for _ in range(programme.plans[0].num_rows):
            state, _ = tick(state, programme)
        finished.append(state.x[: len(indices)][state.ok[: len(indices)]].cpu())
    draws = torch.cat(finished)
    if len(draws) == 0:
        raise NonFiniteError("none of the prior's unguided draws is finite; check the denoiser, or try more steps")
    return draws


def unguided_activations(
    programme: Programme, feature: Feature, *, seed: int, num: int, bucket: int = CALIBRATION_BATCH
) -> NDArray[np.float64]:
    """Activations of `unguided_draws`: float64, one for each draw that stayed finite."""
    batches: list[Tensor] = []
    for x0 in unguided_draws(programme, seed=seed, num=num, bucket=bucket).split(bucket):
        readout = None if feature.readout is None else feature.readout.expand(len(x0))
        batches.append(programme.step.measure(x0.to(programme.device), readout)[0].cpu())
    return torch.cat(batches).double().numpy()
