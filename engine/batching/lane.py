"""A lane: samples that can share a network call, and the choice of which of them do in the next tick.

Two samples share a lane where one step serves both: the same trunk and hook (or the same custom feature), as many summed rows,
the same lift and number of particles. A tick advances samples whose next rows need the same graph, or take the same bits from it,
so that no graph runs for a part of a batch. The batch stays together while it can: states are copied only where its membership
changes. Finished pictures are measured together, too: a call costs as much for one as for a whole batch.
"""

from collections import deque
from dataclasses import dataclass, replace

import torch

from tiltscope.engine.batching.request import Request, Sample
from tiltscope.engine.batching.slots import padded, take
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.run import Run, measure
from tiltscope.engine.sampler.plan import GraphKind
from tiltscope.engine.sampler.state import HostRows, SlotState
from tiltscope.engine.sampler.tick import one_graph_serves_both, tick
from tiltscope.kernels.dispatch import count_calls

# A graph that samples wait for runs after so many ticks of the others at the latest; so does what measures finished pictures.
PATIENCE = 8
# A tick of the unguided graph, in ticks of the guided one: a forward pass beside two networks and back (benchmarks/budget.py).
COST = {GraphKind.GUIDED: 1.0, GraphKind.UNGUIDED: 0.3}


def step_key(feature: Feature) -> object:
    """Features of equal keys are served by one step: those of one hook, whose trunk is one object, or one custom feature."""
    return feature.identity if feature.trunk is None else id(feature.trunk)


def lane_key(run: Run) -> tuple[object, ...]:
    """Runs of equal keys share a lane."""
    rows = None if run.feature.readout is None else run.feature.readout.num_rows
    return (step_key(run.feature), rows, run.config.lift, run.config.particles, run.config.bucket)


@dataclass(frozen=True)
class Batch:
    """Samples that advance together, side by side, padded to whole buckets."""

    samples: tuple[Sample, ...]
    state: SlotState


