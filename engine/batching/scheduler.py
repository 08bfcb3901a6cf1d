"""The batcher's core, without threads: which requests are unanswered, whose lane ticks next, and what ends a request early."""

import heapq
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tiltscope.engine.batching.lane import Lane, lane_key
from tiltscope.engine.batching.request import Request
from tiltscope.engine.errors import DeadlineError


class Counts(NamedTuple):
    """waiting, live: samples (live: until they are measured). ticks: batches advanced so far. advanced: sample rows in them.
    slots: room they had for such.
    """

    waiting: int
    live: int
    ticks: int
    advanced: int
    slots: int


class Scheduler:
    """Lanes in turn, a tick each. clock: seconds that deadlines are given in."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lanes: dict[tuple[object, ...], Lane] = {}
        self._turn: deque[tuple[object, ...]] = deque()
        self._deadlines: list[tuple[float, int, Request]] = []
        self._added = self._ticks = self._advanced = self._slots = 0

    @property
    def idle(self) -> bool:
        return not self._lanes

    @property
    def requests(self) -> list[Request]:
        """The unanswered ones, by name."""
        found = {request.name: request for lane in self._lanes.values() for request in lane.requests()}
        return list(found.values())

    def counts(self) -> Counts:
        waiting = sum(len(request.waiting) for request in self.requests)
        live = sum(len(lane.live) + len(lane.drawn) for lane in self._lanes.values())
        return Counts(waiting, live, self._ticks, self._advanced, self._slots)

    def add(self, request: Request) -> None:
        """Line a request up behind the others of its lane; those that are partly drawn already go on where they were."""
        key = lane_key(request.run)
        if key not in self._lanes:
            self._lanes[key] = Lane(request.run)
            self._turn.append(key)
        self._lanes[key].add(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, self._added, request))
        self._added += 1

    def step(self) -> bool:
        """One tick of the lane whose turn it is; False where nothing is left to do."""
        self._expire()
        while self._turn:
            key = self._turn.popleft()
            lane = self._lanes[key]
            lane.drop_ended()
            lane.admit()
            if lane.idle:
                del self._lanes[key]
                continue
            self._turn.append(key)
            self._tick(lane)
            return True
        return False

    def settle(self) -> None:
        """Every live sample holds its own slots: what a checkpoint reads."""
        for lane in self._lanes.values():
            lane.settle()

    def _tick(self, lane: Lane) -> None:
        try:
            done = lane.tick(self._clock())
        except Exception as error:  # noqa: BLE001  what fails, fails for all who shared the call; the other lanes go on
            for request in lane.requests():
                request.fail(error)
            lane.drop_ended()
            return
        self._ticks += bool(lane.last_size)
        self._slots += lane.capacity * bool(lane.last_size)
        self._advanced += lane.last_size
        for sample in done:
            sample.request.finish(sample)

    def _expire(self) -> None:
        now = self._clock()
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].ended):
            _, _, request = heapq.heappop(self._deadlines)
            if not request.ended:
                done, num = len(request.finished), request.run.config.num
                request.fail(
                    DeadlineError(f"{request.name}: {done} of {num} samples were done at its deadline; allow more time")
                )
