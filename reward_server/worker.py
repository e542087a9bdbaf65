"""One thread per device, the only one that runs its model, and a watchdog thread."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

from reward_server.batcher import Batcher, ClosedError, Ticket
from reward_server.engine import Engine, Job, Outcome
from reward_server.segmenter import Embedding
from reward_server.telemetry import Metrics

# Polling interval of the watchdog, as a share of the time limit of a batch.
_LOOK = 0.1
_log = logging.getLogger(__name__)


class Workers:
    """Threads that take batches from one queue, with one engine each.

    An error that is not due to a request kills the worker and the service: the queue is closed, waiting calls get
    ClosedError, and ``on_death`` is called. The same happens if a worker answers no call of its batch for longer than
    ``max_batch_s``, since a hanging device raises nothing.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        batcher: Batcher[Job, Outcome],
        metrics: Metrics,
        on_death: Callable[[], None],
        max_batch_s: float = 300.0,
    ) -> None:
        self.engines = engines
        self._batcher = batcher
        self._metrics = metrics
        self._on_death = on_death
        self._max_batch_s = max_batch_s
        self._threads: list[threading.Thread] = []
        # The batch that each device computes, and its start.
        self._running: dict[Engine, tuple[float, Sequence[Ticket[Job, Outcome]]]] = {}
        self._ended = threading.Event()

    def start(self) -> None:
        """Starts all threads and waits until every model is warm. Raises a model's error."""
        started: list[Future[None]] = []
        for engine in self.engines:
            warm: Future[None] = Future()
            name = f"worker-{engine.segmenter.device}"
            # Daemon, so that a hanging device does not keep the process from ending.
            thread = threading.Thread(target=self._live, args=(engine, warm), name=name, daemon=True)
            thread.start()
            started.append(warm)
            self._threads.append(thread)
        for warm in started:
            warm.result()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def find(self, key: bytes) -> Embedding | None:
        """The embedding of an image, on any device; None if there is none."""
        return next((found for engine in self.engines if (found := engine.embeddings.get(key))), None)

    def stop(self, patience_s: float) -> None:
        """Closes the queue and waits at most ``patience_s`` for the running batches."""
        if self._ended.is_set():
            return  # A dead worker finishes nothing.
        self._ended.set()
        self._batcher.close("the server is stopping", drop=True)
        deadline = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _log.error("%s still computes after %g s", thread.name, patience_s)

    def _live(self, engine: Engine, warm: "Future[None]") -> None:
        try:
            engine.warm_up(self._batcher.max_batch)
        except Exception as error:  # Raised in ``start``.
            warm.set_exception(error)
            return
        warm.set_result(None)
        while batch := self._batcher.take():
            start = time.monotonic()
            self._metrics.batch_size.observe(len(batch))
            self._running[engine] = start, batch
            try:
                engine.run(batch)
            except BaseException:
                if self._running.pop(engine, None) is not None:
                    _log.exception("the worker of %s is dead", engine.segmenter.device)
                    self._die(f"the worker of {engine.segmenter.device} is dead: the server's log says why", batch)
                return
            if self._running.pop(engine, None) is None:
                return  # The watchdog has given up on it.
            self._batcher.finished(batch, time.monotonic() - start)
            del batch  # Frees its images and masks, which would otherwise stay until the next batch.

    def _watch(self) -> None:
        """Ends the service if a batch makes no progress."""
        # Progress of each device: start of its batch, number of answers, and time of the last progress.
        reached: dict[Engine, tuple[float, int, float]] = {}
        while not self._ended.wait(self._max_batch_s * _LOOK):
            for engine, (start, batch) in list(self._running.items()):
                answered = sum(ticket.future.done() for ticket in batch)
                if reached.get(engine, (0.0, 0, 0.0))[:2] != (start, answered):
                    reached[engine] = start, answered, time.monotonic() if answered else start
                late = time.monotonic() - reached[engine][2] > self._max_batch_s
                if late and self._running.pop(engine, None) is not None:
                    device, left = engine.segmenter.device, len(batch) - answered
                    _log.error("%s hangs: %d of a batch unanswered after %g s", device, left, self._max_batch_s)
                    self._die(f"{device} hangs: a batch gets no further in {self._max_batch_s:g} s", batch)
                del batch

    def _die(self, reason: str, batch: Sequence[Ticket[Job, Outcome]]) -> None:
        """Takes the service down; calls in this batch and in the queue get ClosedError."""
        self._ended.set()
        self._on_death()
        self._batcher.close(reason, drop=True)
        for ticket in batch:
            # The device may set a result concurrently.
            with contextlib.suppress(InvalidStateError):
                ticket.future.set_exception(ClosedError(reason))
