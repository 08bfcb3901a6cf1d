"""Engine: the embedding interface. One thread draws for everybody; submit() promises an answer, asyncio awaits it."""

import asyncio
import atexit
import itertools
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from tiltscope.engine.batching.checkpoint import read_checkpoint, write_checkpoint
from tiltscope.engine.batching.lane import step_key
from tiltscope.engine.batching.request import Request, Ticket
from tiltscope.engine.batching.scheduler import Counts, Scheduler
from tiltscope.engine.bundle import Bundle
from tiltscope.engine.config import SampleConfig
from tiltscope.engine.errors import BusyError, ConfigError, RunnerError
from tiltscope.engine.feature.feature import Feature
from tiltscope.engine.prepare import STATE_DTYPES, calibrated, device_and_kernels, prepare
from tiltscope.engine.prior.prior import Prior
from tiltscope.engine.runtime.runners import Gated
from tiltscope.engine.runtime.threads import release_threads
from tiltscope.engine.samples import Samples

# Settings that the engine gives every request.
_OWN = ("batch_size", "runner", "allow_parity_failure", "dtype", "device", "kernels", "graphs")
_ASKED = {each.name for each in fields(SampleConfig)} - set(_OWN)


class Engine:
    """Samples of many requests drawn in one batch, step by step.

        with Engine(tiltscope.load("emoji64"), max_batch=8) as engine:
            ticket = engine.submit("blocks.5:sae:1169", num=4, target_activation=6.0, seed=3, deadline_s=30)
            samples = ticket.result()

    bundle: a Bundle, or a Prior for features that are functions. max_batch: slots of a network call. max_pending: samples that
    may be unanswered at once. A request's pictures are bit for bit those of sample(..., batch_size=max_batch) with the same
    runner, dtype, device and kernels, whatever shares the batch (tests/batching/test_engine.py).

    Requests are served in turn, a sample each, in the order in which they came. Thread-safe. The thread starts with the first
    request; close() (or leaving the `with`) answers what is pending first, close(cancel=True) does not.
    """

    def __init__(
        self,
        bundle: Bundle | Prior,
        *,
        max_batch: int = 8,
        runner: str = "torch",
        dtype: str = "float32",
        device: str = "cpu",
        kernels: str = "auto",
        max_pending: int = 4096,
    ) -> None:
        """Raises ConfigError for a value that is not allowed, RunnerError for a device or kernels that are not here."""
        if type(max_pending) is not int or max_pending < 1:
            raise ConfigError(f"max_pending: got {max_pending!r}, allowed are whole numbers from 1")
        self._bundle = bundle if isinstance(bundle, Bundle) else None
        self.prior = bundle.prior if isinstance(bundle, Bundle) else bundle
        self._own: dict[str, Any] = {
            "batch_size": max_batch,
            "runner": runner,
            "allow_parity_failure": False,
            "dtype": dtype,
            "device": device,
            "kernels": kernels,
            "graphs": "off",  # a graph holds one programme; here the programme changes with who is in the batch
        }
        # Refuses what no request could be drawn with.
        self._device, _ = device_and_kernels(SampleConfig(lam=0.0, **self._own))
        self.max_pending = max_pending
        self.tickets: dict[str, Ticket] = {}
        """the unanswered requests by name"""
        self._scheduler = Scheduler()
        self._steps: dict[object, Gated] = {}
        self._incoming: deque[Request] = deque()
        self._pending = 0
        self._changed = threading.Condition()
        self._between_ticks = threading.Lock()
        self._visitors = 0
        self._preparing = threading.Lock()
        self._closing = False
        self._names = itertools.count()
        release_threads()  # what loaded the networks
        # Threads of a tensor operation are a setting of the thread that calls it.
        self._num_threads = torch.get_num_threads()
        self._thread: threading.Thread | None = None

    def submit(
        self,
        feature: str | Feature,
        *,
        name: str | None = None,
        deadline_s: float | None = None,
        wait_s: float = 0.0,
        **settings: Any,
    ) -> Ticket:
        """Ask for the samples of one distribution; settings are sample()'s, but for those that are the engine's.

        name: what the request is called in `tickets` and a checkpoint. deadline_s: seconds from now after which it ends with
        DeadlineError. wait_s: seconds to wait for room. Lambda is calibrated here, in the caller's thread. Raises BusyError
        where there is no room, RunnerError after close(), ConfigError and CalibrationError as sample() does.
        """
        if unknown := sorted(set(settings) - _ASKED):
            raise ConfigError(f"submit: got {', '.join(unknown)}; allowed are {', '.join(sorted(_ASKED))}")
        if deadline_s is not None and not deadline_s > 0:
            raise ConfigError(f"deadline_s: got {deadline_s!r}, allowed are seconds above 0")
        config = SampleConfig(**settings, **self._own)
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        if config.num > self.max_pending:
            raise ConfigError(f"num: got {config.num}, this engine holds at most {self.max_pending} samples at once")
        self._reserve(config.num, wait_s)
        try:
            with self._preparing:
                asked = self._feature(feature)
                run = calibrated(prepare(self.prior, asked, config, gated=self._step_of(asked)))
                if run.gated is not None:
                    self._steps.setdefault(step_key(run.feature), run.gated)
            request = Request(run, name=name or f"request-{next(self._names)}", deadline=deadline)
            self._enter(request)
        except BaseException:
            self._release(config.num)
            raise
        finally:
            release_threads()
        return request.ticket

    async def sample(self, feature: str | Feature, **asked: Any) -> Samples:
        """submit() for asyncio: awaits the answer; cancelling the task cancels the request."""
        ticket = await asyncio.to_thread(self.submit, feature, **asked)
        return await asyncio.wrap_future(ticket)

    def counts(self) -> Counts:
        """How much waits, is being drawn, and how full the batches were."""
        with self._paused():
            self._take_in()
            return self._scheduler.counts()

    def checkpoint(self, path: str | Path) -> None:
        """Write every unanswered request, with the slots of what is being drawn, to one .safetensors file, between two ticks.

        Engine.resume goes on from there bit for bit. Raises ConfigError for a request whose feature is a function.
        """
        with self._paused():
            self._take_in()
            self._scheduler.settle()
            write_checkpoint(Path(path), self._scheduler.requests)

    @classmethod
    def resume(cls, bundle: Bundle | Prior, path: str | Path, **engine: Any) -> Self:
        """An engine that goes on with a checkpoint's requests; their tickets are in `tickets`, by name.

        engine: as for Engine, max_batch, runner and dtype as they were. Raises BundleError for another bundle's or a damaged
        file, ConfigError where the settings differ.
        """
        resumed = cls(bundle, **engine)
        requests = read_checkpoint(Path(path), resumed.prior, resumed._feature, resumed._own)
        release_threads()  # what prepared them
        for request in requests:
            resumed._reserve(request.run.config.num, 0.0)
            resumed._enter(request)
        return resumed

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests; answer what is pending, or cancel it; then end the thread."""
        with self._changed:
            self._closing = True
            tickets = list(self.tickets.values()) if cancel else []
            self._changed.notify_all()
        for ticket in tickets:
            ticket.cancel()
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)

    def _feature(self, feature: str | Feature) -> Feature:
        if isinstance(feature, Feature):
            return feature
        if self._bundle is None:
            raise ConfigError(f"feature: got {feature!r}, but this engine has no bundle; give a Feature")
        return self._bundle.feature(feature)

    def _step_of(self, feature: Feature) -> Gated | None:
        return self._steps.get(step_key(feature.to(STATE_DTYPES[self._own["dtype"]], self._device)))

    def _reserve(self, num: int, wait_s: float) -> None:
        with self._changed:
            room = self._changed.wait_for(lambda: self._closing or self._pending + num <= self.max_pending, wait_s)
            if self._closing:
                raise RunnerError("this engine is closed; make another")
            if not room:
                raise BusyError(
                    f"{self._pending} samples are unanswered and {self.max_pending} is the limit; "
                    f"try again, or wait with wait_s"
                )
            self._pending += num

    def _release(self, num: int) -> None:
        with self._changed:
            self._pending -= num
            self._changed.notify_all()

    def _enter(self, request: Request) -> None:
        with self._changed:
            if request.name in self.tickets:
                raise ConfigError(f"name: {request.name!r} is the name of an unanswered request; give another")
            self.tickets[request.name] = request.ticket
            self._incoming.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tiltscope-engine", daemon=True)
                self._thread.start()
                # A thread cut off inside a tensor operation would take the interpreter down with it.
                atexit.register(self.close, cancel=True)
            self._changed.notify_all()
        request.ticket.add_done_callback(lambda _: self._leave(request))

    def _leave(self, request: Request) -> None:
        with self._changed:
            self.tickets.pop(request.name, None)
        self._release(request.run.config.num)

    def _take_in(self) -> None:
        with self._changed:
            while self._incoming:
                self._scheduler.add(self._incoming.popleft())

    @contextmanager
    def _paused(self) -> Generator[None]:
        """Between two ticks. The thread lets visitors pass: it would take the lock again before they wake up."""
        with self._changed:
            self._visitors += 1
        try:
            with self._between_ticks:
                yield
        finally:
            with self._changed:
                self._visitors -= 1
                self._changed.notify_all()

    def _work(self) -> None:
        torch.set_num_threads(self._num_threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._visitors)
            with self._between_ticks:
                self._take_in()
                busy = self._scheduler.step()
            if busy:
                continue
            release_threads()
            with self._changed:
                self._changed.wait_for(lambda: self._incoming or self._closing)
                if self._closing and not self._incoming:
                    return
