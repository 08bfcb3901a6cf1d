"""A sampler is a table: every solver, as rows of coefficients. Nothing else in tiltscope knows that solvers exist.

State is in unit-variance coordinates x = alpha x0 + sigma eps, alpha^2 + sigma^2 = 1, and theta = atan2(sigma, alpha) is the
noise angle. With D = E[x0 | x], grad_a = d drive / dx, strength w, z ~ N(0, I) and one history slot H (zero at the start),
one row does

    delta = e w grad_a
    x'    = a x + b D + delta + c z + d H
    H'    = p x + q D + f w grad_a + r H

Guidance replaces D by D~ = D + (sigma^2 / alpha) w grad_a, hence e = b sigma^2/alpha and f = q sigma^2/alpha, except for
multistep solvers, whose guidance is split off the history: f = 0 and e = (b + d) sigma^2/alpha, the first-order
coefficient. Numpy only: an embedding without torch fills the very same table.

solvers.py says what a row holds, grids.py at which noise levels; here the two become a table.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tiltscope.engine.choice import parse_choice
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.sampler.grids import GRIDS
from tiltscope.engine.sampler.row import COLUMNS, Row
from tiltscope.engine.sampler.solvers import SOLVERS, Solver

MAX_ROWS = 100_000
# Steps of the published sampler: its constant scale is given for so many.
PUBLISHED_STEPS = 1000


class GraphKind(IntEnum):
    """Which networks a row needs."""

    UNGUIDED = 0
    GUIDED = 1
    TRUNK_ONLY = 2


@dataclass(frozen=True)
class Plan:
    """A filled table: `table` float64 [rows, 11] in the order of COLUMNS, `kind` int8 [rows] of GraphKind.

    `thetas` float64 [steps + 1]: the noise angles between which the solver steps, the last one 0.
    `log_variance` float64 [rows, 2]: bounds of the noise that the network itself sizes, NaN in rows without; None: no row.
    """

    table: NDArray[np.float64]
    kind: NDArray[np.int8]
    thetas: NDArray[np.float64] = field(repr=False)
    log_variance: NDArray[np.float64] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.kind)

    def column(self, name: str) -> NDArray[np.float64]:
        return self.table[:, COLUMNS.index(name)]


def make_plan(
    solver: Any,
    *,
    steps: int,
    grid: Any = None,
    levels: NDArray[np.float64] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance: Literal["tilt", "constant"] = "tilt",
    recurrence: int = 1,
    travel_length: int = 1,
    start_sigma: float | None = None,
) -> Plan:
    """The table of `solver` over `steps` intervals of `grid`.

    solver, grid: a name ("heun"), a name with parameters ("ddim(eta=0.5)") or an object of SOLVERS / GRIDS. grid None: the
    solver's own, or the angle grid where the network has no levels. levels: the network's sigma levels, descending.
    guidance_interval: (sigma_lo, sigma_hi), rows outside are unguided. guidance: "constant" is the published update, whose
    e is 1000/steps in every row (at 1000 steps: x' = DDPM(x) + scale grad), whatever the noise; strength is then no lambda.
    recurrence, travel_length: every stretch of so many intervals is done `recurrence` times, with the forward process back up
    to its start in between, folded into the row before (length 1: Lugmayr et al. 2022's resampling and FreeDoM's recurrence;
    longer: time travel, which is what mends structure).
    start_sigma: begin there, and leave out the grid's levels above. Raises ConfigError on anything else.
    """
    method: Solver = parse_choice(solver, SOLVERS, "solver")
    if grid is None:
        grid = method.default_grid if levels is not None else "angle"
    for name, given, allowed in (
        ("steps", steps, MAX_ROWS),
        ("recurrence", recurrence, 100),
        ("travel_length", travel_length, MAX_ROWS),
    ):
        if type(given) is not int or not 1 <= given <= allowed:
            raise ConfigError(f"{name}: got {given!r}, allowed are whole numbers from 1 to {allowed}")
    if steps * recurrence > MAX_ROWS:
        raise ConfigError(
            f"steps and recurrence: got {steps} x {recurrence}, allowed are at most {MAX_ROWS} intervals in all"
        )
    thetas = parse_choice(grid, GRIDS, "grid").thetas(steps, levels)
    if start_sigma is not None:
        first = float(np.arcsin(start_sigma))
        thetas = np.concatenate([[first], thetas[thetas < first]])
    rows = list(_with_recurrence(method, thetas, recurrence, travel_length))
    learned = any(row.log_variance is not None for row in rows)
    if learned and recurrence > 1:
        raise ConfigError(
            f"recurrence: got {recurrence} with solver {solver}, whose noise is the network's own and cannot be folded "
            "into a way back up; give recurrence 1, or solver ddpm"
        )
    guided = [row.guided_in(guidance_interval or (0.0, 1.0)) for row in rows]
    constant = PUBLISHED_STEPS / steps if guidance == "constant" else None
    table = np.array([row.values(guided=on, constant=constant) for row, on in zip(rows, guided, strict=True)])
    kind = np.array([GraphKind.GUIDED if on else GraphKind.UNGUIDED for on in guided], np.int8)
    none = (np.nan, np.nan)
    log_variance = np.array([row.log_variance or none for row in rows]) if learned else None
    return Plan(table=table, kind=kind, thetas=thetas, log_variance=log_variance)


def _with_recurrence(method: Solver, thetas: NDArray[np.float64], times: int, length: int) -> Iterator[Row]:
    if times == 1:
        yield from method.rows(thetas)
        return
    for start in range(0, len(thetas) - 1, length):
        # A stretch starts anew: what a multistep solver remembers from before the jump is of another picture.
        stretch = thetas[start : start + length + 1]
        for turn in range(times):
            rows = list(method.rows(stretch))
            if turn < times - 1:
                rows[-1] = rows[-1].renoised(float(stretch[-1]), float(stretch[0]))
            yield from rows
