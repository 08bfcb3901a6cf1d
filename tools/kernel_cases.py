"""Arguments for the kernels' tests, their executed machine code and their benchmark: slots of mixed plans, rows and seeds.

Every case is drawn from its own generator; nothing is read from a file.
"""

from math import pi, prod
from unittest import mock

import torch
from torch import Tensor

from tiltscope.kernels import philox, reference
from tiltscope.kernels.reference import GuidedStep, StepInputs

PLAN_ROWS = (5, 3, 7)
# Words of a 64-bit seed at its ends, and where a sum `seed + index` would make two slots one.
SEEDS = (0, 1, 2**32 - 1, 2**32, 2**40 + 7, 2**63, 2**64 - 1)


class GuidedCase(StepInputs):
    """The inputs of a guided step, and what tests make of them."""

    def to(self, dtype: torch.dtype) -> "GuidedCase":
        """Every floating tensor in dtype."""
        return self._map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def network_in(self, dtype: torch.dtype) -> "GuidedCase":
        """The mixed form: what the networks return in dtype."""
        return self._replace(x0_hat=self.x0_hat.to(dtype), grad_a=self.grad_a.to(dtype))

    def slots(self, which: Tensor) -> "GuidedCase":
        """Some of the slots, in that order; the plans stay."""
        return self._replace(
            **{name: getattr(self, name)[which] for name in self._fields if name not in ("table", "num_rows")}
        )

    def pictures(self, change: object) -> "GuidedCase":
        """The four [batch, ...] tensors through `change`."""
        return self._replace(**{name: change(getattr(self, name)) for name in ("x", "x0_hat", "grad_a", "history")})

    def _map(self, change: object) -> "GuidedCase":
        return GuidedCase(*(None if each is None else change(each) for each in self))


def guided_case(batch: int, shape: tuple[int, ...], *, seed: int = 0) -> GuidedCase:
    """float32 on the CPU. Slots differ in plan, row, seed, index and particle.

    Every third is unguided, the fourth has done its plan, the sixth has failed before.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    slot = torch.arange(batch)
    num_rows = torch.tensor(PLAN_ROWS)
    plan = slot % len(PLAN_ROWS)
    row = torch.where(slot % 8 == 3, num_rows[plan], (slot * 2 + 1) % num_rows[plan])
    seeds = [SEEDS[at % len(SEEDS)] for at in range(batch)]
    guided = slot % 3 != 2
    return GuidedCase(
        x=normal(batch, *shape),
        x0_hat=normal(batch, *shape),
        grad_a=normal(batch, *shape),
        history=normal(batch, *shape),
        table=normal(len(PLAN_ROWS), max(PLAN_ROWS), 11),
        num_rows=num_rows,
        plan=plan,
        row=row,
        ok=slot % 8 != 5,
        drive=torch.where(guided, normal(batch), torch.nan),
        strength=normal(batch),
        guided=guided,
        key=torch.tensor([(word & 0xFFFFFFFF, word >> 32) for word in seeds]),
        index=slot * 2**26 + 3,
        particle=slot % 4 * 16384,
    )


def normal_of_float32_uniforms(
    key: Tensor,
    index: Tensor,
    row: Tensor,
    particle: Tensor,
    *,
    stream: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """The generator's normals as a float32 state defines them, without rounding after that: float32 uniforms, float64 functions.

    A uniform near 1 is one of few in float32, and -2 ln u follows it: with uniforms of float64 the same element would be another
    number by up to 3e-4, which is no error of a kernel.
    """
    count = prod(shape)
    blocks = torch.arange(-(-count // 4))[None, :]
    c1, c2, c3 = row[:, None], (stream | particle << 16)[:, None], index[:, None]
    words = philox.philox(blocks, c1, c2, c3, key[:, :1], key[:, 1:])
    u0, u1, u2, u3 = (((word.float() + 0.5) * 2.0**-32).double() for word in words)
    first, second = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
    turn = 2 * pi
    z = [first * (turn * u1).cos(), first * (turn * u1).sin(), second * (turn * u3).cos(), second * (turn * u3).sin()]
    return torch.stack(z, -1).flatten(1)[:, :count].reshape(-1, *shape).to(dtype)


def exact_guided_step(case: GuidedCase) -> GuidedStep:
    """The definition in float64, on the float32 state's noise."""
    with mock.patch.object(reference, "normal", normal_of_float32_uniforms):
        return reference.guided_step(case.to(torch.float64))


def errors_of(got: GuidedStep, case: GuidedCase) -> dict[str, float]:
    """How far outputs are from the definition: pictures as a share of their largest value, sums of the size of their terms."""
    exact, wide = exact_guided_step(case), case.to(torch.float64)
    scale = max(1.0, float(torch.stack([exact.x.abs().max(), exact.history.abs().max()]).max()))
    rows = wide.table[wide.plan, wide.row.clamp(max=wide.table.shape[1] - 1)]
    over = tuple(range(1, case.x.dim()))
    push = (wide.strength * rows[:, reference.E]).abs()
    gradient = torch.zeros_like(wide.x) if wide.grad_a is None else wide.grad_a
    size = gradient.square().sum(over) + 1e-30
    scales = {
        "x": scale,
        "history": scale,
        "grad_norm_sq": size,
        "delta_norm_sq": push**2 * size + 1e-30,
        "z_dot_delta": push * gradient.abs().sum(over) * 3 + 1e-30,
    }
    return {
        name: float(((getattr(got, name).double() - getattr(exact, name)) / of).abs().max())
        for name, of in scales.items()
    }


# What a float32 kernel may be off from the float64 definition on the same uniforms, by `errors_of`. Pictures: five products and
# their sum, each within half a unit in the last place (6e-8) of the largest term, and a normal within four of itself. Sums: of up
# to thousands of terms, pairwise or by threads, which round as their depth does.
TOLERANCES = {"x": 1e-6, "history": 1e-6, "grad_norm_sq": 1e-6, "delta_norm_sq": 1e-6, "z_dot_delta": 1e-6}


def check_guided_step(got: GuidedStep, case: GuidedCase) -> None:
    """Raises AssertionError with the errors where an output is not the definition's."""
    exact = exact_guided_step(case)
    assert torch.equal(got.row, exact.row), f"row: {got.row.tolist()} for {exact.row.tolist()}"
    assert torch.equal(got.ok, exact.ok), f"ok: {got.ok.tolist()} for {exact.ok.tolist()}"
    errors = errors_of(got, case)
    beyond = {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCES[name]}
    assert not beyond, f"beyond the tolerance: {beyond}"
    stay = exact.row == case.row
    for name in ("x", "history"):
        assert torch.equal(getattr(got, name)[stay], getattr(case, name)[stay]), f"{name} of a slot that stays changed"
