"""Arguments for the kernels' tests, their executed machine code and their benchmark: slots of mixed plans, rows and seeds.

Every case is drawn from its own generator; nothing is read from a file.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PLAN_ROWS = (5, 3, 7)
# Words of a 64-bit seed at its ends, and where a sum `seed + index` would make two slots one.
SEEDS = (0, 1, 2**32 - 1, 2**32, 2**40 + 7, 2**63, 2**64 - 1)


class GuidedCase(NamedTuple):
    """The arguments of dispatch.guided_step, in its order."""

    x: Tensor
    x0_hat: Tensor
    grad_a: Tensor
    history: Tensor
    table: Tensor
    num_rows: Tensor
    plan: Tensor
    row: Tensor
    ok: Tensor
    drive: Tensor
    strength: Tensor
    guided: Tensor
    key: Tensor
    index: Tensor
    particle: Tensor

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
        return GuidedCase(*(change(each) for each in self))


def guided_case(batch: int, shape: tuple[int, ...], *, seed: int = 0) -> GuidedCase:
    """float32 on the CPU. Slots differ in plan, row, seed, index, particle; every third is unguided, the fourth has done its plan,
    the sixth has failed before."""
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
