"""What a noise level decides of an exported denoiser, in numpy alone: for an embedding that has no torch.

    D = from_x x + from_output network(input_scale x, time_embedding)

The same numbers as engine/runtime/conditioning.py gives in torch (tests/runtime/test_schedule.py, to 1e-12), from the plain JSON
that an exporter leaves beside its graphs.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE_NAME = "schedule.json"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """levels: the network's sigma, descending. prediction: a key of PREDICTIONS in engine/prior/network.py, with its formulas.

    frequencies, phases, amplitude: its time embedding, amplitude cos(t frequency + phase) in each channel. shape: of one sample.
    rows: of a readout that the graphs take. time_scale, sigma_data: of a flow, and of EDM.
    """

    shape: tuple[int, ...]
    rows: int
    levels: tuple[float, ...]
    prediction: str
    frequencies: tuple[float, ...]
    phases: tuple[float, ...]
    amplitude: float
    time_scale: float = 1000.0
    sigma_data: float = 0.5

    @staticmethod
    def read(folder: Path) -> "Schedule":
        facts: dict[str, Any] = json.loads((folder / FILE_NAME).read_text())
        for name in ("shape", "levels", "frequencies", "phases"):
            facts[name] = tuple(facts[name])
        return Schedule(**facts)

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self)))

    def conditioning(self, sigma: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """(from_x [batch], from_output [batch], time_embedding [batch, channels], input_scale [batch]), float64."""
        alpha = np.sqrt((1 - sigma) * (1 + sigma))
        embedding = self._embedding(self._time(sigma, alpha))
        return (*self._coefficients(sigma, alpha), embedding, self._input_scale(sigma, alpha))

    @property
    def _ends(self) -> tuple[float, float, float]:
        """(sigma, alpha) of the quietest level, alpha of the noisiest."""
        noisiest, quietest = self.levels[0], self.levels[-1]
        return quietest, math.sqrt((1 - quietest) * (1 + quietest)), math.sqrt((1 - noisiest) * (1 + noisiest))

    def _time(self, sigma: NDArray[np.float64], alpha: NDArray[np.float64]) -> NDArray[np.float64]:
        """By the prediction's formula, or linear in the noise angle between the network's own levels; held at the ends."""
        low_sigma, low_alpha, high_alpha = self._ends
        if self.prediction == "flow":
            return self.time_scale * np.maximum(sigma / (alpha + sigma), low_sigma / (low_sigma + low_alpha))
        if self.prediction in ("edm", "edm_v"):
            ratio = sigma / np.maximum(alpha, high_alpha)
            return 0.25 * np.log(np.clip(ratio, low_sigma / low_alpha, math.sqrt(1 - high_alpha**2) / high_alpha))
        thetas = np.arcsin(np.array(self.levels)[::-1])
        return np.interp(np.arcsin(sigma), thetas, np.arange(len(thetas)))

    def _input_scale(self, sigma: NDArray[np.float64], alpha: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.prediction == "flow":
            return 1 / (alpha + sigma)
        if self.prediction in ("edm", "edm_v"):
            return 1 / np.sqrt(sigma * sigma + self.sigma_data**2 * alpha * alpha)
        return np.ones_like(sigma)

    def _coefficients(
        self, sigma: NDArray[np.float64], alpha: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        low_sigma, low_alpha, high_alpha = self._ends
        if self.prediction == "v_prediction":
            return alpha, -sigma
        if self.prediction == "epsilon":
            inverse = 1 / np.maximum(alpha, high_alpha)
            return inverse, -sigma * inverse
        scale = self._input_scale(sigma, alpha)
        if self.prediction == "flow":
            return scale, -sigma * scale
        if self.prediction in ("edm", "edm_v"):
            sign = 1 if self.prediction == "edm" else -1
            return self.sigma_data**2 * alpha * scale**2, sign * sigma * self.sigma_data * scale
        # Below the quietest level the noise that the network implies there is kept (engine/prior/network.py, from_sample).
        share = np.minimum(sigma / low_sigma, 1.0)
        inside = sigma >= low_sigma
        safe = np.where(inside, 1.0, alpha)
        return np.where(inside, 0.0, (1 - share) / safe), np.where(inside, 1.0, share * low_alpha / safe)

    def _embedding(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.amplitude * np.cos(time[:, None] * np.array(self.frequencies) + np.array(self.phases))
