"""The numpy schedule is the torch one, for every prediction, at the network's levels, between them and beyond both ends."""

import numpy as np
import pytest
import torch
from torch import nn

from tiltscope.engine.prior.edm import Fourier
from tiltscope.engine.prior.edm2 import PhasedFourier
from tiltscope.engine.prior.levels import sigma_levels
from tiltscope.engine.prior.network import PREDICTIONS, NetworkDenoiser, TimeEmbedding
from tiltscope.engine.runtime.conditioning import conditioning
from tiltscope.engine.runtime.schedule import Schedule


class Network(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.time_proj = embedding


def drawn(embedding):
    """EDM's frequencies, and EDM2's with their phases, as a checkpoint brings them."""
    for name, buffer in embedding.named_buffers():
        buffer.copy_(torch.linspace(-20, 20, len(buffer)) if name == "freqs" else torch.linspace(0, 6, len(buffer)))
    return embedding


EMBEDDINGS = {
    "cosine first": TimeEmbedding(16, flip_sin_to_cos=True, downscale_freq_shift=0.0),
    "sine first, odd": TimeEmbedding(9, flip_sin_to_cos=False, downscale_freq_shift=1.0),
    "EDM": drawn(Fourier(8)),
    "EDM2": drawn(PhasedFourier(12)),
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_it_is_the_torch_one(prediction, embedding, tmp_path):
    facts = {"time_scale": 700.0, "sigma_data": 0.6}
    levels = sigma_levels({"beta_schedule": "squaredcos_cap_v2"})
    denoiser = NetworkDenoiser(Network(EMBEDDINGS[embedding]), levels=levels, prediction=prediction, **facts)
    schedule = Schedule(
        shape=(3, 8, 8),
        rows=4,
        levels=tuple(levels.tolist()),
        prediction=prediction,
        **EMBEDDINGS[embedding].waves()._asdict(),
        **facts,
    )
    schedule.write(tmp_path)
    sigma = np.concatenate([[0.0, 1e-4, levels[-1] / 2], levels[::97], np.linspace(0.001, 0.9999, 60), [1.0 - 1e-9]])
    found = Schedule.read(tmp_path).conditioning(sigma)
    expected = conditioning(denoiser, torch.from_numpy(sigma), torch.float64)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-9, atol=1e-9)
