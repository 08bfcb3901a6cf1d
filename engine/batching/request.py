"""A request in the batcher: what was asked, which samples wait, are being drawn or are done, and the promise of an answer."""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tiltscope.engine.batching.slots import stack
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.report.manifest import complete
from tiltscope.engine.run import Run, check_any_finite, failures
from tiltscope.engine.sampler.plan import GraphKind, Plan
from tiltscope.engine.sampler.state import SlotState, admit
from tiltscope.engine.samples import Samples, join
from tiltscope.engine.tilt.log_tilt import LogTilt


@dataclass(frozen=True)
class Preview:
    """A sample on its way: how many rows of its plan are done, and what the last of them took the picture to be."""

    index: int
    row: int
    num_rows: int
    x0_hat: Float[Tensor, "..."]


class Ticket(Future[Samples]):
    """The promise of a request's Samples: a concurrent.futures.Future, so asyncio.wrap_future awaits it.

    cancel() takes effect between two ticks and touches no other request; it is refused once the answer is there.
    """

    request: "Request"

    def previews(self) -> list[Preview]:
        """The samples being drawn now, as the last tick saw them. Costs the batcher nothing."""
        return self.request.previews()


class Sample:
    """One sample of a request while it is drawn: its particles' slots, and the host's mirror of their row."""

    def __init__(self, request: "Request", index: int, state: SlotState, row: int = 0) -> None:
        self.request, self.index, self.state, self.row = request, index, state, row
        self.seen: Tensor | None = None
        self.measured: tuple[Tensor, Tensor] | None = None
        """(activation, drive) of its particles, once it is drawn and measured"""
        self._guided = state.host.tilted[0] or request.run.programme.lift.moves_x0

    @property
    def plan(self) -> Plan:
        return self.request.run.plan

    @property
    def log_tilt(self) -> LogTilt:
        return self.request.run.programme.log_tilts[0]

    @property
    def done(self) -> bool:
        return self.row >= self.plan.num_rows

    @property
    def kind(self) -> GraphKind:
        """The graph of its next row."""
        return GraphKind(self.plan.kind[self.row]) if self._guided else GraphKind.UNGUIDED


class Request:
    """What was asked, ready to be drawn. `name` is its own among the batcher's; `deadline`: time.monotonic(), or None."""

    def __init__(self, run: Run, *, name: str, deadline: float | None = None) -> None:
        if run.programme.lift.couples:
            raise ConfigError(
                f"lift: {run.config.lift} makes samples push each other, so they cannot share a batch with others'; use sample()"
            )
        self.run, self.name, self.deadline = run, name, deadline
        self.waiting: deque[int] = deque(run.config.all_indices)
        self.live: dict[int, Sample] = {}
        self.finished: dict[int, Sample] = {}
        self.submitted = time.monotonic()
        self.first_tick: float | None = None
        self.ticket = Ticket()
        self.ticket.request = self

    @property
    def ended(self) -> bool:
        """Whether nobody waits for it any more: answered, cancelled or failed."""
        return self.ticket.done()

    def start(self) -> Sample:
        """The next waiting sample at its first row."""
        index = self.waiting.popleft()
        run = self.run
        state = admit(
            run.programme,
            seed=run.config.seed,
            indices=np.array([index], np.int64),
            lam=np.array([run.lam[index] if isinstance(run.lam, Mapping) else run.lam]),
            readout=run.feature.readout,
            bucket=run.config.particles,
        )
        self.live[index] = Sample(self, index, state)
        return self.live[index]

    def finish(self, sample: Sample) -> None:
        """Keep a measured sample; answer the ticket where it was the last one."""
        self.finished[sample.index] = self.live.pop(sample.index)
        sample.seen = None  # it holds a whole batch's
        if len(self.finished) == self.run.config.num and self.ticket.set_running_or_notify_cancel():
            try:
                self.ticket.set_result(self._collect())
            except Exception as error:  # noqa: BLE001  whoever waits is told, as sample() would have told them
                self.ticket.set_exception(error)

    def fail(self, error: Exception) -> None:
        """End it with `error`, unless it ended already."""
        if not self.ended and self.ticket.set_running_or_notify_cancel():
            self.ticket.set_exception(error)

    def previews(self) -> list[Preview]:
        live = [each for each in list(self.live.values()) if each.seen is not None]
        return [Preview(each.index, each.row, each.plan.num_rows, each.seen) for each in live if each.seen is not None]

    def _collect(self) -> Samples:
        run, indices = self.run, list(self.run.config.all_indices)
        at_once = max(1, run.config.bucket // run.config.particles)
        parts: list[Samples] = []
        for at in range(0, len(indices), at_once):
            chosen = [self.finished[index] for index in indices[at : at + at_once]]
            activation, drive = zip(*(sample.measured for sample in chosen if sample.measured is not None), strict=True)
            state, measured = stack([sample.state for sample in chosen]), (torch.cat(activation), torch.cat(drive))
            parts.append(run.collect(state, len(chosen), finished=True, measured=measured))
        samples = join(parts)
        check_any_finite(samples, run.plan)
        now = time.monotonic()
        seconds = run.seconds | {
            "waiting": (self.first_tick or now) - self.submitted,
            "sampling": now - (self.first_tick or now),
        }
        samples, evidence = run.with_evidence(samples)
        facts = run.describe() | evidence | {"seconds": seconds, "failures": failures(samples, run.plan)}
        return replace(samples, manifest=complete(facts | {"batched": True}))
