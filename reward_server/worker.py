"""One thread per device, which alone runs its model."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from reward_server.batcher import Batcher, ClosedError
from reward_server.engine import Engine, Job, Outcome
from reward_server.segmenter import Embedding
from reward_server.telemetry import Metrics

_log = logging.getLogger(__name__)


class Workers:
    """Threads that take batches from one queue, an engine each.

    A worker that meets an error it cannot lay on a request is dead, and the service with it: the queue is closed, all
    who wait are told (ClosedError), and ``on_death`` is called.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        batcher: Batcher[Job, Outcome],
        metrics: Metrics,
        on_death: Callable[[], None],
    ) -> None:
        self.engines = engines
        self._batcher = batcher
        self._metrics = metrics
        self._on_death = on_death
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts all threads and waits until every model is warm. Raises what a model raised."""
        started: list[Future[None]] = []
        for engine in self.engines:
            warm: Future[None] = Future()
            name = f"worker-{engine.segmenter.device}"
            # A device that hangs must not keep the process from ending.
            thread = threading.Thread(target=self._live, args=(engine, warm), name=name, daemon=True)
            thread.start()
            started.append(warm)
            self._threads.append(thread)
        for warm in started:
            warm.result()

    def find(self, key: bytes) -> Embedding | None:
        """The embedding of a picture, on whichever device it is."""
        return next((found for engine in self.engines if (found := engine.embeddings.get(key))), None)

    def stop(self, patience_s: float) -> None:
        """Closes the queue and waits for the batches that run, so long at most."""
        self._batcher.close("the server is stopping", drop=True)
        deadline = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _log.error("%s still computes after %g s", thread.name, patience_s)

    def _live(self, engine: Engine, warm: "Future[None]") -> None:
        try:
            engine.warm_up(self._batcher.max_batch)
        except Exception as error:  # The starter's to deal with.
            warm.set_exception(error)
            return
        warm.set_result(None)
        while batch := self._batcher.take():
            start = time.monotonic()
            self._metrics.batch_size.observe(len(batch))
            try:
                engine.run(batch)
            except BaseException:
                _log.exception("the worker of %s is dead", engine.segmenter.device)
                self._on_death()
                reason = f"the worker of {engine.segmenter.device} is dead: the server's log says why"
                self._batcher.close(reason, drop=True)
                for ticket in batch:
                    if not ticket.future.done():
                        ticket.future.set_exception(ClosedError(reason))
                return
            self._batcher.finished(batch, time.monotonic() - start)
