"""The queue between calls and devices: bounded, in order of arrival, handed out in batches.

Calls put items in and wait for a future; a device's thread takes what has gathered. Nobody is served who no longer
waits: a cancelled or overdue item is dropped when its turn comes. TF Serving's batching guide explains the two knobs
(https://github.com/tensorflow/serving/blob/master/tensorflow_serving/batching/README.md).
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Bounds of what a refused caller is told to wait, in seconds.
_SOONEST_S, _LATEST_S = 0.05, 5.0


class NotServedError(Exception):
    """An item that no device will see."""


class QueueFullError(NotServedError):
    """There is no room; there may be some after ``retry_after_s`` seconds."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} requests are waiting, which is as many as may")
        self.retry_after_s = retry_after_s


class TooLateError(NotServedError):
    """The deadline passed first."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before its turn came")


class ClosedError(NotServedError):
    """The queue is closed: the server is stopping, or its device is dead."""


@dataclass(eq=False)
class Ticket(Generic[Item, Result]):
    """An item in the queue.

    Attributes:
      deadline: when it is of no more use, by ``time.monotonic()``.
      future: its result. Cancelling it takes the item out of the queue, unless a device has it already.
      enqueued, taken: by ``time.monotonic()``.
      batch: how many were taken together.
    """

    item: Item
    deadline: float
    future: "Future[Result]" = field(default_factory=Future)
    enqueued: float = field(default_factory=time.monotonic)
    taken: float = 0.0
    batch: int = 0


class Batcher(Generic[Item, Result]):
    """A bounded queue that any number of threads fill and empty.

    Args:
      max_batch: items handed out together at most.
      max_delay_s: how long the first of an incomplete batch waits for others. Items age while the devices are busy,
        so under load nobody waits longer for this.
      max_waiting: items in the queue at most, with those that are being prepared for it.
    """

    def __init__(self, max_batch: int, max_delay_s: float, max_waiting: int) -> None:
        self.max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._max_waiting = max_waiting
        self._waiting: deque[Ticket[Item, Result]] = deque()
        self._reserved = 0
        self._changed = threading.Condition()
        self._closed: str | None = None
        self._seconds_per_item = _SOONEST_S

    def __len__(self) -> int:
        """Places taken: items that wait, and those that are still being prepared."""
        return len(self._waiting) + self._reserved

    @contextmanager
    def reserve(self, deadline: float) -> Iterator[None]:
        """Keeps a place for an item that is prepared within, and then submitted: nobody prepares in vain.

        Raises:
          ClosedError, TooLateError, QueueFullError: on entry; nothing should be prepared.
        """
        with self._changed:
            self._check(deadline)
            self._check_room()
            self._reserved += 1
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= 1

    def submit(self, item: Item, deadline: float, reserved: bool = False) -> Ticket[Item, Result]:
        """Queues an item.

        Args:
          deadline: when it is of no more use, by ``time.monotonic()``.
          reserved: in a place that this caller keeps by ``reserve``.

        Raises:
          ClosedError, TooLateError, QueueFullError: it is not queued.
        """
        with self._changed:
            self._check(deadline)
            if not reserved:
                self._check_room()
            ticket: Ticket[Item, Result] = Ticket(item, deadline)
            self._waiting.append(ticket)
            # Only the first and the last of a batch change what a waiting thread does.
            if len(self._waiting) == 1 or len(self._waiting) >= self.max_batch:
                self._changed.notify()
            return ticket

    def take(self) -> list[Ticket[Item, Result]]:
        """Waits for a batch and returns it; empty when the queue is closed and nothing is left in it."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closed is not None:
                        return []
                    self._changed.wait()
                    continue
                patience = self._waiting[0].enqueued + self._max_delay_s - time.monotonic()
                if len(self._waiting) < self.max_batch and patience > 0 and self._closed is None:
                    self._changed.wait(patience)
                elif batch := self._next_batch():
                    # What is left is another thread's business: it may have slept through the calls that added it.
                    if self._waiting:
                        self._changed.notify()
                    return batch

    def finished(self, batch: Sequence[Ticket[Item, Result]], seconds: float) -> None:
        """Learns from how long a batch took what to tell callers who find the queue full."""
        self._seconds_per_item += 0.2 * (seconds / len(batch) - self._seconds_per_item)

    def close(self, reason: str, drop: bool = False) -> None:
        """Takes nothing in any more; what waits is still handed out, or dropped with ClosedError."""
        with self._changed:
            self._closed = self._closed or reason
            dropped = list(self._waiting) if drop else []
            if drop:
                self._waiting.clear()
            self._changed.notify_all()
        for ticket in dropped:
            if ticket.future.set_running_or_notify_cancel():
                ticket.future.set_exception(ClosedError(reason))

    def _check(self, deadline: float) -> None:
        if self._closed is not None:
            raise ClosedError(self._closed)
        if deadline <= time.monotonic():
            raise TooLateError

    def _check_room(self) -> None:
        if len(self) >= self._max_waiting:
            self._waiting = deque(ticket for ticket in self._waiting if not self._drop(ticket))
        if len(self) >= self._max_waiting:
            delay = min(max(self._seconds_per_item * len(self), _SOONEST_S), _LATEST_S)
            raise QueueFullError(len(self), delay)

    def _next_batch(self) -> list[Ticket[Item, Result]]:
        batch: list[Ticket[Item, Result]] = []
        while self._waiting and len(batch) < self.max_batch:
            ticket = self._waiting.popleft()
            if not self._drop(ticket) and ticket.future.set_running_or_notify_cancel():
                batch.append(ticket)
        now = time.monotonic()
        for ticket in batch:
            ticket.taken, ticket.batch = now, len(batch)
        return batch

    @staticmethod
    def _drop(ticket: Ticket[Item, Result]) -> bool:
        """Whether nobody waits for it; who waited too long is told."""
        if ticket.deadline <= time.monotonic() and ticket.future.set_running_or_notify_cancel():
            ticket.future.set_exception(TooLateError())
        return ticket.future.done()