class Lane:
    """The waiting requests and the live samples of one key."""

    def __init__(self, run: Run) -> None:
        self.programme = run.programme
        self.bucket, self.particles = run.config.bucket, run.config.particles
        self.capacity = max(1, self.bucket // self.particles)
        self.waiting: deque[Request] = deque()
        self.live: list[Sample] = []
        self.drawn: list[Sample] = []
        """done, and not measured yet"""
        self.batch: Batch | None = None
        self.last_size = 0
        self._one_graph = one_graph_serves_both(run.programme)
        self._passed: dict[GraphKind, int] = {}
        self._unmeasured_for = 0

    @property
    def idle(self) -> bool:
        return not self.live and not self.drawn and not self.waiting

    def requests(self) -> list[Request]:
        """Those with samples that wait or are being drawn."""
        return list(dict.fromkeys([*(sample.request for sample in (*self.drawn, *self.live)), *self.waiting]))

    def add(self, request: Request) -> None:
        for sample in request.live.values():
            (self.drawn if sample.done else self.live).append(sample)
        if request.waiting:
            self.waiting.append(request)

    def admit(self) -> None:
        """Waiting samples become live, one of each request in turn, until two batches are: so that either graph can fill one."""
        while self.waiting and len(self.live) < 2 * self.capacity:
            request = self.waiting.popleft()
            if request.ended:
                continue
            self.live.append(request.start())
            if request.waiting:
                self.waiting.append(request)

    def drop_ended(self) -> None:
        """Forget the samples of requests that nobody waits for."""
        self.live = [sample for sample in self.live if not sample.request.ended]
        self.drawn = [sample for sample in self.drawn if not sample.request.ended]
        self.waiting = deque(request for request in self.waiting if not request.ended)

    def tick(self, now: float) -> list[Sample]:
        """Advance one batch by one row, and measure what is due; the samples that were measured, no longer the lane's."""
        self.last_size = 0
        if self.live:
            self._advance(now)
        return self._measured() if self._measuring_is_due() else []

    def settle(self) -> None:
        """Every live sample's own state is its last one: what a checkpoint reads."""
        self._scatter()

    def _advance(self, now: float) -> None:
        batch = self._gathered(self._choose())
        with count_calls() as calls:
            state, seen = tick(batch.state, self.programme)
        self.batch = Batch(batch.samples, state)
        for at, sample in enumerate(batch.samples):
            sample.row += 1
            sample.seen = seen.x0_hat[at * self.particles]
            if sample.request.first_tick is None:
                sample.request.first_tick = now
        self.last_size = len(batch.samples)
        for request in {sample.request for sample in batch.samples}:
            request.run.calls.update(calls)
        done = [sample for sample in batch.samples if sample.done]
        if done:
            self._scatter()
            self.live = [sample for sample in self.live if not sample.done]
            self.drawn += done

    def _measuring_is_due(self) -> bool:
        """Pictures wait for others to share the call with, but not where batches have room, nor for long."""
        if not self.drawn:
            return False
        self._unmeasured_for += 1
        room = len(self.live) < self.capacity
        return room or len(self.drawn) >= self.capacity or self._unmeasured_for > PATIENCE

    def _measured(self) -> list[Sample]:
        """As many of the drawn samples as a call has room for, measured."""
        chosen = self.drawn[: self.capacity]
        activation, drive = measure(padded([sample.state for sample in chosen], self.bucket), self.programme)
        for at, sample in enumerate(chosen):
            own = slice(at * self.particles, (at + 1) * self.particles)
            sample.measured = activation[own], drive[own]
        self.drawn, self._unmeasured_for = self.drawn[self.capacity :], 0
        return chosen

    def _choose(self) -> tuple[Sample, ...]:
        """Samples of one graph, those of the last batch first: of the one that fills a batch, else of the one that advances most
        rows in its time, or of one that has waited too long.
        """
        by_kind: dict[GraphKind, list[Sample]] = {}
        for sample in self.live:
            by_kind.setdefault(sample.kind, []).append(sample)
        guided, unguided = (by_kind.get(kind, []) for kind in (GraphKind.GUIDED, GraphKind.UNGUIDED))
        if guided and self._one_graph and max(len(guided), len(unguided)) < self.capacity:
            # In room that the guided batch leaves, rows of the other graph cost nothing; where there is not enough for all,
            # a call of their own may get more rows done in its time.
            alone, together = len(unguided) / COST[GraphKind.UNGUIDED], self.capacity / COST[GraphKind.GUIDED]
            if len(self.live) <= self.capacity or alone < together:
                by_kind = {GraphKind.GUIDED: [*guided, *unguided]}
        self._passed = {kind: self._passed.get(kind, 0) + 1 for kind in by_kind}
        overdue = [kind for kind in by_kind if self._passed[kind] > PATIENCE]

        def worth(kind: GraphKind) -> tuple[bool, float]:
            num = len(by_kind[kind])
            return (True, self._passed[kind]) if num >= self.capacity else (False, num / COST[kind])

        kind = max(overdue or by_kind, key=worth)
        self._passed[kind] = 0
        last = () if self.batch is None else self.batch.samples
        stay = [sample for sample in last if sample in by_kind[kind]]
        fresh = [sample for sample in by_kind[kind] if sample not in stay]
        return tuple([*stay, *fresh][: self.capacity])

    def _gathered(self, chosen: tuple[Sample, ...]) -> Batch:
        """`chosen` as a batch: the last one where it is the same, which costs nothing."""
        if self.batch is not None and self.batch.samples == chosen:
            return self.batch
        self._scatter()
        plans = {id(sample.plan): sample.plan for sample in chosen}
        log_tilts = dict.fromkeys(sample.log_tilt for sample in chosen)
        self.programme = replace(self.programme, plans=tuple(plans.values()), log_tilts=tuple(log_tilts))
        of_plan, of_log_tilt = list(plans), list(log_tilts)
        states = [
            _placed(sample.state, plan=of_plan.index(id(sample.plan)), log_tilt=of_log_tilt.index(sample.log_tilt))
            for sample in chosen
        ]
        self.batch = Batch(chosen, padded(states, self.bucket))
        return self.batch

    def _scatter(self) -> None:
        """Give every sample of the batch its own slots back; there is no batch then."""
        if self.batch is None:
            return
        for at, sample in enumerate(self.batch.samples):
            own = take(self.batch.state, slice(at * self.particles, (at + 1) * self.particles))
            sample.state = _placed(own, plan=0, log_tilt=0)
        self.batch = None


def _placed(state: SlotState, *, plan: int, log_tilt: int) -> SlotState:
    """The slots with their place in a programme."""
    num = len(state.row)
    host = HostRows(plan=(plan,) * num, row=state.host.row, tilted=state.host.tilted)
    return replace(
        state,
        plan=torch.full_like(state.plan, plan),
        log_tilt=torch.full_like(state.log_tilt, log_tilt),
        host=host,
    )
