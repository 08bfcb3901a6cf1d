"""What a noise level decides of an exported denoiser, in numpy alone: for an embedding that has no torch.

    D = from_x x + from_output network(x, time_embedding)

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
    """levels: the network's sigma, descending. prediction: epsilon, v_prediction or sample. The rest: its time embedding.

    shape: of one picture. rows: rows of a readout that the graphs take.
    """

    shape: tuple[int, ...]
    rows: int
    levels: tuple[float, ...]
    prediction: str
    channels: int
    flip_sin_to_cos: bool
    downscale_freq_shift: float

    @staticmethod
    def read(folder: Path) -> "Schedule":
        facts: dict[str, Any] = json.loads((folder / FILE_NAME).read_text())
        for name in ("shape", "levels"):
            facts[name] = tuple(facts[name])
        return Schedule(**facts)

    def write(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self)))

    def conditioning(
        self, sigma: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(from_x [batch], from_output [batch], time_embedding [batch, channels]) at these noise levels, float64."""
        alpha = np.sqrt((1 - sigma) * (1 + sigma))
        return (*self._coefficients(sigma, alpha), self._embedding(self._time(sigma)))

    def _time(self, sigma: NDArray[np.float64]) -> NDArray[np.float64]:
        """Linear in the noise angle between the network's own levels, held at both ends."""
        thetas = np.arcsin(np.array(self.levels)[::-1])
        return np.interp(np.arcsin(sigma), thetas, np.arange(len(thetas)))

    def _coefficients(
        self, sigma: NDArray[np.float64], alpha: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        noisiest, quietest = self.levels[0], self.levels[-1]
        if self.prediction == "v_prediction":
            return alpha, -sigma
        if self.prediction == "epsilon":
            inverse = 1 / np.maximum(alpha, math.sqrt((1 - noisiest) * (1 + noisiest)))
            return inverse, -sigma * inverse
        # Below the quietest level the noise that the network implies there is kept (engine/prior/network.py, from_sample).
        share = np.minimum(sigma / quietest, 1.0)
        inside = sigma >= quietest
        safe = np.where(inside, 1.0, alpha)
        least_alpha = math.sqrt((1 - quietest) * (1 + quietest))
        return np.where(inside, 0.0, (1 - share) / safe), np.where(inside, 1.0, share * least_alpha / safe)

    def _embedding(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        half = self.channels // 2
        frequency = np.exp(-math.log(10000) * np.arange(half) / (half - self.downscale_freq_shift))
        phase = time[:, None] * frequency
        parts = (np.cos(phase), np.sin(phase)) if self.flip_sin_to_cos else (np.sin(phase), np.cos(phase))
        return np.pad(np.concatenate(parts, axis=1), ((0, 0), (0, self.channels % 2)))
